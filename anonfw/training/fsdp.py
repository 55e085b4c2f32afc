"""FSDP2: parameters, gradients, optimizer states and averages cut over the ranks (`trainer.strategy` of a recipe)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn

from anonfw.training import storage
from anonfw.training.blocks import CLASSES, find_blocks
from anonfw.training.ema import local, sharded

# Entries of a system that run its networks: before each, what lies beside the blocks is gathered.
ENTRIES = ("training_step", "validation_step", "anonymize", "reconstruct", "generate")


class FSDP2(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 with a rule of what is cut, and checkpoints that any other layout can read.

    Each block (trained or frozen) is gathered when it runs and let go afterwards; the trained rest is one unit with the
    system, gathered for the whole step; the frozen rest stays whole on every rank. Lightning's own checkpoints hold the
    frozen networks, leave averages out, and do not load into a system that is not sharded.

    Args:
        classes: of the blocks. min_parameters: smaller ones belong to the rest.
        gather: type in which parameters travel and compute; None for their own. Gradients are summed in float32.
        reshard_after_forward: False keeps blocks whole until their backward pass: more memory, less to send.
        shard_over: ranks that share one copy of the parameters; None for all. With the ranks of a node, only gradients
            travel between nodes (hybrid sharding).
        process_group_backend, timeout: of torch.distributed.
    """

    def __init__(
        self,
        classes: Sequence[str] = CLASSES,
        min_parameters: int = 1_000_000,
        gather: Literal["bfloat16", "float16"] | None = None,
        reshard_after_forward: bool = True,
        shard_over: int | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
    ) -> None:
        super().__init__(tensor_parallel_size=1, process_group_backend=process_group_backend, timeout=timeout)
        self.classes, self.min_parameters, self.gather = tuple(classes), min_parameters, gather
        self.reshard_after_forward, self.shard_over = reshard_after_forward, shard_over
        self._statistics: list[Tensor] = []

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def shard(self, system: lightning.LightningModule) -> None:
        """Cuts the system's networks in place. Called by `System.configure_model`."""
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

        self.precision_plugin.convert_module(system)
        mesh, dtype = self._mesh(), getattr(torch, self.gather) if self.gather else None
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
        blocks = find_blocks(system, self.classes, self.min_parameters)
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=self.reshard_after_forward)
        inside = {id(parameter) for block in blocks for parameter in block.parameters()}
        frozen = {p for p in system.parameters() if not p.requires_grad and id(p) not in inside}
        fully_shard(system, mesh=mesh, mp_policy=policy, ignored_params=frozen)
        for name in ENTRIES:
            if hasattr(system, name):
                register_fsdp_forward_method(system, name)

    def _mesh(self) -> Any:
        from torch.distributed.device_mesh import init_device_mesh

        if self.shard_over is None:
            return self.device_mesh["data_parallel"]
        if self.world_size % self.shard_over:
            raise ValueError(f"shard_over={self.shard_over} does not divide {self.world_size} ranks")
        shape = (self.world_size // self.shard_over, self.shard_over)
        return init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replicate", "shard"))

    def setup(self, trainer: lightning.Trainer) -> None:
        super().setup(trainer)
        state = self.lightning_module.trained_state()
        self._statistics = [value for value in state.values() if not isinstance(value, nn.Parameter)]

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        for statistic in self._statistics:  # of BatchNorm; FSDP2 leaves buffers alone, DDP does this
            torch.distributed.broadcast(statistic, 0)
        return super().training_step(*args, **kwargs)

    # Checkpoints.

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in sharded(self.lightning_module).trained_state().items()}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return super(ModelParallelStrategy, self).optimizer_state(optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:  # noqa: ARG002
        self.checkpoint_io.failure = storage.attempt(
            lambda: storage.write_shards(checkpoint, Path(filepath), self.global_rank)
        )

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = True) -> dict[str, Any]:  # noqa: ARG002
        """Lightning's dictionary with this rank's shards, of a folder of shards or of a plain file."""
        path, like = Path(checkpoint_path), self._layouts()
        if path.is_dir():
            return storage.read_shards(path, lambda name, size, dtype: _empty(size, dtype, like(name)))
        whole = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return storage.map_tensors(whole, lambda name, tensor: _cut(tensor, like(name)))

    def _layouts(self) -> Callable[[str], Tensor | None]:
        """A tensor's path inside a checkpoint -> the parameter that it belongs to."""
        named = dict(self.lightning_module.named_parameters())
        in_order = [[p for group in each.param_groups for p in group["params"]] for each in self.optimizers]

        def like(path: str) -> Tensor | None:
            kind, *rest = path.split("/")
            if kind == "optimizer_states":
                number, _, index, _ = rest
                return in_order[int(number)][int(index)]
            return named.get(rest[-1]) if kind in ("state_dict", "callbacks") else None

        return like

    def load_model_state_dict(self, checkpoint: dict[str, Any], strict: bool = True) -> None:  # noqa: ARG002
        with torch.no_grad():
            for name, value in sharded(self.lightning_module).trained_state().items():
                local(value).copy_(local(checkpoint["state_dict"][name]))

    def load_optimizer_state_dict(self, checkpoint: dict[str, Any]) -> None:
        super(ModelParallelStrategy, self).load_optimizer_state_dict(checkpoint)


def _cut(tensor: Tensor, like: Tensor | None) -> Tensor:
    """This rank's part of a whole tensor, distributed as `like` is; unchanged where that is of another shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor) or like.shape != tensor.shape:
        return tensor.clone()
    # Every rank holds the whole: nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _empty(size: torch.Size, dtype: torch.dtype, like: Tensor | None) -> Tensor:
    """Memory for this rank's part of a tensor of that size, and for no more."""
    from torch.distributed.tensor import DTensor

    if not isinstance(like, DTensor) or like.shape != size:
        return torch.empty(size, dtype=dtype)
    return torch.empty_like(like, dtype=dtype, requires_grad=False)
