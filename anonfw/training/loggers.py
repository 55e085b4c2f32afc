"""Where numbers go: a JSON-lines file that always works, and Weights & Biases with one id for one run folder."""

from __future__ import annotations

import json
import secrets
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from anonfw.data.files import atomic


class JsonLines(Logger):
    """Appends one line a step to `metrics.jsonl`. A run that goes back to a checkpoint first drops the lines after it.

    Lightning's `CSVLogger` deletes the file of a run that continues, so this is our own.

    Args:
        folder: the run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.jsonl"

    @property
    def name(self) -> str:
        return "jsonl"

    @property
    def version(self) -> str:
        return self.file.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe lies in the run folder already."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **{name: float(value) for name, value in metrics.items()}}) + "\n")

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Keeps what the first `step` optimizer steps logged (they count from 0); a line cut short by a kill goes."""
        if not self.file.exists():
            return
        kept = []
        for line in self.file.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if entry["step"] is None or entry["step"] < step:
                kept.append(line + "\n")
        with atomic(self.file) as file:
            file.write("".join(kept).encode())


def wandb(
    folder: str | Path, project: str = "anonfw", group: str | None = None, tags: list[str] | None = None
) -> Logger:
    """A `WandbLogger` whose run id is kept in the run folder, so that a continued run is the same W&B run.

    Offline without an account: `WANDB_MODE=offline`, later `wandb sync --yes FOLDER/wandb/offline-run-*`. Steps are
    logged as `trainer/global_step`: never trust W&B's own step across restarts.
    """
    from lightning.pytorch.loggers import WandbLogger

    folder = Path(folder)
    kept = folder / "wandb_id"
    if not kept.exists():
        with atomic(kept) as file:
            file.write(secrets.token_hex(4).encode())
    return WandbLogger(
        name=f"{folder.parent.name}/{folder.name}",
        save_dir=str(folder),
        project=project,
        id=kept.read_text().strip(),
        resume="allow",
        group=group,
        tags=tags,
        job_type="fit",
    )
