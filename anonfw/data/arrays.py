"""Precomputed arrays beside the shards: `SHARD.NAME.npy`, float16, and `NAME.sidecar.json`, which says what made them.

The layout is that of cached embeddings (data/SCHEMA.md); rows may have any shape and need not be samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anonfw.data.card import DataError, Shard
from anonfw.data.embeddings import read_record, sidecar_path, sidecar_record_path
from anonfw.data.files import atomic, sha256_of, write_json


@dataclass(frozen=True)
class Kind:
    """What an array holds and what it was made with.

    Attributes:
        name: of the files: [a-z0-9_].
        sha256: of the network that makes it.
        remedy: what to run where it is missing or another one.
        about: further facts for the record, such as the size of the pictures.
    """

    name: str
    sha256: str
    remedy: str
    about: dict


def save(folder: Path, shard: Shard, kind: Kind, array: np.ndarray, made_from: str) -> None:
    """Write a shard's array, then note that it is there. Arrays of another network are forgotten.

    Args:
        array: (rows, ...), kept as float16. made_from: sha256 of the file that it was computed from.
    """
    import filelock

    path, dim = sidecar_path(folder / shard.file, kind.name), list(array.shape[1:])
    with atomic(path) as file:
        np.save(file, array.astype(np.float16))
    with filelock.FileLock(folder / f".{kind.name}.sidecar.lock"):  # several processes may share the shards
        record = read_record(folder, kind.name)
        if record["sha256"] != kind.sha256 or record["dim"] != dim:
            record = {"encoder": kind.name, "sha256": kind.sha256, "dim": dim, **kind.about, "shards": {}}
        record["shards"][shard.stem] = {"rows": len(array), "sha256": sha256_of(path), "made_from": made_from}
        record["shards"] = dict(sorted(record["shards"].items()))
        write_json(sidecar_record_path(folder, kind.name), record)


class Arrays:
    """The arrays of a split's shards, mapped and read by row.

    Args:
        rows: shard -> number of rows that its array must have. made_from: shard -> hash of what it was computed from.
    Raises:
        DataError: missing for a shard, made by another network or from another file, or damaged.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        kind: Kind,
        rows: Callable[[Shard], int],
        made_from: Callable[[Shard], str],
    ) -> None:
        record = read_record(folder, kind.name)
        if record["shards"] and record["sha256"] != kind.sha256:
            raise DataError(
                f"{kind.name} of {folder} was made by another network (sha256 {str(record['sha256'])[:12]}..., wanted "
                f"{kind.sha256[:12]}...). {kind.remedy}"
            )
        self.shape = tuple(record["dim"] or ())
        self.arrays: list[np.ndarray] = []
        for shard in shards:
            path = sidecar_path(folder / shard.file, kind.name)
            entry = record["shards"].get(shard.stem)
            if entry is None or not path.is_file():
                raise DataError(f"{folder} has no {kind.name} for {shard.file}. {kind.remedy}")
            if entry["made_from"] != made_from(shard):
                raise DataError(f"{path} was made from another version of {shard.file} or its captions. {kind.remedy}")
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path} is damaged ({error}). Delete it. {kind.remedy}") from error
            wanted = (rows(shard), *self.shape)
            if array.shape != wanted:
                raise DataError(f"{path} has shape {array.shape}; {wanted} is wanted. Delete it. {kind.remedy}")
            self.arrays.append(array)

    def take(self, shard: np.ndarray, *index: np.ndarray) -> np.ndarray:
        """(n,) shard numbers, then (n,) indices into the leading axes of their arrays -> (n, ...) float32."""
        found: np.ndarray | None = None
        for number in np.unique(shard):
            here = shard == number
            part = self.arrays[number][tuple(axis[here] for axis in index)].astype(np.float32)
            found = np.empty((len(shard), *part.shape[1:]), np.float32) if found is None else found
            found[here] = part
        return np.empty((0, *self.shape[len(index) - 1 :]), np.float32) if found is None else found


def is_there(folder: Path, shard: Shard, kind: Kind, rows: int, made_from: str) -> bool:
    """Whether a shard's array is valid, so that it need not be made again."""
    try:
        Arrays(folder, [shard], kind, lambda _: rows, lambda _: made_from)
    except DataError:
        return False
    return True
