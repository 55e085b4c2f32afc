"""Data sets on disk and the one loader of every system. The format is written down in `data/SCHEMA.md`.

Names are looked up on first use: a decoding worker process imports this package and must not load torch for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anonfw.data.card import Card, DataError
    from anonfw.data.embeddings import load_embeddings
    from anonfw.data.loader import FaceLoader
    from anonfw.data.sidecars import write_sidecars
    from anonfw.data.verify import verify_dataset
    from anonfw.data.writer import DatasetWriter, Sample

_HOME = {
    "Card": "card",
    "DataError": "card",
    "DatasetWriter": "writer",
    "FaceLoader": "loader",
    "Sample": "writer",
    "load_embeddings": "embeddings",
    "verify_dataset": "verify",
    "write_sidecars": "sidecars",
}

__all__ = [
    "Card",
    "DataError",
    "DatasetWriter",
    "FaceLoader",
    "Sample",
    "load_embeddings",
    "verify_dataset",
    "write_sidecars",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
