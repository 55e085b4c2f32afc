"""Notes the signals that ask a run to stop, from its first moment on. Nothing heavy is imported here."""

from __future__ import annotations

import signal
import threading
from types import FrameType

received = 0  # the last one's number; signal handlers belong to the process, and so does this


def listen(*numbers: signal.Signals) -> dict[signal.Signals, object]:
    """Notes these signals instead of what they did before, which it returns. In other threads it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, _note) for number in numbers}


def restore(before: dict[signal.Signals, object]) -> None:
    """Takes back what `listen` did."""
    for number, handler in before.items():
        signal.signal(number, handler)


def forget() -> None:
    global received
    received = 0


def _note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    global received
    received = number
