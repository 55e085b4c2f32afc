"""The index beside a tar: for each sample where its JPEG lies, and everything that its JSON says.

Built once by a walk over the tar's headers, kept as `SHARD.index.npz`, taken again only while it describes the tar
that the card names. With it a sample is read by offset, in any order, without touching the tar's other members.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anonfw.data.card import DataError, Shard
from anonfw.data.files import atomic, cache_folder, sha256_of

INDEX_VERSION = 1
OK, NO_IMAGE, NO_RECORD, BAD_RECORD, TRUNCATED = range(5)
REASONS = {
    NO_IMAGE: "no .jpg member",
    NO_RECORD: "no .json member",
    BAD_RECORD: "its .json member does not follow data/SCHEMA.md",
    TRUNCATED: "lies behind the end of a truncated tar",
}


@dataclass
class Index:
    """Columns of one shard; row = sample, in the order of the tar.

    Attributes:
        sha256, bytes: hash and size of the tar that was walked.
        key: (n,) S; ASCII shard keys.
        offset, size: (n,) int64; place of the JPEG in the tar.
        person: (n,) int32; row of `names`, -1 where the record is bad.
        names: (people,) S; UTF-8 identities, in the order of the tar.
        landmarks: (n,5,2) float32; NaN where unknown.
        factor_names: (F,) S.  factors: (n,F) float32, NaN where a sample has none.
        fault: (n,) uint8; OK, or why the sample cannot be used (`REASONS`).
    """

    sha256: str
    bytes: int
    key: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    person: np.ndarray
    names: np.ndarray
    landmarks: np.ndarray
    factor_names: np.ndarray
    factors: np.ndarray
    fault: np.ndarray

    def __len__(self) -> int:
        return len(self.key)

    def save(self, path: Path) -> None:
        arrays = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        with atomic(path) as file:
            np.savez_compressed(file, version=INDEX_VERSION, sha256=self.sha256, bytes=self.bytes, **arrays)

    @staticmethod
    def load(path: Path) -> Index | None:
        """None if there is no index, or one that this version cannot read: it is then built again."""
        try:
            with np.load(path) as stored:
                values = {name: stored[name] for name in stored.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return None
        if int(values.pop("version", -1)) != INDEX_VERSION:
            return None
        try:
            return Index(sha256=str(values.pop("sha256")), bytes=int(values.pop("bytes")), **values)
        except (KeyError, TypeError):
            return None


def index_path(tar: Path) -> Path:
    return tar.with_name(tar.name.removesuffix(".tar") + ".index.npz")


def open_index(tar: Path, shard: Shard) -> Index:
    """The index of a shard of a card: the stored one if it still fits, else a new one, stored if possible.

    A tar that is shorter than its card says keeps every row whose place is known; rows behind its end get the fault
    TRUNCATED (also rows that only the card knows of: they come last, without a key).

    Raises:
        DataError: the tar is missing, or it is whole but another one than the card describes.
    """
    if not tar.is_file():
        raise DataError(f"{tar} is missing, although the card names it. Run the data set's writer again.")
    state = tar.stat()
    beside, cached = index_path(tar), _cached_path(tar)
    for path in (beside, cached):
        index = Index.load(path)
        if index is None or index.sha256 != shard.sha256 or len(index) != shard.samples:
            continue
        if state.st_size < index.bytes:
            return _cut(index, state.st_size)
        if state.st_size > index.bytes:
            continue
        if state.st_mtime_ns <= path.stat().st_mtime_ns:
            return index
        if sha256_of(tar) == index.sha256:  # copied or checked out after the index: same bytes, so only newer
            _touch(path)
            return index
    index = build_index(tar)
    if index.sha256 != shard.sha256:
        if state.st_size < shard.bytes and len(index) <= shard.samples:
            return _pad(index, shard.samples)
        if len(index) != shard.samples:
            raise DataError(
                f"{tar} has {len(index)} samples and its card says {shard.samples} (sha256 {index.sha256[:12]}..., "
                f"card {shard.sha256[:12]}...): this is another tar. Copy it again, or run the data set's writer again."
            )
        return index  # damaged inside: the broken samples show when they are read; never stored as if it were whole
    try:
        index.save(beside)
    except OSError:  # a read-only folder
        cached.parent.mkdir(parents=True, exist_ok=True)
        index.save(cached)
    return index


def build_index(tar: Path) -> Index:
    """Walk the headers of a tar. Samples are runs of members with the same name up to the first dot."""
    with open(tar, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""
        rows: dict[str, dict[str, tuple[int, int]]] = {}
        for name, offset, size in _members(content):
            key, _, extension = name.rpartition("/")[2].partition(".")
            rows.setdefault(key, {})[extension] = (offset, size)
        records, faults = [], []
        for members in rows.values():
            record, fault = None, NO_RECORD
            if "json" in members:
                offset, size = members["json"]
                record, fault = _record(bytes(content[offset : offset + size]))
                if offset + size > len(content):
                    record, fault = None, TRUNCATED
            if "jpg" not in members:
                fault = TRUNCATED if not _ended(content) else NO_IMAGE
            elif sum(members["jpg"]) > len(content):
                fault = TRUNCATED
            records.append(record)
            faults.append(fault)
        sha256 = hashlib.sha256(content).hexdigest()
        total = len(content)
    names = list(dict.fromkeys(record["identity"] for record in records if record))
    number = {name: i for i, name in enumerate(names)}
    factor_names = sorted({name for record in records if record for name in record["factors"]})
    landmarks = np.full((len(rows), 5, 2), np.nan, np.float32)
    factors = np.full((len(rows), len(factor_names)), np.nan, np.float32)
    for row, record in enumerate(records):
        if record:
            if record["landmarks"] is not None:
                landmarks[row] = record["landmarks"]
            factors[row] = [record["factors"].get(name, np.nan) for name in factor_names]
    places = np.array([members.get("jpg", (0, 0)) for members in rows.values()], np.int64).reshape(-1, 2)
    return Index(
        sha256=sha256,
        bytes=total,
        key=np.array([key.encode() for key in rows], "S"),
        offset=places[:, 0].copy(),
        size=places[:, 1].copy(),
        person=np.array([number[record["identity"]] if record else -1 for record in records], np.int32),
        names=np.array([name.encode() for name in names], "S"),
        landmarks=landmarks,
        factor_names=np.array([name.encode() for name in factor_names], "S"),
        factors=factors,
        fault=np.array(faults, np.uint8),
    )


def _members(content: bytes | mmap.mmap):
    """(name, data offset, size) of each regular file of a tar; stops at the end marker or where the tar breaks off."""
    position = 0
    long_name = None
    while position + tarfile.BLOCKSIZE <= len(content):
        block = bytes(content[position : position + tarfile.BLOCKSIZE])
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:  # the end marker, or garbage
            return
        data = position + tarfile.BLOCKSIZE
        if header.type == tarfile.GNUTYPE_LONGNAME:
            long_name = bytes(content[data : data + header.size]).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif header.isreg():
            yield long_name or header.name, data, header.size
            long_name = None
        position = data + -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _ended(content: bytes | mmap.mmap) -> bool:
    """Whether a tar has its end marker."""
    return len(content) >= 1024 and not any(content[len(content) - 1024 :])


def _record(content: bytes) -> tuple[dict | None, int]:
    try:
        value = json.loads(content)
        landmarks = value.get("landmarks")
        landmarks = None if landmarks is None else np.asarray(landmarks, np.float32).reshape(5, 2)
        factors = {str(name): float(number) for name, number in value.get("factors", {}).items()}
        return {"identity": str(value["identity"]), "landmarks": landmarks, "factors": factors}, OK
    except (ValueError, KeyError, TypeError, AttributeError):
        return None, BAD_RECORD


def _cut(index: Index, size: int) -> Index:
    index.fault[(index.offset + index.size > size) & (index.fault == OK)] = TRUNCATED
    return index


def _pad(index: Index, samples: int) -> Index:
    """Rows that only the card knows of."""
    missing = samples - len(index)

    def grown(column: np.ndarray, value: object) -> np.ndarray:
        return np.concatenate([column, np.full((missing, *column.shape[1:]), value, column.dtype)])

    return Index(
        index.sha256,
        index.bytes,
        key=grown(index.key if len(index) else np.zeros(0, "S1"), b""),
        offset=grown(index.offset, 0),
        size=grown(index.size, 0),
        person=grown(index.person, -1),
        names=index.names,
        landmarks=grown(index.landmarks, np.nan),
        factor_names=index.factor_names,
        factors=grown(index.factors, np.nan),
        fault=grown(index.fault, TRUNCATED),
    )


def _cached_path(tar: Path) -> Path:
    place = hashlib.sha256(str(tar.resolve()).encode()).hexdigest()[:16]
    return cache_folder() / "indexes" / place / index_path(tar).name


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:  # read-only: it is hashed again next time
        return
