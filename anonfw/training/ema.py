"""Exponential moving average of the trained parameters, and only of those.

Lightning's `WeightAveraging` copies the whole module, frozen networks included, so this is our own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning
import torch
from torch import Tensor


class EMA(lightning.Callback):
    """mean <- mean + (1 - d) (parameter - mean) after each optimizer step, with d = min(decay, (1 + n) / (10 + n)).

    Validation and sampling run under the averaged parameters. The average is part of the checkpoint.

    Args:
        decay: d after the warm-up that the formula gives. 0.999 averages over about a thousand steps.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is in [0,1), not {decay}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self._last_step = -1

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        trained = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        if self.average and self.average.keys() != trained.keys():
            raise ValueError("the checkpoint's average is of other parameters than this recipe trains")
        self.average = {
            name: self.average[name].to(p.device) if name in self.average else p.detach().clone()
            for name, p in trained.items()
        }

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._last_step = trainer.global_step  # only now does it count the steps before a resume

    @torch.no_grad()
    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        if trainer.global_step == self._last_step:
            return  # still accumulating gradients
        self._last_step = trainer.global_step
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = dict(pl_module.named_parameters())
        torch._foreach_lerp_(list(self.average.values()), [parameters[n].detach() for n in self.average], 1 - decay)

    @contextmanager
    def averaged(self, module: torch.nn.Module) -> Iterator[None]:
        """Within the block, `module` holds the averaged parameters. Nothing is copied: the storages change places."""
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def _swap(self, module: torch.nn.Module) -> None:
        parameters = dict(module.named_parameters())
        for name, mean in self.average.items():
            parameter = parameters[name]
            self.average[name], parameter.data = parameter.data, mean

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._swap(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._swap(pl_module)

    def on_exception(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        exception: BaseException,  # noqa: ARG002
    ) -> None:
        if trainer.validating or trainer.sanity_checking:
            self._swap(pl_module)

    def state_dict(self) -> dict:
        return {"average": self.average, "updates": self.updates}

    def load_state_dict(self, state_dict: dict) -> None:
        self.average, self.updates = state_dict["average"], state_dict["updates"]
