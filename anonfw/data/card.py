"""card.json: what a data set is and which shards belong to it. A shard that the card does not name does not exist."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from anonfw.data.files import write_json
from anonfw.errors import AnonfwError

SCHEMA_VERSION = 1
CARD_NAME = "card.json"
NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,39}")
KEY = re.compile(r"[A-Za-z0-9_-]{1,90}")


class DataError(AnonfwError):
    """A data set that cannot be used as asked. The message says what is wrong, where, and what to run."""


@dataclass(frozen=True)
class Shard:
    """One finished tar. `identities` counts people, `bytes` is the size of the tar, `sha256` its hash."""

    file: str
    split: str
    samples: int
    identities: int
    bytes: int
    sha256: str

    @property
    def stem(self) -> str:
        return self.file.removesuffix(".tar")


@dataclass
class Card:
    """The content of card.json.

    Attributes:
        name: of the data set; shards are `NAME-SPLIT-000000.tar`.
        image_size: side of every image in pixels.
        alignment: `arcface` or `portrait` (`anonfw.align`).
        source: where the pictures come from, for people to read.
        licence: under which they may be used, for people to read.
        complete: False while a writer is at work or was interrupted.
        shards: finished shards in the order in which they were finished.
        about: anything else that the writer wants to state (settings, measured quality); JSON values.
    """

    name: str
    image_size: int
    alignment: str
    source: str
    licence: str
    complete: bool = False
    shards: list[Shard] = field(default_factory=list)
    about: dict = field(default_factory=dict)

    def splits(self) -> list[str]:
        return list(dict.fromkeys(shard.split for shard in self.shards))

    def of_split(self, split: str) -> list[Shard]:
        """Shards of a split, by file name."""
        return sorted((shard for shard in self.shards if shard.split == split), key=lambda shard: shard.file)

    def share(self, splits: Sequence[str] | None, rank: int = 0, world: int = 1) -> list[Shard]:
        """The shards of those splits (None: of all) that one of `world` processes works on: every `world`-th.

        Shared out whatever has been done: processes that start at different times see different remains.

        Raises:
            DataError: no such split.
        """
        unknown = set(splits or ()) - set(self.splits())
        if unknown:
            raise DataError(
                f"{self.name} has no split {', '.join(sorted(unknown))}; it has {', '.join(self.splits())}."
            )
        return [shard for split in splits or self.splits() for shard in self.of_split(split)][rank::world]

    def save(self, folder: Path) -> None:
        value = {"schema": SCHEMA_VERSION, **asdict(self)}
        for split in self.splits():
            of_split = self.of_split(split)
            totals = {name: sum(getattr(shard, name) for shard in of_split) for name in ("samples", "identities")}
            value.setdefault("splits", {})[split] = totals
        write_json(folder / CARD_NAME, value)

    @staticmethod
    def load(folder: Path, complete: bool = True) -> Card:
        """Read and check `folder`/card.json.

        Args:
            complete: refuse a data set whose writer has not finished.
        Raises:
            DataError: no such folder, no card, another schema version, a damaged card, an unfinished data set.
        """
        path = Path(folder) / CARD_NAME
        if not path.is_file():
            what = "the folder has no card.json" if Path(folder).is_dir() else "there is no such folder"
            raise DataError(
                f"{folder} is not a data set: {what}. Make one with a script of data/ "
                "(for your own photos: python data/image_folder.py PHOTOS OUT), or name another, such as 'embedded'."
            )
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{path} is not readable JSON ({error}). Write the data set again.") from error
        version = value.pop("schema", None) if isinstance(value, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version!r}; this anonfw reads version {SCHEMA_VERSION} (data/SCHEMA.md). "
                "Write the data set again with the scripts of this version."
            )
        value.pop("splits", None)
        try:
            value["shards"] = [Shard(**shard) for shard in value["shards"]]
            card = Card(**value)
        except (KeyError, TypeError) as error:
            raise DataError(f"{path} does not follow data/SCHEMA.md: {error}. Write the data set again.") from error
        if complete and not card.complete:
            raise DataError(
                f"{folder} is unfinished: its writer was interrupted. Run the same writer command again; it continues."
            )
        return card
