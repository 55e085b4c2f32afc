"""Learning-rate schedules: step number -> factor."""

from __future__ import annotations

import math


class WarmupCosine:
    """Linear from 0 to 1 over `warmup` steps, then half a cosine down to `floor` at step `total`.

    Raises:
        ValueError: a warm-up that is not shorter than the whole.
    """

    def __init__(self, warmup: int, total: int, floor: float = 0.0) -> None:
        if not 0 <= warmup < total:
            raise ValueError(f"warmup {warmup} must be in [0, total) with total {total}")
        self.warmup, self.total, self.floor = warmup, total, floor

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        done = min((step - self.warmup) / (self.total - self.warmup), 1.0)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


class WarmupConstant:
    """Linear from 0 to 1 over `warmup` steps, then 1."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup

    def __call__(self, step: int) -> float:
        return min((step + 1) / (self.warmup + 1), 1.0)
