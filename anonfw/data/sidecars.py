"""Cached embeddings: `SHARD.RECOGNISER.npy`, float16, row = sample of the shard, and `RECOGNISER.sidecar.json`.

The JSON file says which weights made the arrays and which tar each belongs to, so that embeddings of other weights or
of another tar are refused instead of joined.
"""

from __future__ import annotations

import json
from pathlib import Path

from .card import DataError, Shard
from .files import write_json


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


def record_sidecar(folder: Path, shard: Shard, name: str, encoder_sha256: str, shape: tuple[int, ...]) -> None:
    """Note that a shard's array is there. Arrays of other weights are forgotten.

    Args:
        shape: (rows, dim) of the array.
    """
    record = read_record(folder, name)
    if record["sha256"] != encoder_sha256 or record["dim"] != shape[1]:
        record = {"encoder": name, "sha256": encoder_sha256, "dim": shape[1], "shards": {}}
    record["shards"][shard.stem] = {"rows": shape[0], "tar_sha256": shard.sha256}
    record["shards"] = dict(sorted(record["shards"].items()))
    write_json(sidecar_record_path(folder, name), record)
