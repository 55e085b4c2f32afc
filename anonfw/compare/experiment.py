"""One run as a comparison sees it, whether it was read from a run folder, W&B's files or W&B's server."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from anonfw.evaluate.intervals import Estimate

IMAGES, SECONDS = "speed/images_per_second", "speed/seconds"  # anonfw.training.throughput


@dataclass
class Experiment:
    """A run's recipe, curves, result and cost.

    Attributes:
        name: recipe's name and folder. place: where it was read from.
        recipe: resolved. begun: content of run.json. finished: of finished.json; empty where the run has not ended.
        curves: metric -> (steps, values), steps ascending.
        table: content of table.json; None where nothing was measured.
    """

    name: str
    place: str
    recipe: Mapping[str, Any]
    curves: dict[str, tuple[np.ndarray, np.ndarray]]
    table: Mapping[str, Any] | None = None
    begun: Mapping[str, Any] = field(default_factory=dict)
    finished: Mapping[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """The class of the recipe's system."""
        return class_of(self.recipe.get("system")) or "unknown"

    @property
    def dataset(self) -> str:
        """What it was trained on, without the folders above."""
        train = (self.recipe.get("data") or {}).get("train") or {}
        return Path(str(train.get("dataset") or self.recipe.get("dataset") or "unknown")).name

    @property
    def steps(self) -> int | None:
        """Optimizer steps: of a finished run as it says, else as far as its log goes."""
        logged = [int(steps[-1]) + 1 for steps, _ in self.curves.values() if len(steps)]
        return self.finished.get("steps") or max(logged, default=None)

    @property
    def state(self) -> str:
        planned = (self.recipe.get("trainer") or {}).get("max_steps")
        if self.finished:
            return "finished"
        return f"unfinished, {self.steps or 0} of {planned} steps" if planned and planned > 0 else "unfinished"

    @property
    def hours(self) -> float | None:
        """Training time times processes. Over all starts of the run, without steps that a kill made it repeat."""
        _, seconds = self.curves.get(SECONDS, ((), np.empty(0)))
        if not len(seconds):
            seconds = np.array([self.finished.get("seconds") or math.nan])
        # The clock begins at 0 with every start: a run that was started twice has two ascents.
        ends = np.append(seconds[1:] < seconds[:-1], True)
        total = float(seconds[ends].sum()) * (self.finished.get("ranks") or 1) / 3600
        return None if math.isnan(total) else total

    @property
    def images_per_second(self) -> float | None:
        """Median over the run."""
        _, values = self.curves.get(IMAGES, ((), ()))
        return float(np.median(values)) if len(values) else None

    @property
    def device(self) -> str:
        """What computed: `CPU`, the name of a GPU, or `device` where the run does not say."""
        return self.finished.get("device") or "device"

    def result(self) -> dict[str, Estimate]:
        """Measure -> estimate of the system's own row, which is the first; empty without a table."""
        return self.row(self.row_names()[0]) if self.row_names() else {}

    def row_names(self) -> list[str]:
        """Rows of the table in its order."""
        return [] if self.table is None else list(self.table.get("order") or self.table["rows"])

    def row(self, name: str) -> dict[str, Estimate]:
        """One row of the table; empty where there is none of that name."""
        cells = {} if self.table is None else self.table["rows"].get(name, {})
        return {measure: _estimate(cell) for measure, cell in cells.items()}


def class_of(node: Any) -> str | None:
    """Last part of a node's `_target_`; None of anything else."""
    target = node.get("_target_") if isinstance(node, Mapping) else None
    return None if target is None else str(target).rpartition(".")[2]


def curves_of(rows: Iterable[tuple[int | None, Mapping[str, Any]]]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Metric -> (steps, values) of (step, metrics) rows: numbers only; of a step that was logged twice, the later."""
    found: dict[str, dict[int, float]] = {}
    for step, metrics in rows:
        for name, value in metrics.items():
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if step is not None and number and not name.startswith("_"):
                found.setdefault(name, {})[int(step)] = float(value)
    ordered = {name: sorted(points.items()) for name, points in found.items()}
    return {
        name: (np.array([step for step, _ in points]), np.array([value for _, value in points]))
        for name, points in ordered.items()
    }


def _estimate(cell: Mapping[str, Any]) -> Estimate:
    value, low, high = (math.nan if cell.get(key) is None else cell[key] for key in ("value", "low", "high"))
    return Estimate(value, low, high, cell.get("n", 0), cell.get("people", 0), cell.get("method", "constant"))
