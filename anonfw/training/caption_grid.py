"""Pictures that a text-to-image system draws of the same captions again and again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import lightning
import torch

from anonfw.training.grid import keep_grid


class CaptionGrid(lightning.Callback):
    """`grid/step-N.png`: a column for each caption, a row for each start of noise; drawn after each validation.

    With averaged parameters, where the run averages.

    Args:
        folder: the run folder.
        captions: of the columns. rows: pictures of each. every: validations between two grids.
    """

    def __init__(self, folder: Path, captions: Sequence[str], rows: int = 3, every: int = 1) -> None:
        self.folder, self.captions, self.rows, self.every = folder / "grid", list(captions), rows, every
        self.validations = 0

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: object,  # noqa: ARG002 Lightning's signature
        batch: object,  # noqa: ARG002
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        together = hasattr(trainer.strategy, "shard")  # each rank holds a part of the network: all of them draw
        if batch_idx or trainer.sanity_checking or not (trainer.is_global_zero or together):
            return
        self.validations += 1
        if self.validations % self.every:
            return
        from anonfw.evaluate.grid import contact_sheet

        rows = [pl_module.generate(self.captions, draw).float().cpu() for draw in range(self.rows)]
        if not trainer.is_global_zero:
            return
        columns = {caption: torch.stack([row[i] for row in rows]) for i, caption in enumerate(self.captions)}
        keep_grid(trainer, self.folder, contact_sheet(columns, zoom=1))

    def state_dict(self) -> dict:
        return {"validations": self.validations}

    def load_state_dict(self, state_dict: dict) -> None:
        self.validations = state_dict["validations"]
