"""Published face sets, in whichever container they come, as one thing: pictures with labels, readable by place.

A module a container: `records` (InsightFace, DCFace), `folders`, `parquet_files`, `lmdb_store`. Each has a function
that returns a `Source`; `convert` writes it as a data set of data/SCHEMA.md. The pictures are aligned already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

STAGE = (
    ".stage"  # folder below the data set for pictures that must be laid out anew; gone when the data set is complete
)
Verdict = dict[str, float] | str  # factors of a picture that is taken, or why it is not


class Reader(Protocol):
    """Gives encoded pictures by place. It goes to worker processes: it opens its files when it is first used."""

    def read(self, place: Any) -> bytes: ...

    def close(self) -> None: ...


def take_all(photos: Sequence[str], pictures: Sequence[bytes]) -> list[Verdict]:  # noqa: ARG001 (as every rule has it)
    """Every picture is taken, without factors."""
    return [{} for _ in pictures]


@dataclass(frozen=True)
class Group:
    """An identity: its name, and for each picture where it lies and what it is called in messages."""

    name: str
    places: tuple
    photos: tuple[str, ...]


@dataclass
class Source:
    """Pictures of people, grouped when asked.

    Attributes:
        reader: gives the encoded pictures.
        labels: (n,) integers, which person a picture shows.
        places: (n,) what `reader.read` takes.
        name_of: label -> name of the person, unique.
        photo_of: row -> what messages call the picture.
        judge: (photos, encoded pictures) of one person -> a verdict each; a function that can be pickled.
        about: what the card says of it: files with sizes and hashes, notes.
        stage: for a container without access to single pictures: lays them out in a folder, returns reader and places.
    """

    reader: Reader
    labels: np.ndarray
    places: np.ndarray
    name_of: Callable[[int], str]
    photo_of: Callable[[int], str]
    judge: Callable[[Sequence[str], Sequence[bytes]], list[Verdict]] = take_all
    about: dict = field(default_factory=dict)
    stage: Callable[[Path, bool], tuple[Reader, np.ndarray]] | None = None

    def groups(self, min_photos: int = 1) -> Groups:
        """The people with at least `min_photos` pictures, by label; the pictures in the order of the source."""
        return Groups(self, min_photos)


class Groups:
    """A sequence of `Group`s, made one at a time: for a million pictures it holds two integers each."""

    def __init__(self, source: Source, min_photos: int) -> None:
        self.source = source
        self._order = np.argsort(source.labels, kind="stable")
        starts = np.flatnonzero(np.r_[True, np.diff(source.labels[self._order]) != 0][: len(self._order)])
        ends = np.r_[starts[1:], len(self._order)].astype(np.int64)
        enough = ends - starts >= min_photos
        self._starts, self._ends = starts[enough], ends[enough]

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Group]:
        for start, end in zip(self._starts.tolist(), self._ends.tolist(), strict=True):
            rows = self._order[start:end]
            name = self.source.name_of(int(self.source.labels[rows[0]]))
            yield Group(name, tuple(self.source.places[rows].tolist()), tuple(map(self.source.photo_of, rows.tolist())))

    def name(self, number: int) -> str:
        return self.source.name_of(int(self.source.labels[self._order[self._starts[number]]]))

    def photos(self, number: int) -> int:
        """How many pictures the person has."""
        return int(self._ends[number] - self._starts[number])

    def only(self, numbers: Sequence[int]) -> Groups:
        """Those people alone."""
        chosen = object.__new__(Groups)
        chosen.source, chosen._order = self.source, self._order
        chosen._starts, chosen._ends = self._starts[list(numbers)], self._ends[list(numbers)]
        return chosen
