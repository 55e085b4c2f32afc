"""How fast a run is, and whether it waits for its data."""

from __future__ import annotations

import time

import lightning

from anonfw.batch import FaceBatch


class Throughput(lightning.Callback):
    """Logs `speed/images_per_second` (all ranks), `speed/data_wait` (share of wall time spent waiting for a batch) and
    `speed/seconds` (wall time since this process began to train).

    Args:
        every: batches between two measurements.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = every
        self._ended = self._opened = self._begun = 0.0
        self._waited, self._images, self._batches = 0.0, 0, 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        if not self._opened:
            self._opened = self._ended = self._begun = time.perf_counter()

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._restart()

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._restart()

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:  # noqa: ARG002
        self._waited += time.perf_counter() - self._ended

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,  # noqa: ARG002
        batch: FaceBatch,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        self._ended = time.perf_counter()
        self._images += len(batch) * (1 if batch.partner is None else 2)
        self._batches += 1
        if self._batches < self.every:
            return
        seconds = self._ended - self._opened
        pl_module.log("speed/images_per_second", self._images * trainer.world_size / seconds, prog_bar=True)
        pl_module.log("speed/data_wait", self._waited / seconds)
        pl_module.log("speed/seconds", self._ended - self._begun)
        self._restart()

    def _restart(self) -> None:
        self._opened = self._ended = time.perf_counter()
        self._waited, self._images, self._batches = 0.0, 0, 0
