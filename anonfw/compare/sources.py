"""Where the runs of a comparison come from: run folders, W&B's files on this disk, W&B's server."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anonfw.compare.experiment import Experiment, curves_of
from anonfw.data.files import json_lines
from anonfw.dialect import DialectError, parse
from anonfw.errors import AnonfwError
from anonfw.wandb_files import STEP, StoredRun, find_files, read_runs


def find(words: Sequence[str], project: str | None = None) -> list[Experiment]:
    """Each run once, in the order of the words.

    Args:
        words: a run folder, a folder of run folders, a table's folder inside a run (`RUN/validate`), a pattern, a
            `wandb` folder or file; with `project` also the id, name or group of runs on W&B's server, and without it
            `entity/project/id` or the address of a run's page.
        project: `entity/project`, or `project` of the default entity.
    Raises:
        AnonfwError: a word that means no run.
    """
    from anonfw.compare import server

    found: dict[str, Experiment] = {}
    for word in words:
        experiments = _on_disk(word)
        if not experiments and (place := server.address(word, project)):
            experiments = server.read(*place)
        if not experiments:
            where = f"nor in W&B's {project}" if project else "and no --project says where on W&B to look"
            raise AnonfwError(
                f"no run at {word}: no run folder, no folder or pattern of them, no wandb folder, {where}"
            )
        found |= {experiment.place: experiment for experiment in experiments if experiment.place not in found}
    return list(found.values())


def from_folder(folder: Path, table: Path | None = None) -> Experiment:
    """A run folder or an export.

    Args:
        table: folder of the result table, if not the run's own (which is that of its end, else of its last `validate`).
    """
    try:
        recipe, _ = parse((folder / "recipe.yaml").read_text(encoding="utf-8"))
    except (DialectError, UnicodeDecodeError) as error:
        raise AnonfwError(f"{folder / 'recipe.yaml'} is no recipe: {error}") from error
    exported = _json(folder / "export.json") or {}
    begun, finished = _json(folder / "run.json") or exported, _json(folder / "finished.json") or exported
    tables = [table] if table else [folder, folder / "validate"]
    lines = json_lines(folder / "metrics.jsonl")
    name = f"{begun.get('name') or folder.parent.name}/{folder.name}"
    return Experiment(
        name=name if table is None else f"{name} ({table.name})",
        place=str(table or folder),
        recipe=recipe,
        curves=curves_of((line.get("step"), line) for line in lines),
        table=next((content for place in tables if (content := _json(place / "table.json"))), None),
        begun=begun,
        finished=finished,
    )


def from_wandb(run: StoredRun, place: str) -> Experiment:
    """What `anonfw.training.loggers.Wandb` gave to W&B."""
    config = dict(run.config)
    return Experiment(
        name=run.name or run.id,
        place=place,
        begun=config.pop("anonfw", {}),
        recipe=config,
        curves=curves_of((row.get(STEP), row) for row in run.rows),
        table=run.summary.get("result"),
        finished=run.summary.get("finished", {}),
    )


def _on_disk(word: str) -> list[Experiment]:
    """[] where the word is no place on this disk, or no run is there."""
    places = [Path(word)] if Path(word).exists() else sorted(map(Path, glob.glob(word, recursive=True)))
    return [experiment for place in places for experiment in _at(place)]


def _at(place: Path) -> list[Experiment]:
    if (place / "recipe.yaml").exists():
        return [from_folder(place)]
    above = next((folder for folder in place.parents if (folder / "recipe.yaml").exists()), None)
    if above and (place / "table.json").exists():
        return [from_folder(above, table=place)]
    if files := find_files(place):
        return [from_wandb(run, f"{place}: {run.id}") for run in read_runs(files)]
    below = sorted(recipe.parent for recipe in place.glob("*/recipe.yaml")) if place.is_dir() else []
    return [from_folder(folder) for folder in below]


def _json(file: Path) -> Any:
    """None where there is no such file."""
    try:
        return json.loads(file.read_text()) if file.exists() else None
    except json.JSONDecodeError as error:
        raise AnonfwError(f"{file} is damaged: {error}") from error
