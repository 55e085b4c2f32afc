"""Small published face sets for the tests of `anonfw.data.sources`, and what lies in the data sets made of them."""

from __future__ import annotations

import json
from pathlib import Path

import tiny_dataset as tiny

from anonfw.data.card import Card
from anonfw.data.index import open_index
from anonfw.data.sources import Source
from anonfw.data.sources.convert import Crop, convert

SIZE = tiny.SIZE
NAMED = {"name": "set", "title": "a test", "licence": "none", "splits": {"train": 0.7, "val": 0.3}, "seed": 0}


def faces(count: int = 9) -> list[list[bytes]]:
    """People with 2, 3, 4, 2, ... pictures."""
    return [[tiny.jpeg(10 * person + photo) for photo in range(2 + person % 3)] for person in range(count)]


def write(out: Path, source: Source, **changes: object) -> dict[str, int]:
    options = {**NAMED, "shard_samples": 8, "progress": False, **changes}
    return convert(out, source, Crop(SIZE), **options)


def contents(out: Path) -> dict[str, list[tuple[str, bytes, dict]]]:
    """identity -> (key, JPEG, record) of its samples, in the order of the shards."""
    found: dict[str, list] = {}
    for shard in Card.load(out).shards:
        index = open_index(out / shard.file, shard)
        stored = (out / shard.file).read_bytes()
        for row in range(len(index)):
            jpeg = stored[index.offset[row] : index.offset[row] + index.size[row]]
            factors = {
                name.decode(): value
                for name, value in zip(index.factor_names.tolist(), index.factors[row].tolist(), strict=True)
                if value == value
            }
            name = index.names[index.person[row]].decode()
            found.setdefault(name, []).append((index.key[row].decode(), jpeg, factors))
    return found


def pictures(out: Path) -> dict[str, list[bytes]]:
    return {name: [jpeg for _, jpeg, _ in samples] for name, samples in contents(out).items()}


def skipped(out: Path) -> dict[str, str]:
    return {item["photo"]: item["reason"] for item in map(json.loads, (out / "skipped.jsonl").read_text().splitlines())}
