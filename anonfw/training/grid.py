"""Pictures of the same people again and again, so that a person can see what training does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import lightning

from anonfw.data.files import atomic
from anonfw.training.ema import EMA


class SampleGrid(lightning.Callback):
    """`grid/step-N.png`: original, self-reconstruction and three anonymizations of the first people of a loader.

    Args:
        folder: the run folder.
        loader: partial `FaceLoader` of the photographs (an unshuffled pass).
        rows: people. every: optimizer steps between two grids.
    """

    def __init__(self, folder: Path, loader: Callable, rows: int = 6, every: int = 1000) -> None:
        self.folder, self.loader, self.rows, self.every = folder / "grid", loader, rows, every
        self.batch = None
        self._last = -1

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: object) -> None:
        step = trainer.global_step
        if step == self._last or step % self.every or not trainer.is_global_zero:
            return
        self._last = step
        from anonfw.evaluate.grid import sample_grid

        if self.batch is None:
            self.batch = self._first_people()
        average = next((c for c in trainer.callbacks if isinstance(c, EMA)), None)
        pl_module.eval()
        with average.averaged(pl_module) if average else nullcontext():
            png = sample_grid(pl_module, self.batch.to(pl_module.device))
        pl_module.train()
        self.folder.mkdir(exist_ok=True)
        with atomic(self.folder / f"step-{step:07d}.png") as file:
            file.write(png)
        for logger in trainer.loggers:
            if hasattr(logger, "log_image"):
                logger.log_image("grid", [str(self.folder / f"step-{step:07d}.png")], step=step)

    def _first_people(self):
        from anonfw.evaluate.evaluation import first_of_each_person

        loader = self.loader(rank=0, world=1, shuffle=False, bad_samples_file=self.folder.parent / "bad_samples.jsonl")
        try:
            batch = next(iter(loader))
        finally:
            loader.close()
        return batch.select(first_of_each_person(batch, self.rows))
