"""RecordIO without MXNet: the format byte by byte, round trips, and what damage does."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from anonfw.data.card import DataError
from anonfw.data.recordio import MAGIC_BYTES, Header, RecordFile, RecordWriter, pack, unpack, write_face_set
from anonfw.data.recordio_scan import read_index, scan

float32 = st.floats(allow_nan=False, width=32)
unsigned = st.integers(0, 2**64 - 1)
# Contents in which the magic stands often, at multiples of 4 and between them.
content = st.lists(st.one_of(st.just(MAGIC_BYTES), st.binary(max_size=9)), max_size=12).map(b"".join)


def reference_parts(record: bytes) -> bytes:
    """The writer of dmlc-core, word by word: the magic at a multiple of 4 ends a part and is left out."""
    out, begin, count = b"", 0, 0
    for place in range(0, len(record) // 4 * 4, 4):
        if record[place : place + 4] == b"\x0a\x23\xd7\xce":
            out += b"\x0a\x23\xd7\xce" + struct.pack("<I", (1 if count == 0 else 2) * 2**29 + place - begin)
            out += record[begin:place]
            begin, count = place + 4, count + 1
    out += b"\x0a\x23\xd7\xce" + struct.pack("<I", (3 if count else 0) * 2**29 + len(record) - begin) + record[begin:]
    return out + bytes((4 - len(out) % 4) % 4)


def write(path: Path, records: list[bytes]) -> list[int]:
    with RecordWriter(path) as writer:
        return [writer.write(key, record) for key, record in enumerate(records)]


# The format


def test_a_record_byte_by_byte(tmp_path: Path):
    write(tmp_path / "a.rec", [pack(Header(7.0, 3, 4), b"jpeg!")])
    expected = bytes.fromhex(
        "0a23d7ce 1d000000  00000000 0000e040 0300000000000000 0400000000000000  6a70656721 000000"
    )
    assert (tmp_path / "a.rec").read_bytes() == expected
    assert (tmp_path / "a.idx").read_text() == "0\t0\n"
    header, payload = unpack(RecordFile(tmp_path / "a.rec").read(0))
    assert header == Header(7.0, 3, 4) and payload == b"jpeg!"


def test_a_multi_part_record_byte_by_byte(tmp_path: Path):
    magic = "0a23d7ce"
    stored = f"{magic} 04000020 61626364  {magic} 00000040  {magic} 02000060 6566 0000  {magic} 01000000 67 000000"
    (tmp_path / "a.rec").write_bytes(bytes.fromhex(stored))
    file = RecordFile(tmp_path / "a.rec")
    assert list(file) == [(0, b"abcd" + 2 * MAGIC_BYTES + b"ef"), (32, b"g")]
    write(tmp_path / "b.rec", [record for _, record in file])
    assert (tmp_path / "b.rec").read_bytes() == (tmp_path / "a.rec").read_bytes()


@given(records=st.lists(content, max_size=6))
def test_files_are_those_of_dmlc(records: list[bytes], tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    offsets = write(path, records)
    assert path.read_bytes() == b"".join(map(reference_parts, records))
    file = RecordFile(path)
    assert list(file) == list(zip(offsets, records, strict=True))
    assert [file.read(offset) for offset in reversed(offsets)] == records[::-1]
    keys, found = read_index(path.with_suffix(".idx"))
    assert keys.tolist() == list(range(len(records))) and found.tolist() == offsets


@given(
    label=st.one_of(float32, st.lists(float32, min_size=1, max_size=5)),
    id=unsigned,
    id2=unsigned,
    payload=content,
    wide=st.booleans(),
)
def test_headers_return(label: float | list[float], id: int, id2: int, payload: bytes, wide: bool):
    header, rest = unpack(
        pack(Header(np.array(label) if isinstance(label, list) else label, id, id2), payload, wide), wide
    )
    assert (header.id, header.id2, rest) == (id, id2, payload)
    assert np.array_equal(header.label, label)


@given(
    made=st.lists(
        st.tuples(st.one_of(float32, st.lists(float32, min_size=2, max_size=3)), unsigned, content),
        min_size=1,
        max_size=6,
    ),
    wide=st.booleans(),
)
def test_scan_sees_what_was_written(made: list, wide: bool, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    records = [pack(Header(np.array([2.0, 3.0])), wide=wide)]  # the header record, which tells the width of labels
    records += [pack(Header(np.array(x) if isinstance(x, list) else x, i), rest, wide) for x, i, rest in made]
    offsets = write(path, records)
    found = scan(path)
    assert found.wide == wide
    assert found.offset.tolist() == offsets and found.size.tolist() == list(map(len, records))
    labels = [[2.0, 3.0], *(x if isinstance(x, list) else [x] for x, _, _ in made)]
    assert found.label.tolist() == [label[0] for label in labels]
    assert [None if np.isnan(x) else x for x in found.second] == [x[1] if len(x) > 1 else None for x in labels]
    assert found.flag.tolist() == [2, *(len(x) if isinstance(x, list) else 0 for x, _, _ in made)]


def test_a_face_set_as_insightface_writes_it(tmp_path: Path):
    people = [[b"a", b"bb"], [b"ccc"], [b"d", b"e", b"f"]]
    assert write_face_set(tmp_path, people, 96) == 6
    file = RecordFile(tmp_path / "train.rec")
    keys, offsets = read_index(tmp_path / "train.idx")
    records = {key: unpack(file.read(offset)) for key, offset in zip(keys.tolist(), offsets.tolist(), strict=True)}
    header, payload = records[0]
    assert header.label.tolist() == [7.0, 10.0] and payload == b""
    for number, pictures in enumerate(people):
        low, high = records[7 + number][0].label.astype(int)
        assert [records[key][1] for key in range(low, high)] == pictures
        assert all(records[key][0].label == number for key in range(low, high))
    assert (tmp_path / "property").read_text() == "3,96,96\n"
    assert len((tmp_path / "train.lst").read_text().splitlines()) == 6


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path):
    with pytest.raises(RuntimeError), RecordWriter(tmp_path / "a.rec") as writer:
        writer.write(0, b"x" * 30)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


# Damage


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with a header record, plain, multi-part and array-labelled records."""
    path = tmp_path_factory.mktemp("small") / "a.rec"
    records = [
        pack(Header(np.array([3.0, 5.0]))),
        pack(Header(1.0, 1), b"abc"),
        pack(Header(2.0, 2), b"x" * 5 + MAGIC_BYTES * 3 + b"y" * 50),
        pack(Header(np.array([1.0, 2.0, 3.0]), 3), b"\0" * 33),
    ]
    write(path, records)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("place", "content", "at", "message"),
    [
        (40, b"\x0b", 40, "0xced7230b stands where the magic"),
        (47, b"\x80", 40, "unknown flag 4"),
        (47, b"\x60", 40, "without its first part"),
        (47, b"\x20", 76, "a new record begins before"),
        (44, b"\xff\xff\xff\x1f", 40, "truncated: a record part of 536870911 bytes"),
        (48, b"\xff\xff\xff\xff", 40, "announces 4294967295 labels"),
        (44, b"\x08", 40, "no room for its header"),
    ],
)
def test_damage_is_named(small: bytes, tmp_path: Path, place: int, content: bytes, at: int, message: str):
    path = tmp_path / "a.rec"
    path.write_bytes(small[:place] + content + small[place + len(content) :])
    with pytest.raises(DataError, match=message) as caught:
        scan(path)
    assert str(caught.value).startswith(f"{path}, byte {at}: ")


