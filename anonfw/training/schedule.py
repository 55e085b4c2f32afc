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


class WarmupStableDecay:
    """Linear from 0 to 1 over `warmup` steps, 1, then linear to 0 over the last `decay` of `total` steps.

    Unlike a cosine, the way up to the decay does not depend on `total`: a run can be made longer after it has begun.

    Args:
        total, decay: None for a constant rate after the warm-up.
    Raises:
        ValueError: warm-up and decay do not fit into the whole.
    """

    def __init__(self, warmup: int, total: int | None = None, decay: int | None = None) -> None:
        if (total is None) != (decay is None):
            raise ValueError("give both total and decay, or neither")
        if total is not None and not 0 < decay <= total - warmup:
            raise ValueError(f"warmup {warmup} and decay {decay} must fit into total {total}")
        self.warmup, self.total, self.decay = warmup, total, decay

    def __call__(self, step: int) -> float:
        rise = min((step + 1) / (self.warmup + 1), 1.0)
        if self.total is None:
            return rise
        return min(rise, max((self.total - step) / self.decay, 0.0))
