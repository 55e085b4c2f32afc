"""Cached embeddings: `SHARD.RECOGNISER.npy`, float16, row = sample of the shard, and `RECOGNISER.sidecar.json`.

The JSON file says which weights made the arrays and which tar each belongs to, so that embeddings of other weights or
of another tar are refused instead of joined.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from anonfw.data.card import DataError, Shard
from anonfw.data.files import atomic, sha256_of, write_json


def sidecar_path(tar: Path, name: str) -> Path:
    return tar.with_name(f"{tar.name.removesuffix('.tar')}.{name}.npy")


def sidecar_record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.sidecar.json"


def read_record(folder: Path, name: str) -> dict:
    """The sidecar's JSON, or an empty one.

    Raises:
        DataError: it is there and not readable.
    """
    path = sidecar_record_path(folder, name)
    if not path.is_file():
        return {"encoder": name, "sha256": None, "dim": None, "shards": {}}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not readable JSON ({error}). Delete it and embed again.") from error


def save_sidecar(folder: Path, shard: Shard, name: str, encoder_sha256: str, embeddings: np.ndarray) -> None:
    """Write a shard's array, then note that it is there. Arrays of other weights are forgotten.

    Several processes may do so for shards of the same data set: the record is changed under a lock.

    Args:
        embeddings: (rows, dim), kept as float16.
    """
    import filelock

    array = sidecar_path(folder / shard.file, name)
    with atomic(array) as file:
        np.save(file, embeddings.astype(np.float16))
    rows, dim = embeddings.shape
    with filelock.FileLock(folder / f".{name}.sidecar.lock"):
        record = read_record(folder, name)
        if record["sha256"] != encoder_sha256 or record["dim"] != dim:
            record = {"encoder": name, "sha256": encoder_sha256, "dim": dim, "shards": {}}
        record["shards"][shard.stem] = {"rows": rows, "sha256": sha256_of(array), "tar_sha256": shard.sha256}
        record["shards"] = dict(sorted(record["shards"].items()))
        write_json(sidecar_record_path(folder, name), record)


class Sidecar:
    """The embeddings of one recogniser for the shards of a split, mapped and read by row.

    Args:
        folder: of the data set.
        shards: of the split.
        name: of the recogniser.
        sha256: of the encoder that must have made them; None takes the weights table's, if it knows the name.
    Raises:
        DataError: missing for a shard, made by other weights, or with another number of rows.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard], name: str, sha256: str | None = None) -> None:
        record = read_record(folder, name)
        remedy = f"Run: python -m anonfw embed {folder} --encoder {name}"
        expected = sha256 or _known_sha256(name)
        if record["shards"] and expected and record["sha256"] != expected:
            raise DataError(
                f"the {name} embeddings of {folder} come from other weights (sha256 {str(record['sha256'])[:12]}..., "
                f"wanted {expected[:12]}...). {remedy}"
            )
        self.name, self.sha256, self.dim = name, record["sha256"], record["dim"]
        self._arrays = []
        for shard in shards:
            entry = record["shards"].get(shard.stem)
            path = sidecar_path(folder / shard.file, name)
            if entry is None or not path.is_file():
                have = [stem for stem in record["shards"] if sidecar_path(folder / f"{stem}.tar", name).is_file()]
                some = f"for {shard.file}" if have else "at all"
                raise DataError(f"{folder} has no {name} embeddings {some}. {remedy}")
            if entry["tar_sha256"] != shard.sha256:
                raise DataError(f"{path} was made from another version of {shard.file}. {remedy}")
            try:
                array = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{path} is damaged ({error}). Delete it. {remedy}") from error
            if array.shape != (shard.samples, self.dim) or entry["rows"] != shard.samples:
                raise DataError(
                    f"{path} has shape {array.shape}; {shard.file} needs ({shard.samples}, {self.dim}). {remedy}"
                )
            self._arrays.append(array)

    def missing(self, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """(n,) True where the row is NaN."""
        first = np.empty(len(shard), np.float32)
        for number in np.unique(shard):
            here = shard == number
            first[here] = self._arrays[number][row[here], 0]
        return np.isnan(first)

    def rows(self, shard: np.ndarray, row: np.ndarray) -> np.ndarray:
        """(n,) shard numbers and (n,) rows inside them -> (n,dim) float32 of unit length."""
        found = np.empty((len(shard), self.dim), np.float32)
        for number in np.unique(shard):
            here = shard == number
            found[here] = self._arrays[number][row[here]]
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)


def _known_sha256(name: str) -> str | None:
    from anonfw import weights

    row = weights.table().get(name)
    return row.sha256 if row else None


def load_embeddings(dataset: str | Path, split: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All cached embeddings of a split, for work that needs no pictures.

    Returns:
        (n,D) float32 unit-norm embeddings in the order of the shards, and the (n,) int64 person of each.
    """
    from anonfw.data.table import local_folder, open_table

    table = open_table(local_folder(dataset), split)
    return Sidecar(table.folder, table.shards, name).rows(table.shard, table.row), table.person
