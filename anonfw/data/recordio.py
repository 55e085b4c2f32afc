"""MXNet's RecordIO, in which InsightFace publishes face sets, read and written without MXNet.

A `.rec` file is a chain of parts, each at a multiple of 4 bytes:

    magic 0xced7230a | flag (3 bits) and length (29 bits) | content | zeros up to a multiple of 4        (little endian)

Flag 0 is a whole record. A record that contains the magic at a multiple of 4 is cut there and the four bytes left out:
flag 1 first part, 2 middle, 3 last. A record of a face set starts with an `IRHeader` (flag, label, id, id2); a flag
above 0 says that so many labels follow it. The `.idx` file names the records: lines KEY<TAB>OFFSET.
"""

from __future__ import annotations

import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from anonfw.data.card import DataError

MAGIC = 0xCED7230A
MAGIC_BYTES = MAGIC.to_bytes(4, "little")
WHOLE, FIRST, MIDDLE, LAST = range(4)
MAX_PART = (1 << 29) - 1  # bytes: the length has 29 bits
MAX_RECORD = 1 << 26  # bytes: no picture of a face is larger, so a larger record is damage and never allocated

PART = struct.Struct("<II")
NARROW = struct.Struct("<IfQQ")
WIDE = struct.Struct("<IxxxxdQQ")  # labels in float64, which some sets with many millions of pictures use
AGAIN = "Get the file again, or write it again."


@dataclass(frozen=True)
class Header:
    """MXNet's IRHeader. `label` is a number, or an array (then it is stored with flag = its length)."""

    label: float | np.ndarray
    id: int = 0
    id2: int = 0


def pack(header: Header, payload: bytes = b"", wide: bool = False) -> bytes:
    """A record's content: the header, its label array if it has one, and the payload."""
    kind, code = (WIDE, "<f8") if wide else (NARROW, "<f4")
    if np.ndim(header.label) == 0:
        return kind.pack(0, float(header.label), header.id, header.id2) + payload
    labels = np.asarray(header.label, code).reshape(-1)
    return kind.pack(len(labels), 0.0, header.id, header.id2) + labels.tobytes() + payload


def unpack(record: bytes, wide: bool = False, where: str = "record") -> tuple[Header, bytes]:
    """The header of a record's content, and what follows it.

    Args:
        wide: labels are float64.
        where: file and offset, for the message.
    Raises:
        DataError: the record is shorter than its header says.
    """
    kind, code, width = (WIDE, "<f8", 8) if wide else (NARROW, "<f4", 4)
    if len(record) < kind.size:
        raise DataError(f"{where}: the record has {len(record)} bytes, its header alone needs {kind.size}. {AGAIN}")
    flag, label, first, second = kind.unpack_from(record)
    start = kind.size + flag * width
    if start > len(record):
        raise DataError(f"{where}: the header announces {flag} labels, the record has {len(record)} bytes. {AGAIN}")
    if flag:
        label = np.frombuffer(record, code, flag, kind.size).astype(np.float64)
    return Header(label, first, second), record[start:]


def fault(path: Path, offset: int, what: str) -> DataError:
    return DataError(f"{path}, byte {offset}: {what}. {AGAIN}")


