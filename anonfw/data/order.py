"""Which sample stands where: pure functions of (seed, epoch, position in the global sequence), of nothing else.

Positions count what the world reads together. Rank r of W takes the positions p + r, p + r + W, ... of the global
batch that starts at p, so the set of samples of a global batch is the same for every number of ranks and workers.
The generator is splitmix64 (Steele, Lea, Flood 2014), written out here so that an order survives a new numpy.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
SHUFFLE, FLIP, PARTNER, PARTNER_FLIP, MEMBERS = range(5)


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser: a bijection of uint64 whose output bits all depend on all input bits."""
    values = values.astype(np.uint64)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def bits(seed: int, epoch: int, domain: int, positions: np.ndarray) -> np.ndarray:
    """uint64 noise for each position. `domain` keeps the uses apart."""
    base = np.zeros(1, np.uint64)
    for part in (seed, epoch, domain):
        base = mix(base + GOLDEN + np.uint64(part % 2**64))
    return mix(base + (np.asarray(positions, np.uint64) + np.uint64(1)) * GOLDEN)


def uniform(seed: int, epoch: int, domain: int, positions: np.ndarray) -> np.ndarray:
    """float64 in [0,1) for each position."""
    return (bits(seed, epoch, domain, positions) >> np.uint64(11)) * 2.0**-53


def below(seed: int, epoch: int, domain: int, positions: np.ndarray, bounds: np.ndarray | int) -> np.ndarray:
    """int64 in [0, bound) for each position."""
    return (uniform(seed, epoch, domain, positions) * bounds).astype(np.int64)


def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order of `count` things in an epoch: (count,) int64."""
    return np.argsort(bits(seed, epoch, SHUFFLE, np.arange(count)), kind="stable")


def rank_positions(start: int, stop: int, rank: int, world: int) -> np.ndarray:
    """The positions of one rank inside the global batch [start, stop)."""
    return np.arange(start + rank, stop, world)


def other_member(
    seed: int, epoch: int, positions: np.ndarray, place: np.ndarray, first: np.ndarray, count: np.ndarray
) -> np.ndarray:
    """For a sample that is number `place` in a list, of which `first`..`first + count` are one person's: another one.

    Returns:
        places, never equal to `place` (count must be at least 2), each other member equally likely.
    """
    step = 1 + below(seed, epoch, PARTNER, positions, count - 1)
    return first + (place - first + step) % count


def members(seed: int, epoch: int, person: np.ndarray, first: np.ndarray, count: np.ndarray, wanted: int) -> np.ndarray:
    """(len(person), wanted) places of a person's samples in random order; repeated only where there are too few."""
    begin = np.cumsum(count) - count  # of each person in the lists below, which lie one behind the other
    row = np.repeat(np.arange(len(person)), count)
    place = np.arange(len(row)) - begin[row]
    noise = bits(seed, epoch, MEMBERS, place + (person[row] << 24))
    drawn = place[np.lexsort((noise, row))]
    return first[:, None] + drawn[begin[:, None] + np.arange(wanted) % count[:, None]]
