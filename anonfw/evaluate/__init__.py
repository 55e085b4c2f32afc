"""Measurement of anonymizers: the result table, its protocols, reference rows and the sample grid.

Names are looked up on first use, so that the command line's help does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anonfw.evaluate.drift import DriftEvaluation
    from anonfw.evaluate.evaluation import Evaluation, evaluate_system
    from anonfw.evaluate.grid import contact_sheet, sample_grid
    from anonfw.evaluate.intervals import Estimate
    from anonfw.evaluate.mapping import MappingEvaluation
    from anonfw.evaluate.report import Report
    from anonfw.evaluate.scorers import JudgeError, Scorers

_HOME = {
    "DriftEvaluation": "drift",
    "Estimate": "intervals",
    "Evaluation": "evaluation",
    "JudgeError": "scorers",
    "MappingEvaluation": "mapping",
    "Report": "report",
    "Scorers": "scorers",
    "contact_sheet": "grid",
    "evaluate_system": "evaluation",
    "sample_grid": "grid",
}

__all__ = [
    "DriftEvaluation",
    "Estimate",
    "Evaluation",
    "JudgeError",
    "MappingEvaluation",
    "Report",
    "Scorers",
    "contact_sheet",
    "evaluate_system",
    "sample_grid",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
