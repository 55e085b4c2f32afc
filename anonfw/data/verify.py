"""Does a data set keep what data/SCHEMA.md promises? Everything is read again: hashes, counts, people, pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from anonfw.data import decode
from anonfw.data.card import Card, DataError, Shard
from anonfw.data.embeddings import Sidecar, sidecar_path
from anonfw.data.files import sha256_of
from anonfw.data.index import OK, REASONS, Index, build_index, index_path
from anonfw.data.table import local_folder


def verify_dataset(dataset: str | Path) -> list[str]:
    """Every fault that a reader could meet, one line each; empty for a sound data set.

    Args:
        dataset: folder, or `embedded`.
    """
    folder = local_folder(dataset)
    try:
        card = Card.load(folder)
    except DataError as error:
        return [str(error)]
    faults: list[str] = []
    owner: dict[str, str] = {}
    keys: dict[bytes, str] = {}
    for shard in card.shards:
        tar = folder / shard.file
        if not tar.is_file():
            faults.append(f"{shard.file}: missing")
            continue
        index = build_index(tar)
        faults += [f"{shard.file}: {fault}" for fault in _shard_faults(tar, shard, index, card)]
        for name in (name.decode() for name in index.names.tolist()):
            if name in owner:
                faults.append(f"{shard.file}: identity {name!r} is also in {owner[name]}")
            owner[name] = shard.file
        for key in index.key.tolist():
            if key in keys:
                faults.append(f"{shard.file}: key {key.decode()!r} is also in {keys[key]}")
            keys[key] = shard.file
    known = {shard.file for shard in card.shards}
    faults += [f"{tar.name}: not in the card" for tar in sorted(folder.glob("*.tar")) if tar.name not in known]
    return faults + _sidecar_faults(folder, card)


def _shard_faults(tar: Path, shard: Shard, index: Index, card: Card) -> list[str]:
    faults = []
    if index.sha256 != shard.sha256:
        faults.append(f"sha256 {index.sha256[:12]}..., the card says {shard.sha256[:12]}...")
    for what, found, said in (
        ("bytes", index.bytes, shard.bytes),
        ("samples", len(index), shard.samples),
        ("identities", len(index.names), shard.identities),
    ):
        if found != said:
            faults.append(f"{found} {what}, the card says {said}")
    if not tar.name.startswith(f"{card.name}-{shard.split}-"):
        faults.append(f"not called {card.name}-{shard.split}-NUMBER.tar")
    people = index.person[index.person >= 0]
    if len(people) and np.count_nonzero(np.diff(people)) + 1 != len(np.unique(people)):
        faults.append("the samples of an identity are not side by side")
    stored = Index.load(index_path(tar))
    if stored is not None and stored.sha256 == index.sha256 and not np.array_equal(stored.offset, index.offset):
        faults.append(f"{index_path(tar).name} points to other places than the tar's headers")
    faults += [
        f"key {index.key[row].decode()!r}: {REASONS[int(index.fault[row])]}" for row in np.flatnonzero(index.fault)
    ]
    return faults + _picture_faults(tar, index, card)


def _picture_faults(tar: Path, index: Index, card: Card) -> list[str]:
    faults = []
    tars, side = decode.Tars([tar]), card.image_size
    pixels, status = np.zeros(3 * side * side, np.uint8), np.zeros(1, np.uint8)
    job = np.zeros((1, decode.JOB_WIDTH), np.int64)
    job[0, decode.SIDE] = side
    for row in np.flatnonzero(index.fault == OK):
        job[0, decode.OFFSET], job[0, decode.SIZE] = index.offset[row], index.size[row]
        decode.decode(job, status, pixels, tars)
        if status[0] != decode.OK:
            faults.append(f"key {index.key[row].decode()!r}: {decode.REASONS[int(status[0])]}")
    return faults


def _sidecar_faults(folder: Path, card: Card) -> list[str]:
    faults = []
    for path in sorted(folder.glob("*.sidecar.json")):
        name = path.name.removesuffix(".sidecar.json")
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            entries, made_by = dict(record["shards"]), str(record["sha256"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            faults.append(f"{path.name}: does not follow the schema ({error!r})")
            continue
        for shard in card.shards:
            try:
                Sidecar(folder, [shard], name, made_by)
            except DataError as error:
                faults.append(f"{path.name}: {error}")
                continue
            array = sidecar_path(folder / shard.file, name)
            if sha256_of(array) != entries[shard.stem].get("sha256"):
                faults.append(f"{array.name}: its sha256 is not the recorded one")
    return faults
