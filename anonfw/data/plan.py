"""Which rows a batch is made of, in each mode: positions of the global order to rows, partners and mirroring."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from anonfw.data import order
from anonfw.data.table import Table

MODES = ("images", "pairs", "groups", "cross")


@dataclass
class Step:
    """One rank's share of the global batch [start, stop).

    Attributes:
        rows: for each side (samples, partners) the (n,) rows of its table.
        mirrored: for each side (n,) bool.
        stop: position in units after this global batch.
    """

    rows: list[np.ndarray]
    mirrored: list[np.ndarray]
    stop: int


class Plan:
    """The order of a loader.

    Args:
        other: the partners' table (pairs: the same as `table`).
        table: the samples' table.
        mode: one of MODES.
        per_identity: rows of a person in groups.
    """

    def __init__(
        self, other: Table, table: Table, mode: str, seed: int, flip: float, shuffle: bool, per_identity: int
    ) -> None:
        self.table, self.other, self.mode, self.seed = table, other, mode, seed
        self.flip, self.shuffle, self.per_identity = flip, shuffle, per_identity
        if mode == "groups":
            self._things = np.flatnonzero(table.count >= 2)
        elif mode == "pairs":
            person = table.person[table.by_person]
            self._places = np.flatnonzero(table.count[person] >= 2)  # in by_person
            self._things = table.by_person[self._places]
        else:
            self._things = np.arange(len(table))
        self._epoch: tuple[int, np.ndarray] | None = None

    @property
    def units(self) -> int:
        """What an epoch visits: samples, or people in groups."""
        return len(self._things)

    def describe(self) -> str:
        where = f"{self.table.folder} ({self.table.split})"
        if self.mode == "groups":
            return f"{where} has {self.units} people with two photos or more"
        if self.mode == "pairs":
            return f"{where} has {self.units} photos of people with two or more"
        return f"{where} has {self.units} samples"

    def remedy(self) -> str:
        limited = len(self.table) < sum(shard.samples for shard in self.table.shards)
        if not self.units and len(self.table) and self.mode in ("groups", "pairs"):
            return "Each person has one photo: pairs and triplets need people with two or more."
        larger = "Write a larger data set (python data/image_folder.py --help)."
        return "Raise the loader's limit." if limited else larger

    def fingerprint(self) -> str:
        """Equal only if the same position of the same epoch means the same rows, partners and mirroring."""
        parts = [self.table.fingerprint(), self.other.fingerprint(), self.mode, self.seed, self.flip, self.shuffle]
        parts += [self.units, self.per_identity if self.mode == "groups" else 0]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def step(self, epoch: int, start: int, stop: int, rank: int, world: int) -> Step:
        """Rank `rank`'s rows of the global batch [start, stop), in units."""
        positions = order.rank_positions(start, stop, rank, world)
        things = self._order(epoch)[positions]
        if self.mode == "groups":
            people = self._things[things]
            places = order.members(
                self.seed, epoch, people, self.table.first[people], self.table.count[people], self.per_identity
            )
            positions = (positions[:, None] * self.per_identity + np.arange(self.per_identity)).ravel()
            rows = [self.table.by_person[places.ravel()]]
        else:
            rows = [self._things[things]]
        if self.mode == "pairs":
            person = self.table.person[rows[0]]
            partner = order.other_member(
                self.seed,
                epoch,
                positions,
                self._places[things],
                self.table.first[person],
                self.table.count[person],
            )
            rows.append(self.table.by_person[partner])
        elif self.mode == "cross":
            rows.append(order.below(self.seed, epoch, order.PARTNER, positions, len(self.other)))
        domains = (order.FLIP, order.PARTNER_FLIP)
        mirrored = [order.uniform(self.seed, epoch, domain, positions) < self.flip for domain in domains[: len(rows)]]
        return Step(rows, mirrored, stop)

    def _order(self, epoch: int) -> np.ndarray:
        if not self.shuffle:
            epoch = 0
        if self._epoch is None or self._epoch[0] != epoch:
            identity = np.arange(self.units)
            self._epoch = (epoch, order.permutation(self.seed, epoch, self.units) if self.shuffle else identity)
        return self._epoch[1]
