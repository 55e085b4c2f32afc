"""Samples that cannot be used: each is dropped, counted, written down, and too many of them end the run."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from anonfw.data.card import DataError


class BadSample(NamedTuple):
    """`key` is None where only the card knows that there was a sample."""

    shard: str
    key: str | None
    row: int
    reason: str


class BadSamples:
    """The bad samples that one loader met.

    Args:
        file: JSON lines {shard, key, row, reason}, appended; a sample stands there once, whoever met it.
        limit: more bad samples than this end the run.
        total: samples of the data, for the message.
    """

    def __init__(self, file: Path, limit: int, total: int) -> None:
        self.file, self.limit, self.total = Path(file), limit, total
        self.met: dict[tuple[str, int], BadSample] = {}

    def __len__(self) -> int:
        return len(self.met)

    def add(self, samples: Iterable[BadSample]) -> None:
        """Count and write the new ones.

        Raises:
            DataError: there are now more than `limit`.
        """
        new = [sample for sample in samples if (sample.shard, sample.row) not in self.met]
        if not new:
            return
        self.met.update({(sample.shard, sample.row): sample for sample in new})
        self._write(new)
        if len(self.met) > self.limit:
            last = new[-1]
            raise DataError(
                f"{len(self.met)} of {self.total} samples cannot be used, more than the {self.limit} that "
                f"max_bad_share allows. The last one: {last.shard}, key {last.key}: {last.reason}. All stand in "
                f"{self.file}. Run the data set's writer again or copy the shards again, or raise max_bad_share."
            )

    def _write(self, samples: list[BadSample]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # ranks share the file
            file.seek(0)
            written = {(record["shard"], record["row"]) for record in map(json.loads, file)}
            for sample in samples:
                if (sample.shard, sample.row) not in written:
                    file.write(json.dumps(sample._asdict(), ensure_ascii=False) + "\n")
