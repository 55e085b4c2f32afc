"""Faces in LMDB. Three layouts are in use, and told apart by their keys:

- packed: keys 0, 1, ... and `__len__` (or `__keys__`); a value is a pickled or msgpacked pair (picture, label). The
  common ImageFolder-to-LMDB scripts write it, and what converts InsightFace's records for PyTorch;
- numbered: `num-samples`, and `image-000000001`, `label-000000001`, ... ;
- named: keys PERSON/PHOTO, a value is the picture.

A pickle can run programs when it is loaded. Here only pairs of plain bytes, numbers and strings are unpickled.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from anonfw.data.card import DataError
from anonfw.data.files import sha256_of
from anonfw.data.sources import Source
from anonfw.data.sources.records import natural

PACKED, NUMBERED, NAMED = "packed", "numbered", "named"


class LmdbPictures:
    """Pictures of an LMDB by key."""

    def __init__(self, path: Path, layout: str) -> None:
        self.path, self.layout = path, layout
        self._environment: Any = None

    def __getstate__(self) -> dict:
        return {**vars(self), "_environment": None}

    def read(self, place: bytes) -> bytes:
        if self._environment is None:
            self._environment = _open(self.path)
        with _reading(self.path), self._environment.begin() as transaction:
            value = transaction.get(place)
        if value is None:
            raise DataError(f"{self.path}: the key {place!r} is gone.")
        return _pair(value, f"{self.path}, key {place!r}")[0] if self.layout == PACKED else value

    def close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def lmdb_faces(path: str | Path, name: str, progress: bool = True) -> Source:
    """The pictures of an LMDB (folder with data.mdb, or a file). People are called NAME_LABEL.

    Raises:
        DataError: no such database, none of the known layouts, a label that is missing, lmdb is not installed.
    """
    path = Path(path)
    environment = _open(path)
    try:
        with _reading(path), environment.begin() as transaction:
            layout = _layout(transaction, path)
            keys, labels = _labels(transaction, layout, path, progress)
    finally:
        environment.close()
    if not keys:
        raise DataError(f"{path} has no pictures.")
    people = sorted(set(labels), key=natural)
    data = path / "data.mdb" if path.is_dir() else path
    described = {"bytes": data.stat().st_size, "sha256": sha256_of(data)}
    number = {person: i for i, person in enumerate(people)}
    return Source(
        LmdbPictures(path, layout),
        np.array([number[label] for label in labels], np.int64),
        np.array(keys, object),
        name_of=lambda label: f"{name}_{people[label]}",
        photo_of=lambda row: f"key {keys[row].decode(errors='replace')}",
        about={"layout": layout, "images": len(keys), "labels": len(people), "files": {data.name: described}},
    )


def _open(path: Path) -> Any:
    try:
        import lmdb
    except ImportError as error:
        raise DataError("reading LMDB needs the package lmdb: pip install 'anonfw[sources]'") from error
    try:
        return lmdb.open(str(path), subdir=path.is_dir(), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise DataError(f"{path} is not a readable LMDB (a folder with data.mdb, or a file): {error}.") from error


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import lmdb

    try:
        yield
    except lmdb.Error as error:
        raise DataError(f"{path} is damaged: {error}. Get it again.") from error


def _layout(transaction: Any, path: Path) -> str:
    if transaction.get(b"num-samples") is not None:
        return NUMBERED
    if transaction.get(b"__len__") is not None or transaction.get(b"__keys__") is not None:
        return PACKED
    with transaction.cursor() as cursor:
        if cursor.first() and b"/" in cursor.key():
            return NAMED
        found = cursor.key()[:40] if cursor.first() else b"nothing"
    raise DataError(
        f"{path} has a layout that is not known (its first key is {found!r}): expected __len__ or __keys__ with "
        "(picture, label) pairs, num-samples with image-... and label-..., or keys PERSON/PHOTO."
    )


def _labels(transaction: Any, layout: str, path: Path, progress: bool) -> tuple[list[bytes], list[str]]:
    """Keys and labels of all pictures, in natural order of the keys."""
    from tqdm import tqdm

    if layout == NUMBERED:
        count = _count(transaction.get(b"num-samples"), path)
        labels = []
        for number in range(1, count + 1):
            label = transaction.get(f"label-{number:09d}".encode())
            if label is None:
                raise DataError(f"{path}: label-{number:09d} is missing, num-samples is {count}. Get it again.")
            labels.append(_label(label, f"{path}, label-{number:09d}"))
        return [f"image-{number:09d}".encode() for number in range(1, count + 1)], labels
    found: list[tuple[bytes, str]] = []
    entries = transaction.stat()["entries"]
    with transaction.cursor() as cursor, tqdm(total=entries, unit="key", desc="labels", disable=not progress) as bar:
        for key, value in cursor.iternext(keys=True, values=True):
            bar.update()
            if key.startswith(b"__"):
                continue
            where = f"{path}, key {key[:60]!r}"
            if layout == PACKED:
                found.append((key, _label(_pair(value, where)[1], where)))
            else:
                person, _, photo = key.rpartition(b"/")
                if not person or not photo:
                    raise DataError(f"{where}: expected PERSON/PHOTO, as the first key is.")
                found.append((key, _label(person, where)))
    found.sort(key=lambda each: natural(each[0].decode(errors="replace")))
    return [key for key, _ in found], [label for _, label in found]


def _count(value: bytes, path: Path) -> int:
    try:
        count = int(value)
        if 0 <= count < 1 << 40:
            return count
    except ValueError:
        pass
    raise DataError(f"{path}: num-samples is {value[:40]!r}, no number.")


def _label(value: object, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str | bytes):
        raise DataError(f"{where}: the label is {type(value).__name__}; expected a whole number or a string.")
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: the label {value[:40]!r} is no text.") from error
    text = str(value).strip()
    if not text:
        raise DataError(f"{where}: the label is empty.")
    return f"{int(text):06d}" if text.isascii() and text.isdigit() else text


def _pair(value: bytes, where: str) -> tuple[bytes, object]:
    """(picture, label) of a packed value."""
    try:
        pair = _Plain(io.BytesIO(value)).load() if value[:1] == b"\x80" else _msgpack_pair(value)
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: neither a plain pickled nor a msgpacked (picture, label) pair: {error}") from error
    except (struct.error, MemoryError, OverflowError) as error:
        raise DataError(f"{where}: damaged: {error}") from error
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not isinstance(pair[0], bytes):
        raise DataError(f"{where}: expected a pair of the encoded picture and its label.")
    return pair[0], pair[1]


class _Plain(pickle.Unpickler):
    """Unpickles plain values. Names of classes and functions are refused, except how old protocols write bytes."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise pickle.UnpicklingError(f"the pickle names {module}.{name}; only bytes, numbers and strings are read")


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding}")
    return text.encode("latin1")


def _msgpack_pair(value: bytes) -> list:
    """A msgpack array of two: bytes (bin or raw), then a whole number or a string."""
    if value[:1] != b"\x92":
        raise ValueError(f"it starts with {value[:4]!r}")
    picture, position = _msgpack_item(value, 1)
    label, position = _msgpack_item(value, position)
    if position != len(value):
        raise ValueError(f"{len(value) - position} bytes too many")
    return [picture, label]


_WHOLE = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
_LENGTH = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}


def _msgpack_item(value: bytes, position: int) -> tuple[object, int]:
    code = value[position]
    position += 1
    if code <= 0x7F or code >= 0xE0:
        return (code if code <= 0x7F else code - 256), position
    if code in _WHOLE:
        return struct.unpack_from(_WHOLE[code], value, position)[0], position + struct.calcsize(_WHOLE[code])
    if 0xA0 <= code <= 0xBF:
        length = code & 31
    elif code in _LENGTH:
        length = struct.unpack_from(_LENGTH[code], value, position)[0]
        position += struct.calcsize(_LENGTH[code])
    else:
        raise ValueError(f"a msgpack type 0x{code:02x}")
    if position + length > len(value):
        raise ValueError("it is cut off")
    return value[position : position + length], position + length
