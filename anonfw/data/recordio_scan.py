"""One pass over a RecordIO file: where its records lie, which labels they carry, whether it is whole."""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from anonfw.data.card import DataError
from anonfw.data.recordio import (
    AGAIN,
    LAST,
    MAGIC_BYTES,
    NARROW,
    PART,
    WHOLE,
    WIDE,
    cut_off,
    fault,
    open_raw,
    part_head,
)


@dataclass
class Scan:
    """What one pass over a `.rec` file tells of its n records, in the order of the file.

    Attributes:
        offset: (n,) int64, where each starts.  size: (n,) int64, bytes of its content.
        flag: (n,) int64, labels in an array, or 0.
        label: (n,) float64, the (first) label.  second: (n,) float64, the second one of an array, else NaN.
        wide: labels are float64 in this file.
        bytes, sha256: size and hash of the file.
    """

    offset: np.ndarray
    size: np.ndarray
    flag: np.ndarray
    label: np.ndarray
    second: np.ndarray
    wide: bool
    bytes: int
    sha256: str

    def __len__(self) -> int:
        return len(self.offset)


def scan(path: str | Path, advance: Callable[[int], object] | None = None) -> Scan:
    """Read a `.rec` file once, from front to back, with a megabyte of memory and 40 bytes a record.

    Args:
        advance: called with numbers of bytes as they are read (a progress bar).
    Raises:
        DataError: no such file, no record in it, or it breaks off or is damaged: with the offset.
    """
    path = Path(path)
    columns = {name: array("q") for name in ("offset", "size", "flag")}
    columns |= {name: array("d") for name in ("label", "second")}
    wide = False
    with open_raw(path) as file:
        stream = _Stream(path, file, advance)
        while (offset := stream.position) < stream.size:
            start, size = _skim(stream)
            if size < NARROW.size:
                raise fault(path, offset, f"a record of {size} bytes has no room for its header of {NARROW.size}")
            flag = int.from_bytes(start[:4], "little")
            if not len(columns["offset"]):  # the header record has labels and nothing else: its size tells their width
                wide = flag > 0 and size == WIDE.size + 8 * flag
            kind, code = (WIDE, "<d") if wide else (NARROW, "<f")
            width = 8 if wide else 4
            if size < kind.size + flag * width:
                raise fault(path, offset, f"the header announces {flag} labels, the record has {size} bytes")
            label, second = kind.unpack_from(start)[1], float("nan")
            if flag:
                label = struct.unpack_from(code, start, kind.size)[0]
            if flag > 1:
                second = struct.unpack_from(code, start, kind.size + width)[0]
            for column, value in zip(columns.values(), (offset, size, flag, label, second), strict=True):
                column.append(value)
        digest = stream.hash.hexdigest()
    if not len(columns["offset"]):
        raise DataError(f"{path} is empty: it has no record. {AGAIN}")
    made = {name: np.frombuffer(column, column.typecode).copy() for name, column in columns.items()}
    return Scan(**made, wide=wide, bytes=stream.size, sha256=digest)


class _Stream:
    """A file read forwards in pieces of at most a megabyte, hashed on the way."""

    def __init__(self, path: Path, file: BinaryIO, advance: Callable[[int], object] | None) -> None:
        self.path, self.file, self.advance = path, file, advance
        self.size = os.fstat(file.fileno()).st_size
        self.position = 0
        self.hash = hashlib.sha256()
        self._piece, self._used = b"", 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes; fewer at the end of the file."""
        while len(self._piece) - self._used < count and self._fill():
            pass
        taken = self._piece[self._used : self._used + count]
        self._used += len(taken)
        self.position += len(taken)
        return taken

    def skip(self, count: int) -> None:
        while count and (len(self._piece) > self._used or self._fill()):
            step = min(count, len(self._piece) - self._used)
            self._used += step
            self.position += step
            count -= step

    def _fill(self) -> bool:
        piece = self.file.read(1 << 20)
        self.hash.update(piece)
        self._piece, self._used = self._piece[self._used :] + piece, 0
        if piece and self.advance:
            self.advance(len(piece))
        return bool(piece)


def _skim(stream: _Stream) -> tuple[bytes, int]:
    """The first bytes of the next record's content (as many as a header with two labels needs), and its size."""
    wanted = WIDE.size + 16
    start, size, inside = b"", 0, False
    while True:
        offset = stream.position
        head = stream.take(PART.size)
        if len(head) < PART.size:
            raise fault(stream.path, offset, f"the file is truncated: {len(head)} bytes where a record part begins")
        flag, length = part_head(stream.path, offset, head, inside)
        padded = -(-length // 4) * 4
        if stream.position + padded > stream.size:
            raise fault(stream.path, offset, cut_off(length, stream.size - stream.position))
        if inside:
            start, size = start + MAGIC_BYTES, size + 4
        taken = stream.take(min(length, max(wanted - len(start), 0)))
        start, size, inside = start + taken, size + length, True
        stream.skip(padded - len(taken))
        if flag in (WHOLE, LAST):
            return start, size


def read_index(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The `.idx` file: keys (n,) int64 and offsets (n,) int64, by key.

    Raises:
        DataError: a line is not KEY<TAB>OFFSET, or a key stands there twice; with the line's number.
    """
    keys, offsets = array("q"), array("q")
    with open_raw(Path(path)) as file:
        for number, line in enumerate(_lines(file), 1):
            if not line.strip():
                continue
            try:
                key, offset = (int(field) for field in line.split(b"\t"))
                if not 0 <= key < 1 << 62 or not 0 <= offset < 1 << 62:
                    raise ValueError
            except ValueError as error:
                raise DataError(f"{path}, line {number}: {line[:60]!r} is not KEY<TAB>OFFSET. {AGAIN}") from error
            keys.append(key)
            offsets.append(offset)
    key, offset = np.array(keys, np.int64), np.array(offsets, np.int64)
    order = np.argsort(key, kind="stable")
    key, offset = key[order], offset[order]
    twice = np.flatnonzero(np.diff(key) == 0)
    if len(twice):
        raise DataError(f"{path}: the key {key[twice[0]]} stands there twice. {AGAIN}")
    return key, offset


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of at most a kilobyte: a binary file without line ends must not come into memory whole."""
    rest = b""
    while piece := file.read(1 << 16):
        *whole, rest = (rest + piece).split(b"\n")
        yield from whole
        if len(rest) > 1024:
            yield rest[:1024]
            rest = b""
    if rest:
        yield rest
