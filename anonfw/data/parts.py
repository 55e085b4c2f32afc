"""One data set written by several jobs: each writes its part of the people, and the last to finish joins them."""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from anonfw.data.build import SKIPPED
from anonfw.data.card import CARD_NAME, Card, DataError, Shard
from anonfw.data.files import atomic

FOLDER = ".parts"
COUNTS = ("given", "skipped")  # of a card's `about`: numbers of a part, which add up


@dataclass(frozen=True)
class Part:
    """Number `index` (from 0) of `count`."""

    index: int
    count: int

    def of(self, total: int) -> range:
        """Its share of `total` things in a row: neighbours stay together, shares differ by one at most.

        Raises:
            DataError: fewer things than parts.
        """
        if total < self.count:
            raise DataError(f"{total} people cannot be shared among {self.count} parts: use fewer")
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)

    def folder(self, out: Path) -> Path:
        """Where this part of the data set `out` is written."""
        return out / FOLDER / f"{self.index:04d}-of-{self.count:04d}"


def part(text: str) -> Part:
    """`I/N` of a command line."""
    try:
        index, count = map(int, text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: expected I/N, such as 0/16") from error
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r}: I is in [0, N)")
    return Part(index, count)


def is_joined(out: Path) -> bool:
    """Whether the data set is complete: a part that is run again has nothing to do.

    Raises:
        DataError: somebody has begun it as a whole.
    """
    if not (out / CARD_NAME).exists():
        return False
    if not Card.load(out, complete=False).complete:
        raise DataError(f"{out} was begun without parts: run that command again, or choose another folder")
    return True


def join(out: Path, count: int) -> bool:
    """Makes the data set of its parts when all of them are complete; returns whether the data set is complete now.

    The shards get the numbers that they have in the order of the parts. After a kill any part does it again.

    Raises:
        DataError: parts of different settings.
    """
    lock = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_joined(out):
            folders = [Part(index, count).folder(out) for index in range(count)]
            if not all((folder / CARD_NAME).exists() for folder in folders):
                return False
            cards = [Card.load(folder, complete=False) for folder in folders]
            if not all(card.complete for card in cards):
                return False
            _link(out, folders, cards)
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def _link(out: Path, folders: Sequence[Path], cards: Sequence[Card]) -> None:
    first = cards[0]
    for folder, card in zip(folders, cards, strict=True):
        settings = [
            (c.name, c.image_size, c.alignment, {k: v for k, v in c.about.items() if k not in COUNTS})
            for c in (first, card)
        ]
        if settings[0] != settings[1]:
            raise DataError(f"{folder} was written with other settings than {folders[0]}: delete one and run it again")
    about = dict(first.about)
    for name in COUNTS:
        if name in about:
            about[name] = _sum([card.about[name] for card in cards])
    joined = Card(first.name, first.image_size, first.alignment, first.source, first.licence, about=about)
    for folder, card in zip(folders, cards, strict=True):
        for shard in sorted(card.shards, key=lambda shard: shard.file):
            number = len(joined.of_split(shard.split))
            stem = f"{first.name}-{shard.split}-{number:06d}"
            for file in sorted(folder.glob(f"{shard.stem}.*")):
                _same_file(file, out / (stem + file.name.removeprefix(shard.stem)))
            joined.shards.append(Shard(**{**vars(shard), "file": f"{stem}.tar"}))
    with atomic(out / SKIPPED) as file:
        for folder in folders:
            file.write((folder / SKIPPED).read_bytes())
    joined.complete = True
    joined.save(out)  # last: from here on readers take it


def _same_file(file: Path, name: Path) -> None:
    name.unlink(missing_ok=True)  # of a join that was killed
    try:
        os.link(file, name)
    except OSError:  # a file system without hard links
        shutil.copyfile(file, name)


def _sum(values: Sequence) -> int | dict:
    if isinstance(values[0], dict):
        return {name: sum(value[name] for value in values) for name in values[0]}
    return sum(values)
