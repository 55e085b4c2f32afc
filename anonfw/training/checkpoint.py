"""Checkpoints of a run folder: when they are saved, how many stay, and which weights were the best."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from anonfw.data.files import write_json
from anonfw.errors import AnonfwError
from anonfw.training import runs, storage


class CheckpointError(AnonfwError):
    """A checkpoint could not be written. The ones before it are untouched."""


class Checkpoints(Checkpoint):
    """`checkpoints/step=N.ckpt` each `every` optimizer steps and at the end; `last.ckpt` is a link to the newest.

    A checkpoint is written under another name when its step ends, and gets its own when the step's row of metrics and
    its validation are done, too: a resumed run repeats neither and misses neither.

    Lightning's `ModelCheckpoint` writes through /tmp, which is atomic only if that is the same disk; it puts a save on
    an epoch's last batch off until after the next validation; and after a resume it saves again between two batches
    whose gradients are accumulated, which it does not store. What it saves is the same.

    Args:
        folder: the run folder.
        every: optimizer steps between two checkpoints.
        keep: how many to keep. With two, a damaged last one costs `every` steps.
        best: a logged metric of the validation; the weights that it was best with (averaged, where the run averages)
            become `checkpoints/best.safetensors`, with the value in best.json.
        mode: whether the lowest or the highest is the best.
    """

    def __init__(
        self,
        folder: Path,
        every: int = 200,
        keep: int = 2,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every and keep are at least 1, not {every} and {keep}")
        self.folder, self.every, self.keep, self.best, self.mode = Path(folder) / "checkpoints", every, keep, best, mode
        self._saved = 0
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._best_value: float | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self._saved, self._pending, self._best_value = trainer.global_step, None, None
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_by_a_kill in self.folder.glob(".*.partial"):
                storage.remove(left_by_a_kill)
        record = self.folder / "best.json"
        if self.best and record.exists():
            found = json.loads(record.read_text())
            if found["metric"] == self.best and found["step"] <= trainer.global_step:
                self._best_value = found["value"]

    def on_train_batch_start(self, trainer: lightning.Trainer, *_: object) -> None:
        self.commit(trainer)

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:  # noqa: ARG002
        if trainer.global_step % self.every == 0:
            self.save(trainer)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:  # noqa: ARG002
        self.commit(trainer)
        self.save(trainer)
        self.commit(trainer)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Still under the averaged weights."""
        if self.best is None or trainer.sanity_checking:
            return
        if self.best not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise AnonfwError(f"callbacks.checkpoint.best: no metric {self.best!r} is logged; validation logs {known}")
        value = float(trainer.callback_metrics[self.best])
        sign = 1 if self.mode == "min" else -1
        if self._best_value is not None and sign * value >= sign * self._best_value:
            return
        self._best_value = value
        weights = self.folder / "best.safetensors"
        self._together(
            trainer,
            storage.attempt(lambda: storage.write_weights(pl_module.trained_state(), weights, trainer.is_global_zero)),
        )
        if trainer.is_global_zero:
            write_json(self.folder / "best.json", {"metric": self.best, "value": value, "step": trainer.global_step})

    def save(self, trainer: lightning.Trainer) -> None:
        """Writes this step's checkpoint; `commit` gives it its name. Every rank calls both.

        Raises:
            CheckpointError: on every rank, where one of them could not write.
        """
        if trainer.global_step == self._saved:
            return  # saved already, or still accumulating gradients
        self._saved = trainer.global_step
        partial = self._partial(self._saved)
        trainer.save_checkpoint(partial, weights_only=False)
        failure = getattr(trainer.strategy.checkpoint_io, "failure", None)
        files: dict[str, Any] = {}
        if failure is None:
            failure = storage.attempt(lambda: files.update(storage.hashes(partial, trainer.global_rank)))
        self._pending = self._saved, self._together(trainer, failure, files)

    def commit(self, trainer: lightning.Trainer) -> None:
        """Gives a checkpoint that `save` has written its name, and removes what is older than the newest `keep`."""
        if self._pending is None:
            return
        (step, files), self._pending = self._pending, None
        if trainer.is_global_zero:
            failure = storage.attempt(lambda: self._publish(step, files))
            if failure is not None:
                raise CheckpointError(self._complaint(failure))

    def _publish(self, step: int, files: dict[str, Any]) -> None:
        path = self.folder / f"step={step}.ckpt"
        storage.write_manifest(path, step, files)
        if path.is_dir():  # of a run that was resumed from an earlier step; a folder is not replaced by renaming
            storage.remove(path)
        os.replace(self._partial(step), path)
        link = self.folder / ".last.ckpt.partial"
        link.unlink(missing_ok=True)
        os.symlink(path.name, link)
        os.replace(link, self.folder / "last.ckpt")
        # A later one is damaged, and left behind by a resume from the one before it.
        there = [number for number, _ in runs.numbered(self.folder.parent) if number <= step]
        for number in there[: -self.keep]:
            old, going = self.folder / f"step={number}.ckpt", self._partial(number)
            os.replace(old, going)
            storage.manifest_of(old).unlink(missing_ok=True)
            storage.remove(going)

    def _partial(self, step: int) -> Path:
        return self.folder / f".step={step}.ckpt.partial"

    def _together(self, trainer: lightning.Trainer, failure: str | None, files: dict | None = None) -> dict[str, Any]:
        """The files of all ranks; if one of them failed, all of them stop here, and nobody waits for it."""
        answers = [(failure, files or {})]
        if trainer.world_size > 1:
            answers = [None] * trainer.world_size
            torch.distributed.all_gather_object(answers, (failure, files or {}))
        failures = [f"rank {rank}: {reason}" for rank, (reason, _) in enumerate(answers) if reason is not None]
        if failures:
            if trainer.is_global_zero:
                storage.attempt(lambda: storage.remove(self._partial(trainer.global_step)))
            raise CheckpointError(self._complaint("; ".join(failures)))
        return {name: facts for _, found in answers for name, facts in found.items()}

    def _complaint(self, failure: str) -> str:
        return (
            f"a checkpoint could not be written to {self.folder} ({failure}). The ones before it are untouched: make "
            "room there, and the same command continues from the last"
        )


# The name in recipes.
checkpoint = Checkpoints
