"""Stops a run whose loss is no longer a number, on every rank, and says which term of which samples."""

from __future__ import annotations

import lightning
import torch

from anonfw.errors import AnonfwError


class NonFiniteLoss(AnonfwError):
    """A loss term became NaN or infinite."""


class FiniteGuard(lightning.Callback):
    """Looks at the loss before each backward pass; ranks agree before any of them stops, so none is left waiting.

    Args:
        every: look at each `every`-th batch. A look waits for the device; on fast GPUs with short steps use more.
    """

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            raise ValueError(f"every is at least 1, not {every}")
        self.every = every

    def on_before_backward(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: torch.Tensor
    ) -> None:
        if pl_module.batches_seen % self.every:
            return
        bad = (~torch.isfinite(loss.detach())).float()
        if trainer.world_size > 1:
            bad = trainer.strategy.reduce(bad, reduce_op="sum")
        if not bad.item():
            return
        raise NonFiniteLoss(
            f"the loss is not finite at step {trainer.global_step}: {self._culprits(pl_module)}. "
            "Lower the learning rate, look at these samples, or continue from an earlier checkpoint (run=FOLDER)."
        )

    @staticmethod
    def _culprits(module: lightning.LightningModule) -> str:
        found = []
        keys = module.last_keys
        for name, term in module.last_terms.items():
            rows = (~torch.isfinite(term)).nonzero().flatten().tolist()
            if rows:
                shown = ", ".join(keys[row] for row in rows[:8] if row < len(keys))
                found.append(f"term {name!r} of {len(rows)} samples ({shown}{', ...' if len(rows) > 8 else ''})")
        return "; ".join(found) or f"no term on rank {module.global_rank}, but one on another rank"
