"""Exponential moving average of the trained parameters, and only of those, where and how the parameters lie.

Lightning's `WeightAveraging` copies the whole module, frozen networks included, and refuses sharded ones, so this is
our own. Of a parameter that is sharded over ranks, each rank averages its shard: nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning
import torch
from torch import Tensor


class EMA(lightning.Callback):
    """mean <- mean + (1 - d) (parameter - mean) after each optimizer step, with d = min(decay, (1 + n) / (10 + n)).

    Validation and sampling run under the averaged parameters. The average is part of the checkpoint. It has the
    parameters' precision, but at least float32: 1 - d of a bfloat16 would be rounded away.

    Args:
        decay: d after the warm-up that the formula gives. 0.999 averages over about a thousand steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is in [0,1), not {decay}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._own: list[Tensor] | None = None
        self._last_step = -1

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Only now is everything restored, and the steps before a resume are counted."""
        self._last_step = trainer.global_step
        trained = {n: p for n, p in sharded(pl_module).named_parameters() if p.requires_grad}
        if self.average and self.average.keys() != trained.keys():
            raise ValueError("the checkpoint's average is of other parameters than this recipe trains")
        self.average = {
            name: (self.average[name].to(p.device) if name in self.average else at_least_float(p).detach().clone())
            for name, p in trained.items()
        }

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        if trainer.global_step == self._last_step:
            return  # still accumulating gradients
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [at_least_float(parameter) for parameter in self._parameters(pl_module)]
        torch._foreach_lerp_(self._means(), parameters, 1 - decay)

    @contextmanager
    def averaged(self, module: torch.nn.Module) -> Iterator[None]:
        """Within the block, `module` holds the averaged parameters; its own wait in memory of the same size."""
        self._enter(module)
        try:
            yield
        finally:
            self._leave(module)

    @torch.no_grad()
    def put_into(self, module: torch.nn.Module) -> None:
        """The averaged parameters take the place of the module's own, for good."""
        torch._foreach_copy_(self._parameters(module), self._means())

    def _enter(self, module: torch.nn.Module) -> None:
        if self._own is None and self.average:
            self._own = [parameter.clone() for parameter in self._parameters(module)]
            self.put_into(module)

    @torch.no_grad()
    def _leave(self, module: torch.nn.Module) -> None:
        if self._own is not None:
            torch._foreach_copy_(self._parameters(module), self._own)
            self._own = None

    def _parameters(self, module: torch.nn.Module) -> list[Tensor]:
        parameters = dict(sharded(module).named_parameters())
        return [local(parameters[name].detach()) for name in self.average]

    def _means(self) -> list[Tensor]:
        return [local(mean) for mean in self.average.values()]

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._enter(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._leave(pl_module)

    def on_exception(
        self,
        trainer: lightning.Trainer,  # noqa: ARG002
        pl_module: lightning.LightningModule,
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        self._leave(pl_module)

    def state_dict(self) -> dict:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict) -> None:
        self.average, self.updates = state_dict["average"], state_dict["updates"]


def at_least_float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a distributed tensor, in the same memory; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sharded(module: torch.nn.Module) -> torch.nn.Module:
    """The module with its shards in place: after a forward pass without a backward, FSDP2 leaves the joined ones."""
    for part in module.modules():
        if hasattr(part, "reshard"):
            part.reshard()
    return module
