"""Where numbers go: a JSON-lines file that always works, and Weights & Biases with one id for one run folder."""

from __future__ import annotations

import json
import secrets
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from anonfw.data.files import atomic, json_lines
from anonfw.dialect import parse
from anonfw.wandb_files import STEP, find_files, read_runs


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
        if self.file.exists():
            kept = [entry for entry in json_lines(self.file) if entry["step"] is None or entry["step"] < step]
            with atomic(self.file) as file:
                file.write("".join(json.dumps(entry) + "\n" for entry in kept).encode())


class Wandb(WandbLogger):
    """Weights & Biases: one run folder is one W&B run, with the rows of `metrics.jsonl`, each of them once.

    Lightning's logger does the work. Ours adds what a killed run needs: the run's id is kept in the run folder, what
    W&B's server or the folder's W&B files hold already (a process that was killed got further than its last checkpoint)
    is not logged again, and what they lack (wandb writes behind) is taken from `metrics.jsonl`. So W&B's rows and steps
    continue where they ended. That holds offline, too: `WANDB_MODE=offline`, and where there is a network
    `wandb sync --yes FOLDER/wandb/offline-run-*`. The axis is `trainer/global_step`; W&B's own step counts rows.

    The config is the resolved recipe, with run.json under `anonfw`; the result table and finished.json end up in the
    summary as `result` and `finished`, where `python -m anonfw compare --project` finds them.

    Args:
        folder: the run folder, with recipe.yaml and run.json.
        project: of W&B.
        group: the recipe's name where none is given.
        tags: beside the class of the system and the name of the data set.
    """

    def __init__(
        self, folder: str | Path, project: str = "anonfw", group: str | None = None, tags: Sequence[str] = ()
    ) -> None:
        self.folder = Path(folder)
        recipe, begun = parse((self.folder / "recipe.yaml").read_text())[0], _read(self.folder / "run.json")
        super().__init__(
            name=f"{begun['name']}/{self.folder.name}",
            save_dir=str(self.folder),
            project=project,
            id=self._kept_id(),
            group=group or begun["name"],
            tags=list(dict.fromkeys([*_tags(recipe), *tags])),
            job_type="fit",
            config={**recipe, "anonfw": begun},
        )
        self._wandb_init.pop("anonymous", None)  # Lightning hands it on, and wandb warns of it
        self._logged: dict[str, int] = {}  # metric -> last step that W&B's files have
        self._sent = -1  # last step that the server has
        self._rows = 0

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        known = {name: max(self._sent, self._logged.get(name, -1)) for name in metrics}
        fresh = {name: value for name, value in metrics.items() if step is None or step > known[name]}
        if fresh:
            row = fresh if step is None else {**fresh, STEP: step}
            # An offline process does not know of those before it, and would count its rows from 0.
            self.experiment.log(row, step=max(self.experiment.step, self._rows), commit=True)

    @rank_zero_only
    def rewind(self, step: int) -> None:
        """Before training continues after `step` optimizer steps: finds out what W&B has, and logs what it lacks."""
        if self.experiment.resumed:  # online; an offline process knows of none before it
            self._sent = self.experiment.summary.get(STEP, -1)
        for run in read_runs(find_files(self.folder)):
            if run.id != self._id:
                continue
            for row in run.rows:
                self._rows = max(self._rows, row["_step"] + 1)
                for name in row if STEP in row else ():
                    self._logged[name] = max(self._logged.get(name, -1), row[STEP])
        for entry in json_lines(self.folder / "metrics.jsonl"):
            if (at := entry.pop("step")) is not None and at < step:
                self.log_metrics(entry, at)

    @rank_zero_only
    def conclude(self) -> None:
        """After the run: its result table and what it took, and the end of the W&B run."""
        for name, file in (("result", "table.json"), ("finished", "finished.json")):
            if (self.folder / file).exists():
                self.experiment.summary[name] = _read(self.folder / file)
        self.experiment.finish()

    def _kept_id(self) -> str | None:
        """Eight letters in `wandb_id`. Only rank 0 has a W&B run."""
        kept = self.folder / "wandb_id"
        if rank_zero_only.rank == 0 and not kept.exists():
            with atomic(kept) as file:
                file.write(secrets.token_hex(4).encode())
        return kept.read_text().strip() if kept.exists() else None


# The name in recipes.
wandb = Wandb


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


def _tags(recipe: Mapping[str, Any]) -> list[str]:
    """The class of the system and the name of the training set, in the 64 characters that W&B allows."""
    dataset = recipe.get("data", {}).get("train", {}).get("dataset") or recipe.get("dataset") or "no data set"
    return [text[-64:] for text in (recipe["system"]["_target_"].rpartition(".")[2], Path(str(dataset)).name)]
