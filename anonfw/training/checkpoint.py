"""Checkpoints of a run folder: the newest for resuming, written atomically, and never the only copy removed first."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import lightning
from lightning.pytorch.callbacks import Checkpoint


class Checkpoints(Checkpoint):
    """`checkpoints/step=N.ckpt` each `every` optimizer steps and at the end, and `last.ckpt`, the newest of them.

    Lightning's `ModelCheckpoint` writes through /tmp, which is atomic only if that is the same disk; it puts a save on
    an epoch's last batch off until after the next validation; and after a resume it saves again between two batches
    whose gradients are accumulated, which it does not store. What it saves is the same.

    Args:
        folder: the run folder.
        every: optimizer steps between two checkpoints.
        keep: how many to keep.
    """

    def __init__(self, folder: Path, every: int = 200, keep: int = 1) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep are at least 1, not {every} and {keep}")
        self.folder, self.every, self.keep = Path(folder) / "checkpoints", every, keep
        self._saved = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._saved = trainer.global_step
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_by_a_kill in self.folder.glob(".*.partial"):
                left_by_a_kill.unlink()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:  # noqa: ARG002
        if trainer.global_step % self.every == 0:
            self._save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        if trainer.global_step == self._saved:
            return  # saved already, or still accumulating gradients
        self._saved = trainer.global_step
        path = self.folder / f"step={trainer.global_step}.ckpt"
        partial = path.with_name(f".{path.name}.partial")
        trainer.save_checkpoint(partial, weights_only=False)  # on every rank: sharded strategies collect here
        if not trainer.is_global_zero:
            return
        os.replace(partial, path)
        last = self.folder / ".last.ckpt.partial"
        try:
            os.link(path, last)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, last)
        os.replace(last, self.folder / "last.ckpt")
        numbered = sorted(self.folder.glob("step=*.ckpt"), key=lambda file: int(file.stem.removeprefix("step=")))
        for old in numbered[: -self.keep]:
            old.unlink()


# The name in recipes.
checkpoint = Checkpoints
