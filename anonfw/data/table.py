"""A split as one table: the indexes of its shards end to end, with people numbered."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from anonfw.data.card import Card, DataError, Shard
from anonfw.data.index import Index, open_index

EMBEDDED = "embedded"


@dataclass
class Table:
    """Columns over all samples of a split; row = sample.

    Attributes:
        folder, card, split, shards: where it comes from.
        shard: (n,) int32 number in `shards`.  row: (n,) int32 row inside the shard.
        offset, size: (n,) int64; place of the JPEG in its tar.
        key: (n,) S.  fault: (n,) uint8 (`anonfw.data.index.REASONS`).
        person: (n,) int64 number in `people`, -1 where a bad record hides it.
        landmarks: (n,5,2) float32.  factors: name -> (n,) float32.
    """

    folder: Path
    card: Card
    split: str
    shards: list[Shard]
    people: list[str]
    shard: np.ndarray
    row: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    key: np.ndarray
    fault: np.ndarray
    person: np.ndarray
    landmarks: np.ndarray
    factors: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.key)

    @property
    def tars(self) -> list[Path]:
        return [self.folder / shard.file for shard in self.shards]

    @cached_property
    def by_person(self) -> np.ndarray:
        """Rows with a known person, sorted by person: each person's samples side by side."""
        known = np.flatnonzero(self.person >= 0)
        return known[np.argsort(self.person[known], kind="stable")]

    @cached_property
    def first(self) -> np.ndarray:
        """(people,) where in `by_person` a person begins."""
        return np.cumsum(self.count) - self.count

    @cached_property
    def count(self) -> np.ndarray:
        """(people,) samples a person has."""
        return np.bincount(self.person[self.person >= 0], minlength=len(self.people))

    def fingerprint(self) -> str:
        """Changes whenever the same position could mean another sample."""
        digest = hashlib.sha256(f"{self.card.name} {self.split} {len(self)}".encode())
        for shard in self.shards:
            digest.update(shard.sha256.encode())
        return digest.hexdigest()[:16]


def local_folder(dataset: str | Path) -> Path:
    """The folder of a data set that lies on this machine; `embedded` is the one inside the package."""
    return Path(__file__).parents[1] / "faces" if str(dataset) == EMBEDDED else Path(dataset).expanduser()


def open_table(
    folder: Path, split: str, limit_identities: int | None = None, limit_samples: int | None = None
) -> Table:
    """Read card and indexes of one split.

    Args:
        limit_identities: only the first people of the split.
        limit_samples: only the first samples of the split.
    Raises:
        DataError: missing or unfinished data set, unknown split, missing or foreign shard.
    """
    card = Card.load(folder)
    shards = card.of_split(split)
    if not shards:
        raise DataError(f"{folder} has no split {split!r}; it has {', '.join(card.splits())}.")
    indexes = [open_index(folder / shard.file, shard) for shard in shards]
    people: dict[str, int] = {}
    person = []
    for index in indexes:
        numbers = np.array([people.setdefault(name.decode(), len(people)) for name in index.names.tolist()] + [-1])
        person.append(numbers[index.person])
    names = sorted({name.decode() for index in indexes for name in index.factor_names.tolist()})
    table = Table(
        folder=folder,
        card=card,
        split=split,
        shards=shards,
        people=list(people),
        shard=np.repeat(np.arange(len(indexes), dtype=np.int32), [len(index) for index in indexes]),
        row=np.concatenate([np.arange(len(index), dtype=np.int32) for index in indexes]),
        offset=np.concatenate([index.offset for index in indexes]),
        size=np.concatenate([index.size for index in indexes]),
        key=np.concatenate([index.key for index in indexes]),
        fault=np.concatenate([index.fault for index in indexes]),
        person=np.concatenate(person).astype(np.int64),
        landmarks=np.concatenate([index.landmarks for index in indexes]),
        factors={name: np.concatenate([_factor(index, name) for index in indexes]) for name in names},
    )
    if limit_identities is not None:
        table = _keep(table, table.person < limit_identities)
    if limit_samples is not None:
        table = _keep(table, np.arange(len(table)) < limit_samples)
    return table


def _factor(index: Index, name: str) -> np.ndarray:
    columns = index.factor_names.tolist()
    if name.encode() in columns:
        return index.factors[:, columns.index(name.encode())]
    return np.full(len(index), np.nan, np.float32)


def _keep(table: Table, rows: np.ndarray) -> Table:
    person = table.person[rows]
    columns = {name: getattr(table, name)[rows] for name in ("shard", "row", "offset", "size", "key", "fault")}
    return Table(
        folder=table.folder,
        card=table.card,
        split=table.split,
        shards=table.shards,
        people=table.people[: int(person.max(initial=-1)) + 1],
        person=person,
        landmarks=table.landmarks[rows],
        factors={name: values[rows] for name, values in table.factors.items()},
        **columns,
    )
