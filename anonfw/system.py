"""`System`: what all systems share while they train. No method here knows what diffusion is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import lightning
import torch
from torch import Tensor, nn

from anonfw.batch import FaceBatch, StepOut
from anonfw.errors import AnonfwError
from anonfw.losses.base import Loss


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that is a pure function of its parts, equal on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class System(lightning.LightningModule):
    """Base of every system. A system writes two methods: `step` and `anonymize`.

    Args:
        losses: name -> loss. The total is the sum of each one's mean over the batch times its weight.
        optimizer: parameters -> torch optimizer (a `_partial_` node in a recipe).
        schedule: step number (from 0) -> factor of the learning rate; None for a constant one.
        seed: root of all randomness.
    """

    def __init__(
        self,
        losses: Mapping[str, Loss],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.make_optimizer = optimizer
        self.schedule = schedule
        self.seed = seed
        self.batches_seen = 0
        self.last_terms: dict[str, Tensor] = {}
        self.last_keys: list[str] = []

    def step(self, batch: FaceBatch, rng: torch.Generator) -> StepOut:
        """Condition, corrupt, predict: one batch to what the losses need."""
        raise NotImplementedError

    def anonymize(self, batch: FaceBatch, draw: int = 0) -> Tensor:
        """(B,3,H,W) in [-1,1]: the same photographs of somebody else. Equal inputs and `draw` give equal outputs."""
        raise NotImplementedError

    def recognizer_names(self) -> set[str]:
        """Names of the recognisers that conditioned or trained this system: none of them may judge it."""
        return {loss.recognizer.name for loss in self.losses.values() if hasattr(loss, "recognizer")}

    def rng(self, domain: str, index: int | str) -> torch.Generator:
        """A fresh generator from (seed, domain, rank, index): the only source of randomness of systems and losses."""
        generator = torch.Generator(device=self.device)
        return generator.manual_seed(seed_of(self.seed, domain, self.global_rank, index))

    def noise_of(self, batch: FaceBatch, domain: str, draw: int, shape: tuple[int, ...]) -> Tensor:
        """(B,*shape) normal noise, each row from its own key: an output does not depend on who shares its batch."""
        seeds = [seed_of(self.seed, domain, draw, key) for key in batch.key]
        rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(rows).to(batch.device)

    def total(self, batch: FaceBatch, rng: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """(scalar loss, what to log). Keeps the per-sample terms for the guard that names a non-finite one."""
        out = self.step(batch, rng)
        out.rng = rng
        terms = {name: loss(out, batch) for name, loss in self.losses.items()}
        self.last_terms = {name: term.detach() for name, term in terms.items()}
        self.last_keys = batch.key + (batch.partner.key if batch.partner is not None else [])
        means = {name: term.mean() for name, term in terms.items()}
        total = torch.stack([self.losses[name].weight * mean for name, mean in means.items()]).sum()
        return total, {"loss": total.detach(), **{n: m.detach() for n, m in means.items()}, **out.metrics}

    def training_step(self, batch: FaceBatch, batch_idx: int) -> Tensor:  # noqa: ARG002 Lightning's signature
        loss, logged = self.total(batch, self.rng("train", self.batches_seen))
        self.batches_seen += 1
        means = self.trainer.strategy.reduce(
            torch.stack([value.float() for value in logged.values()]), reduce_op="mean"
        )
        self.log_dict({f"train/{name}": m for name, m in zip(logged, means, strict=True)}, batch_size=len(batch))
        return loss

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> None:
        _, logged = self.total(batch, self.rng("validate", batch_idx))
        self.log_dict({f"val/{name}": value for name, value in logged.items()}, batch_size=len(batch), sync_dist=True)

    def transfer_batch_to_device(self, batch: FaceBatch, device: torch.device, dataloader_idx: int) -> FaceBatch:  # noqa: ARG002
        return batch.to(device, non_blocking=True)

    def configure_model(self) -> None:
        """Lightning's hook, once the ranks know each other: a strategy that shards cuts the networks here."""
        if hasattr(self.trainer.strategy, "shard"):
            self.trainer.strategy.shard(self)

    def configure_optimizers(self):
        optimizer = self.make_optimizer([p for p in self.parameters() if p.requires_grad])
        if self.schedule is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(self, optimizer, gradient_clip_val, gradient_clip_algorithm=None) -> None:
        # Lightning refuses to clip for fused optimizers under mixed precision; without a gradient scaler that is sound.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if gradient_clip_val and gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, gradient_clip_val)
        elif gradient_clip_val:
            torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val)

    def trained_state(self) -> dict[str, Tensor]:
        """What training changes, by its name in `state_dict`: parameters with gradients, and the persistent buffers of
        the modules that own one (running statistics). Frozen networks come from the weights table, not from files.
        """
        state = {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}
        for prefix, module in self.named_modules():
            if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
                for name, buffer in module.named_buffers(prefix, recurse=False):
                    if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                        state[name] = buffer
        return state

    def trained_names(self) -> set[str]:
        return set(self.trained_state())

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        trained = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["batches_seen"] = self.batches_seen

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        ours = {name: value.shape for name, value in self.trained_state().items()}
        theirs = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if differ := sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name)):
            names = ", ".join(differ[:5]) + (", ..." if len(differ) > 5 else "")
            raise AnonfwError(f"the checkpoint is of another network: {len(differ)} parameters differ ({names})")
        self.batches_seen = checkpoint["batches_seen"]
        # Lightning loads strictly: give it back the frozen parameters as they stand.
        checkpoint["state_dict"] = {**self.state_dict(), **checkpoint["state_dict"]}