class RecordFile:
    """Records by offset. Nothing of the file stays in memory; one object may be used by one thread at a time.

    Args:
        path: the `.rec` file.
        limit: largest record in bytes; a larger one is refused before memory is taken.
    Raises:
        DataError: there is no such file.
    """

    def __init__(self, path: str | Path, limit: int = MAX_RECORD) -> None:
        self.path, self.limit = Path(path), limit
        self._file = open_raw(self.path)
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int) -> bytes:
        """The record that starts at a byte offset.

        Raises:
            DataError: no record starts there, it is cut off, or it is larger than the limit.
        """
        return self.read_next(offset)[0]

    def read_next(self, offset: int) -> tuple[bytes, int]:
        """The record that starts at `offset`, and the offset behind it."""
        parts: list[bytes] = []
        position, total = offset, 0
        while True:
            if position < 0 or position % 4 or position + PART.size > self.size:
                raise fault(self.path, position, f"no record can start here (the file has {self.size} bytes)")
            flag, length = part_head(self.path, position, self._bytes(position, PART.size), bool(parts))
            padded = -(-length // 4) * 4
            if position + PART.size + padded > self.size:
                raise fault(self.path, position, cut_off(length, self.size - position - PART.size))
            total += length + 4 * bool(parts)
            if total > self.limit:
                raise fault(self.path, offset, f"a record of more than {self.limit} bytes")
            parts.append(self._bytes(position + PART.size, length))
            position += PART.size + padded
            if flag in (WHOLE, LAST):
                return MAGIC_BYTES.join(parts), position

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """(offset, record) of all records in the order of the file."""
        position = 0
        while position < self.size:
            record, following = self.read_next(position)
            yield position, record
            position = following

    def _bytes(self, offset: int, count: int) -> bytes:
        content = os.pread(self._file.fileno(), count, offset)
        if len(content) != count:
            raise fault(self.path, offset, f"{count} bytes expected, {len(content)} could be read")
        return content

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_raw(path: Path) -> BinaryIO:
    try:
        return open(path, "rb", buffering=0)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def part_head(path: Path, offset: int, head: bytes, inside: bool) -> tuple[int, int]:
    """Flag and length of the part whose 8 bytes are `head`. `inside`: the record has begun before."""
    magic, word = PART.unpack(head)
    if magic != MAGIC:
        raise fault(path, offset, f"0x{magic:08x} stands where the magic 0x{MAGIC:08x} of a record must be")
    flag, length = word >> 29, word & MAX_PART
    if flag > LAST:
        raise fault(path, offset, f"a record part with the unknown flag {flag}")
    if inside and flag in (WHOLE, FIRST):
        raise fault(path, offset, "a new record begins before the last part of the one before")
    if not inside and flag in (MIDDLE, LAST):
        raise fault(path, offset, "a later part of a record without its first part")
    return flag, length


def cut_off(length: int, left: int) -> str:
    return f"the file is truncated: a record part of {length} bytes with {max(left, 0)} bytes left"


class RecordWriter:
    """Writes a `.rec` file and its `.idx`. Both appear when the block ends without an exception.

    Args:
        path: of the `.rec` file; the `.idx` gets the same name.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._partial = {
            end: self.path.with_name(f".{self.path.stem}{end}.{os.getpid()}.partial") for end in (".rec", ".idx")
        }
        self._keys, self._offsets = array("q"), array("q")

    def __enter__(self) -> RecordWriter:
        self._file = open(self._partial[".rec"], "wb")
        return self

    def write(self, key: int, record: bytes) -> int:
        """Append a record (see `pack`); returns its offset.

        Raises:
            ValueError: it has more than 2^29 - 1 bytes.
        """
        if len(record) > MAX_PART:
            raise ValueError(f"record {key} has {len(record)} bytes; RecordIO holds at most {MAX_PART}")
        offset = self._file.tell()
        self._keys.append(key)
        self._offsets.append(offset)
        self._file.write(_parts(record))
        return offset

    def rewrite(self, offset: int, record: bytes) -> None:
        """Replace the record at `offset` by one that takes as many bytes."""
        end = self._file.tell()
        self._file.seek(offset)
        self._file.write(_parts(record))
        self._file.seek(end)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                with open(self._partial[".idx"], "w", encoding="ascii") as index:
                    index.writelines(f"{k}\t{o}\n" for k, o in zip(self._keys, self._offsets, strict=True))
            self._file.close()
            if kind is None:
                os.replace(self._partial[".idx"], self.path.with_suffix(".idx"))
                os.replace(self._partial[".rec"], self.path)
        finally:
            self._file.close()
            for partial in self._partial.values():
                partial.unlink(missing_ok=True)


def _parts(record: bytes) -> bytes:
    """A record as it lies in the file: cut where it holds the magic at a multiple of 4."""
    made, start, found = [], 0, record.find(MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            made.append(PART.pack(MAGIC, (MIDDLE if start else FIRST) << 29 | found - start) + record[start:found])
            start = found + 4
        found = record.find(MAGIC_BYTES, found + 4 if found % 4 == 0 else found + 1)
    made.append(PART.pack(MAGIC, (LAST if start else WHOLE) << 29 | len(record) - start) + record[start:])
    return b"".join(made) + b"\0" * (-len(record) % 4)


def write_face_set(folder: str | Path, people: Iterable[Sequence[bytes]], size: int = 112) -> int:
    """A face set as InsightFace publishes it: train.rec, train.idx, train.lst, property. Its tools read it.

    Args:
        people: the encoded pictures of each person; labels count from 0.
        size: side of the pictures, for `property`.
    Returns:
        number of pictures.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ends = array("q", [1])
    with RecordWriter(folder / "train.rec") as writer, open(folder / "train.lst", "w", encoding="ascii") as listing:
        start = writer.write(0, pack(Header(np.zeros(2))))
        key = 1
        for label, pictures in enumerate(people):
            for picture in pictures:
                writer.write(key, pack(Header(float(label), key), picture))
                listing.write(f"1\t{label:07d}/{key:08d}.jpg\t{label}\n")
                key += 1
            ends.append(key)
        for number in range(len(ends) - 1):
            writer.write(key + number, pack(Header(np.array(ends[number : number + 2]), key + number)))
        writer.rewrite(start, pack(Header(np.array([key, key + len(ends) - 1]))))
    (folder / "property").write_text(f"{len(ends) - 1},{size},{size}\n", encoding="ascii")
    return key - 1
