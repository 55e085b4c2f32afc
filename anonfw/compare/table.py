"""The table of a comparison: each run's own row, with the rows that all of them are read against."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anonfw.compare.differences import differences
from anonfw.compare.experiment import Experiment
from anonfw.evaluate.report import Column, Table

REFERENCES = ("box", "random_other")  # the floor of a system that keeps the surroundings, and no utility at all
MEASURED = ("judge", "people", "photos", "draws", "gallery", "thresholds", "bank")  # tables that differ here differ


@dataclass
class Comparison(Table):
    """Runs side by side.

    Attributes:
        titles: title and columns of each block of measures.
        runs: facts of each run by column of the list: letter, name, system, state, cost, commit ...
        recipe: dotted key -> value in each run, where they differ.
        notes: what keeps the rows from being comparable.
    """

    titles: list[tuple[str, list[Column]]]
    runs: list[dict[str, str]]
    recipe: dict[str, list[str]]
    notes: list[str]

    def blocks(self) -> list[tuple[str, list[Column]]]:
        return self.titles

    def facts(self) -> list[str]:
        """Who the rows are, what they cost and where their recipes differ."""
        letters = [run["letter"] for run in self.runs]
        lines = [
            f"{run['letter']}: " + ", ".join(v for k, v in run.items() if k != "letter" and v) for run in self.runs
        ]
        for key, values in self.recipe.items():
            lines.append(f"{key}: " + ", ".join(f"{a} {v}" for a, v in zip(letters, values, strict=True) if v))
        return lines + self.notes


def compare(experiments: Sequence[Experiment]) -> Comparison:
    """The table of these runs, in their order."""
    recipe = differences([experiment.recipe for experiment in experiments])
    labels = labels_of(experiments, recipe)
    rows = {label: experiment.result() for label, experiment in zip(labels, experiments, strict=True)}
    measured = [experiment for experiment in experiments if experiment.table is not None]
    for name in REFERENCES:
        row = next((experiment.row(name) for experiment in measured if experiment.row(name)), None)
        if row is not None and name not in rows:
            rows[name] = row
    runs = [{"letter": letter(number), **facts_of(experiment)} for number, experiment in enumerate(experiments)]
    return Comparison(rows, titles_of(measured), runs, recipe, notes_of(experiments))


def letter(number: int) -> str:
    """A to Z, then AA, AB, ..."""
    head, last = divmod(number, 26)
    return (letter(head - 1) if head else "") + string.ascii_uppercase[last]


def labels_of(experiments: Sequence[Experiment], recipe: Mapping[str, Sequence[str]], most: int = 32) -> list[str]:
    """A letter, and the fewest values that tell the runs apart; their names where three values do not, or are long."""
    told: list[str] = []
    labels = [""] * len(experiments)
    for key in sorted(recipe, key=lambda key: -len(set(recipe[key])))[:3]:
        if len(set(labels)) < len(labels):
            told.append(key)
            own = [[(k.rpartition(".")[2], recipe[k][n]) for k in told] for n in range(len(labels))]
            labels = [", ".join(f"{name}={value}" for name, value in pairs if value) for pairs in own]
    if not all(labels) or len(set(labels)) < len(labels) or max(map(len, labels)) > most:
        labels = [experiment.name for experiment in experiments]
    cut = [label if len(label) <= most else "…" + label[1 - most :] for label in labels]
    return [f"{letter(number)} {label}" for number, label in enumerate(cut)]


def facts_of(experiment: Experiment) -> dict[str, str]:
    """A run in words; an empty text where something is not known."""
    steps, hours, images = experiment.steps, experiment.hours, experiment.images_per_second
    commit = experiment.begun.get("commit") or ""
    return {
        "name": experiment.name,
        "system": experiment.system,
        "data set": experiment.dataset,
        "state": experiment.state,
        "steps": "" if steps is None else f"{steps} steps",
        "cost": "" if hours is None else _hours(hours, experiment.device),
        "speed": "" if images is None else f"{images:.1f} images/s",
        "commit": commit[:8] + ("+" if commit.endswith("+") else ""),
        "place": experiment.place,
    }


def titles_of(experiments: Sequence[Experiment]) -> list[tuple[str, list[Column]]]:
    """Every column of every table under the title of its block. A table that does not name its columns shows all."""
    titles: dict[str, dict[str, Column]] = {}
    for experiment in experiments:
        blocks = experiment.table.get("blocks")
        if blocks is None:
            blocks = [{"title": "Measures", "columns": [_plain_column(key) for key in experiment.result()]}]
        for block in blocks:
            columns = titles.setdefault(block["title"], {})
            for column in block["columns"]:
                columns.setdefault(column["key"], Column(**{**column, "heading": tuple(column["heading"])}))
    return [(title, list(columns.values())) for title, columns in titles.items()]


def notes_of(experiments: Sequence[Experiment]) -> list[str]:
    """What a reader must know before comparing rows."""
    notes = []
    lettered = [(letter(number), experiment) for number, experiment in enumerate(experiments)]
    if missing := [name for name, experiment in lettered if experiment.table is None]:
        notes.append(f"no result table: {', '.join(missing)} (`python -m anonfw validate RUN` makes one)")
    kinds: dict[str, dict[str, list[str]]] = {}  # first measure -> how it was measured -> runs
    for name, experiment in lettered:
        if experiment.table is not None:
            ways = kinds.setdefault(next(iter(experiment.result()), ""), {})
            ways.setdefault(_measured(experiment.table), []).append(name)
    for ways in kinds.values():
        if len(ways) > 1:
            parts = "; ".join(f"{', '.join(names)}: {way}" for way, names in ways.items())
            notes.append(f"measured in different ways, so the rows differ by that, too: {parts}")
    return notes


def _hours(hours: float, device: str) -> str:
    return f"{60 * hours:.1f} {device} minutes" if hours < 1 else f"{hours:.1f} {device} hours"


def _measured(table: Mapping[str, Any]) -> str:
    """What was measured with what: equal for tables whose rows may be compared."""
    words = []
    for key in MEASURED:
        value = table.get(key)
        if key == "judge" and value:
            words.append(f"judge {value['name']}")
        elif key == "thresholds" and isinstance(value, list):
            words.append("cosine > " + " / ".join(f"{threshold['value']:.4f}" for threshold in value))
        elif isinstance(value, int):
            words.append(f"{value} {key}")
    return ", ".join(words) or "not said"


def _plain_column(key: str) -> dict[str, Any]:
    return {"key": key, "heading": (key, ""), "decimals": 3, "end_decimals": 3}


def known(value: float | None) -> bool:
    """Not None, not NaN."""
    return value is not None and not math.isnan(value)
