"""What every system shares while it trains: EMA, callbacks, logs, run folders, resume."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    # Lazy: `python -m anonfw fit --help` imports this package and must not pull in torch.
    if name in ("build_system", "load_system", "load_weights", "read_weights"):
        from anonfw.training import load

        return getattr(load, name)
    raise AttributeError(name)
