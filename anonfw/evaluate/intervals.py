"""95 % intervals of rates and means when the independent unit is a person, not a photo.

A person's photos, pairs and draws share one face, so they hit or miss together. All intervals here therefore treat the
person as the sampled unit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

LEVEL = 0.95
FEW_PEOPLE = 5  # a bootstrap over fewer people, or a rate that fewer people decide, is too narrow


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Attributes:
        value, low, high: estimate and the ends of its 95 % interval. All NaN where nothing could be measured; the ends
            alone are NaN where fewer than FEW_PEOPLE people give no idea of the spread.
        n: measurements behind it (pairs, queries, outputs).
        people: independent units behind it.
        method: "bootstrap", "clopper-pearson", or "constant" where no interval applies.
    """

    value: float
    low: float
    high: float
    n: int
    people: int
    method: str

    def __post_init__(self) -> None:
        if self.low > self.value or self.high < self.value:
            raise ValueError(f"an interval must hold its estimate: {asdict(self)}")

    @staticmethod
    def missing(method: str = "constant") -> Estimate:
        """Nothing was measured."""
        return Estimate(float("nan"), float("nan"), float("nan"), 0, 0, method)


def clopper_pearson(hits: float, n: float, level: float = LEVEL) -> tuple[float, float]:
    """Exact two-sided binomial interval (Clopper and Pearson 1934), by beta quantiles; `hits` may be a fraction.

    Zero hits of n: [0, 1 - (alpha/2)^(1/n)], about 3.7 / n at 95 %.
    """
    from scipy.special import betaincinv

    if not 0 <= hits <= n or n <= 0:
        raise ValueError(f"{hits} hits of {n} is no proportion")
    tail = (1 - level) / 2
    low = 0.0 if hits <= 0 else float(betaincinv(hits, n - hits + 1, tail))
    high = 1.0 if hits >= n else float(betaincinv(hits + 1, n - hits, 1 - tail))
    return low, high


def _per_person(values: ArrayLike, person: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count of the finite values of each person that has any."""
    values, person = np.asarray(values, np.float64), np.asarray(person)
    if values.shape != person.shape:
        raise ValueError(f"{values.shape} values and {person.shape} people: one person per value is needed")
    finite = np.isfinite(values)
    _, code = np.unique(person[finite], return_inverse=True)
    return np.bincount(code, values[finite]), np.bincount(code).astype(np.float64)


def mean_interval(
    values: ArrayLike, person: ArrayLike, seed: int = 0, replicates: int = 2000, level: float = LEVEL
) -> Estimate:
    """Mean of all finite values with a percentile interval from resampling people with replacement.

    NaN values are left out (they are measurements that could not be made); `n` says how many were used.
    """
    total, count = _per_person(values, person)
    if not len(total):
        return Estimate.missing("bootstrap")
    value = float(total.sum() / count.sum())
    people = len(total)
    if people < FEW_PEOPLE:
        return Estimate(value, float("nan"), float("nan"), int(count.sum()), people, "bootstrap")
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(people, np.full(people, 1 / people), size=replicates).astype(np.float64)
    means = (weights @ total) / (weights @ count)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(value, min(float(low), value), max(float(high), value), int(count.sum()), people, "bootstrap")


def rate_interval(
    hits: ArrayLike, person: ArrayLike, seed: int = 0, replicates: int = 2000, level: float = LEVEL
) -> Estimate:
    """Share of hits (values 0 or 1, NaN left out) with an interval over people.

    Percentile bootstrap over people where at least FEW_PEOPLE people have a hit and as many have a miss. Otherwise the
    bootstrap collapses (no hit at all gives [0,0]), and the interval is Clopper-Pearson with the person as the unit:
    n = people, hits = rate x people. So no hit among 120 people gives [0, 0.030], however many pairs were compared:
    that many people cannot rule out that 3 in 100 leak always.
    """
    total, count = _per_person(hits, person)
    if not len(total):
        return Estimate.missing("clopper-pearson")
    if min((total > 0).sum(), (total < count).sum()) >= FEW_PEOPLE:
        return mean_interval(hits, person, seed, replicates, level)
    people = len(total)
    value = float(total.sum() / count.sum())
    low, high = clopper_pearson(min(value * people, people), people, level)
    return Estimate(value, min(low, value), max(high, value), int(count.sum()), people, "clopper-pearson")
