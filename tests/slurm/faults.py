"""Callbacks with which a recipe of these tests holds, or breaks, a rank at a chosen batch."""

from __future__ import annotations

import os
import time
from pathlib import Path

import lightning

from anonfw.training import signals

PATIENCE = 1200


class Hold(lightning.Callback):
    """Every rank waits before batch `batch` (counted over the whole run) while FOLDER.hold exists; says so in
    FOLDER.held-RANK. With `for_signal` it goes on when a signal has arrived, too.
    """

    def __init__(self, folder: Path, batch: int, for_signal: bool = False) -> None:
        self.folder, self.batch, self.for_signal = folder, batch, for_signal

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.fit_loop.total_batch_idx < self.batch:
            return
        until = time.monotonic() + PATIENCE
        while Path(f"{self.folder}.hold").exists() and not (self.for_signal and signals.received):
            Path(f"{self.folder}.held-{trainer.global_rank}").touch()
            assert time.monotonic() < until, "nobody let this process go on"
            time.sleep(0.05)


class Crash(lightning.Callback):
    """Rank `rank` ends without a word before batch `batch`."""

    def __init__(self, rank: int, batch: int) -> None:
        self.rank, self.batch = rank, batch

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.fit_loop.total_batch_idx >= self.batch:
            os._exit(7)