def test_every_truncation_is_seen(small: bytes, tmp_path: Path):
    path = tmp_path / "a.rec"
    path.write_bytes(small)
    whole = [*scan(path).offset.tolist(), len(small)]
    for length in range(len(small)):
        path.write_bytes(small[:length])
        if length in whole[1:]:  # cut between records: only the index or the header record can tell
            assert scan(path).offset.tolist() == whole[: whole.index(length)]
            continue
        with pytest.raises(DataError, match="truncated|is empty") as caught:
            scan(path)
        assert str(path) in str(caught.value)
        with pytest.raises(DataError, match="truncated|no record can start"):
            dict(RecordFile(path) if length else [(0, RecordFile(path).read(0))])


@settings(max_examples=300)
@given(data=st.data())
def test_damage_raises_only_data_errors(small: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    content = bytearray(small)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=12))
    path.write_bytes(content)
    _survives(path)


@settings(max_examples=200)
@given(content=st.binary(max_size=200))
def test_noise_raises_only_data_errors(content: bytes, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("rec") / "a.rec"
    path.write_bytes(content)
    _survives(path)
    path.write_bytes(MAGIC_BYTES + content)
    _survives(path)


def _survives(path: Path) -> None:
    """Read it every way: records that come back lie inside of the file, and anything else is a DataError."""
    size = path.stat().st_size
    tracemalloc.start()
    try:
        found = scan(path)
        assert (found.offset + found.size <= size).all()
    except DataError:
        found = None
    offsets = []
    try:
        for offset, record in RecordFile(path):
            offsets.append(offset)
            assert offset + len(record) <= size
            unpack(record)
    except DataError:
        pass
    if found is not None:
        assert found.offset.tolist()[: len(offsets)] == offsets
    for offset in (-4, 1, 4, size - 8, size, 2**60):
        with contextlib.suppress(DataError):
            assert len(RecordFile(path).read(offset)) <= size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # whatever lengths the damaged bytes claim


@given(content=st.binary(max_size=120))
def test_damaged_index_files(content: bytes, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("idx") / "a.idx"
    path.write_bytes(content)
    try:
        keys, offsets = read_index(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert len(keys) == len(offsets) and (np.diff(keys) > 0).all()


def test_index_messages(tmp_path: Path):
    path = tmp_path / "a.idx"
    for content, message in (
        ("0\t0\n1\tx\n", "line 2: b'1.tx' is not KEY<TAB>OFFSET"),
        ("0\t0\n0\t8\n", "the key 0 stands there twice"),
        ("0\t-4\n", "line 1"),
        ("7" * 100_000, "line 1"),
    ):
        path.write_text(content)
        with pytest.raises(DataError, match=message.replace(".t", r"\\t")):
            read_index(path)


def test_limits_and_missing_files(tmp_path: Path):
    path = tmp_path / "a.rec"
    write(path, [b"x" * 1000, (b"y" * 96 + MAGIC_BYTES) * 10])
    for offset in (0, 1008):
        with pytest.raises(DataError, match="more than 900 bytes"):
            RecordFile(path, limit=900).read(offset)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        scan(tmp_path / "none.rec")
    (tmp_path / "empty.rec").touch()
    with pytest.raises(DataError, match="has no record"):
        scan(tmp_path / "empty.rec")
    with pytest.raises(ValueError, match="holds at most"), RecordWriter(tmp_path / "b.rec") as writer:
        writer.write(0, bytes(1 << 29))


def test_a_scan_needs_no_memory_for_the_pictures(tmp_path: Path):
    stock = [tiny.jpeg(seed, 112) for seed in range(8)]
    with RecordWriter(tmp_path / "a.rec") as writer:
        for key in range(4000):
            writer.write(key, pack(Header(float(key // 10), key), 4 * stock[key % 8]))
    assert (tmp_path / "a.rec").stat().st_size > 30e6
    tracemalloc.start()
    found = scan(tmp_path / "a.rec")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 4000 and found.label.tolist() == [key // 10 for key in range(4000)]
    assert peak < 5e6
