"""Checkpoints of a run folder: the newest for resuming, written atomically, and never the only copy removed first."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint


def checkpoint(folder: Path, every: int = 200, keep: int = 1) -> ModelCheckpoint:
    """Lightning's `ModelCheckpoint`: `last.ckpt` and the `keep` newest, each `every` optimizer steps.

    Args:
        folder: the run folder.
    """
    return ModelCheckpoint(
        dirpath=folder / "checkpoints",
        filename="{step}",
        every_n_train_steps=every,
        save_top_k=keep,
        monitor="step",
        mode="max",
        save_last=True,
        save_on_train_epoch_end=False,
    )
