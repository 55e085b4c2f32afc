"""Pictures of the same people again and again, so that a person can see what training does."""

from __future__ import annotations

from pathlib import Path

import lightning

from anonfw.batch import FaceBatch
from anonfw.data.files import atomic


class SampleGrid(lightning.Callback):
    """`grid/step-N.png`: original, own identity and three anonymizations of people of the first validation batch.

    Drawn while Lightning validates, that is, with averaged parameters where the run averages.

    Args:
        folder: the run folder.
        rows: people at most. every: validations between two grids.
    """

    def __init__(self, folder: Path, rows: int = 6, every: int = 1) -> None:
        self.folder, self.rows, self.every = folder / "grid", rows, every
        self.validations = 0

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,  # noqa: ARG002 Lightning's signature
        batch: FaceBatch,
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        together = hasattr(trainer.strategy, "shard")  # each rank holds a part of the network: all of them draw
        if batch_idx or trainer.sanity_checking or not (trainer.is_global_zero or together):
            return
        self.validations += 1
        if self.validations % self.every:
            return
        from anonfw.evaluate.evaluation import first_of_each_person
        from anonfw.evaluate.grid import sample_grid

        people = batch.to("cpu").select(first_of_each_person(batch.to("cpu"), self.rows))
        if together:
            people = trainer.strategy.broadcast(people)
        drawn = sample_grid(pl_module, people)
        if not trainer.is_global_zero:
            return
        keep_grid(trainer, self.folder, drawn)

    def state_dict(self) -> dict:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict) -> None:
        self.validations = state_dict["validations"]


def keep_grid(trainer: lightning.Trainer, folder: Path, png: bytes) -> None:
    """Writes this step's picture into `folder` and hands it to the loggers that take pictures."""
    folder.mkdir(exist_ok=True)
    picture = folder / f"step-{trainer.global_step:07d}.png"
    with atomic(picture) as file:
        file.write(png)
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image("grid", [str(picture)], step=trainer.global_step)
