"""Parquet files and LMDBs become data sets."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import SIZE, faces, pictures, skipped, write

from anonfw.data.card import DataError
from anonfw.data.sources.lmdb_store import lmdb_faces
from anonfw.data.sources.parquet_files import parquet
from anonfw.data.verify import verify_dataset

# Parquet


def write_parquet(path: Path, rows: list[tuple], column: str = "struct", names: list[str] | None = None) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra `sources` is not installed")
    import pyarrow.parquet

    if column == "struct":
        images = pa.array([{"bytes": jpeg, "path": "x.jpg"} for _, jpeg in rows])
    else:
        images = pa.array([jpeg for _, jpeg in rows], pa.binary())
    table = pa.table({"image": images, "label": pa.array([label for label, _ in rows])})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, row_group_size=5)


@pytest.mark.parametrize("workers", [1, 2])
def test_parquet_shuffled_over_files(tmp_path: Path, workers: int):
    people = faces(6)
    rows = [(label, jpeg) for label, jpegs in enumerate(people) for jpeg in jpegs]
    order = np.random.default_rng(1).permutation(len(rows))
    rows = [rows[number] for number in order]
    write_parquet(tmp_path / "in" / "data" / "train-00000-of-00002.parquet", rows[:8])
    write_parquet(tmp_path / "in" / "data" / "train-00001-of-00002.parquet", [*rows[8:], (2, None), (3, b"x")])
    write(tmp_path / "out", parquet(tmp_path / "in", "hub"), workers=workers)
    found = pictures(tmp_path / "out")
    assert {name: set(jpegs) for name, jpegs in found.items()} == {
        f"hub_{label:06d}": set(jpegs) for label, jpegs in enumerate(people)
    }
    place = {jpeg: i for i, (_, jpeg) in enumerate(rows)}
    assert all([place[j] for j in jpegs] == sorted(place[j] for j in jpegs) for jpegs in found.values())
    last = len(rows) - 8
    assert skipped(tmp_path / "out") == {
        f"data/train-00001-of-00002.parquet, row {last}": "not a readable picture",
        f"data/train-00001-of-00002.parquet, row {last + 1}": "not a readable picture",
    }
    assert verify_dataset(tmp_path / "out") == [] and not (tmp_path / "out" / ".stage").exists()


def test_parquet_names_and_binary_column(root: Path, tmp_path: Path):
    rows = [(label, tiny.jpeg(label)) for label in (2, 0, 1, 2)]
    write_parquet(tmp_path / "a.parquet", rows, "binary", names=["Ada", "Bob", "Cleo"])
    write(tmp_path / "out", parquet(tmp_path / "a.parquet", "hub"))
    assert set(pictures(tmp_path / "out")) == {"hub_Ada", "hub_Bob", "hub_Cleo"}
    write_parquet(tmp_path / "b.parquet", [("zoe", tiny.jpeg(1)), ("amy", tiny.jpeg(2))])
    command = [
        sys.executable,
        str(root / "data" / "parquet_faces.py"),
        str(tmp_path / "b.parquet"),
        str(tmp_path / "two"),
    ]
    options = ["--name", "hub", "--size", str(SIZE), "--workers", "1", "--splits", "train=1"]
    subprocess.run([*command, *options], cwd=root, capture_output=True, check=True)
    assert list(pictures(tmp_path / "two")) == ["hub_amy", "hub_zoe"]


def test_parquet_stage_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import anonfw.data.sources.parquet_files as module

    people = faces(6)
    write_parquet(tmp_path / "a.parquet", [(label, jpeg) for label, jpegs in enumerate(people) for jpeg in jpegs])
    source = parquet(tmp_path / "a.parquet", "hub")
    source.judge = _interrupt
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", source, workers=0)
    assert (tmp_path / "out" / ".stage" / "pictures.rec").is_file()
    monkeypatch.setattr(module, "RecordWriter", None)
    write(tmp_path / "out", parquet(tmp_path / "a.parquet", "hub"))
    assert pictures(tmp_path / "out") == {f"hub_{label:06d}": jpegs for label, jpegs in enumerate(people)}
    assert not (tmp_path / "out" / ".stage").exists()


def _interrupt(photos: list[str], pictures: list[bytes]) -> list:
    if photos[-1].endswith("row 8"):
        raise KeyboardInterrupt
    return [{} for _ in pictures]


def test_parquet_refusals(tmp_path: Path):
    write_parquet(tmp_path / "good.parquet", [(0, tiny.jpeg(1))])
    write_parquet(tmp_path / "floats.parquet", [(0.5, tiny.jpeg(1))])
    write_parquet(tmp_path / "nulls.parquet", [(0, tiny.jpeg(1)), (None, tiny.jpeg(1))])
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "good.parquet").read_bytes()[:-30])
    write_parquet(tmp_path / "mixed" / "a.parquet", [(0, tiny.jpeg(1))])
    write_parquet(tmp_path / "mixed" / "b.parquet", [("zero", tiny.jpeg(1))])
    for name, options, message in (
        ("nothing.parquet", {}, "no .parquet file there"),
        ("floats.parquet", {}, "'label' is double; expected whole numbers or strings"),
        ("nulls.parquet", {}, "a row without a label"),
        ("cut.parquet", {}, "not a readable parquet file"),
        ("mixed", {}, "labels are of another type"),
        ("good.parquet", {"label_column": "identity"}, "no column 'identity'; it has image, label"),
        ("good.parquet", {"image_column": "label", "label_column": "label"}, "'label' is int64; expected a struct"),
    ):
        with pytest.raises(DataError, match=message):
            parquet(tmp_path / name, "hub", **options)


# LMDB


def write_lmdb(path: Path, values: dict[bytes, bytes]) -> Path:
    lmdb = pytest.importorskip("lmdb", reason="the extra `sources` is not installed")
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)
    return path


def msgpacked(picture: bytes, label: int | str) -> bytes:
    if isinstance(label, str):
        packed = bytes([0xA0 | len(label)]) + label.encode()
    else:
        packed = bytes([label]) if label < 128 else b"\xcd" + struct.pack(">H", label)
    return b"\x92\xc5" + struct.pack(">H", len(picture)) + picture + packed


def lmdb_values(layout: str) -> tuple[dict[bytes, bytes], dict[str, list[bytes]]]:
    """A database and what shall come of it. More than ten pictures, so that key order is not number order."""
    people = faces(6)
    flat = [(label * 50, jpeg) for label, jpegs in enumerate(people) for jpeg in jpegs]
    expected = {f"m_{label * 50:06d}": jpegs for label, jpegs in enumerate(people)}
    if layout == "pickled":
        values = {str(i).encode(): pickle.dumps((jpeg, label), 4) for i, (label, jpeg) in enumerate(flat)}
        return {**values, b"__keys__": pickle.dumps(list(values)), b"__len__": pickle.dumps(len(values))}, expected
    if layout == "old pickles":
        values = {str(i).encode(): pickle.dumps((jpeg, str(label)), 2) for i, (label, jpeg) in enumerate(flat)}
        return {**values, b"__len__": b"15"}, expected
    if layout == "msgpacked":
        values = {str(i).encode(): msgpacked(jpeg, label) for i, (label, jpeg) in enumerate(flat)}
        return {**values, b"__len__": b"\x0f"}, expected
    if layout == "numbered":
        values = {b"num-samples": str(len(flat)).encode()}
        for number, (label, jpeg) in enumerate(flat, 1):
            values[f"image-{number:09d}".encode()], values[f"label-{number:09d}".encode()] = jpeg, str(label).encode()
        return values, expected
    values = {f"{'abcdef'[label // 50]}/{i}.jpg".encode(): jpeg for i, (label, jpeg) in enumerate(flat)}
    return values, {f"m_{'abcdef'[label]}": jpegs for label, jpegs in enumerate(people)}


@pytest.mark.parametrize("layout", ["pickled", "old pickles", "msgpacked", "numbered", "named"])
def test_lmdb_layouts(tmp_path: Path, layout: str):
    values, expected = lmdb_values(layout)
    path = write_lmdb(tmp_path / "db", values)
    write(tmp_path / "out", lmdb_faces(path, "m", progress=False))
    assert pictures(tmp_path / "out") == expected
    assert verify_dataset(tmp_path / "out") == []


def test_lmdb_script_with_workers(root: Path, tmp_path: Path):
    values, expected = lmdb_values("pickled")
    path = write_lmdb(tmp_path / "db", values)
    command = [sys.executable, str(root / "data" / "lmdb_faces.py"), str(path / "data.mdb"), str(tmp_path / "out")]
    options = ["--name", "m", "--size", str(SIZE), "--workers", "2"]
    subprocess.run([*command, *options], cwd=root, capture_output=True, check=True)
    assert pictures(tmp_path / "out") == expected


class Program:
    """What a pickle of it does when loaded the usual way: it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_a_pickle_runs_nothing(tmp_path: Path):
    value = pickle.dumps((tiny.jpeg(1), Program(tmp_path / "made by the pickle")))
    path = write_lmdb(tmp_path / "db", {b"0": value, b"__len__": b"1"})
    with pytest.raises(DataError, match="the pickle names posix.mkdir; only bytes, numbers"):
        lmdb_faces(path, "m", progress=False)
    assert not (tmp_path / "made by the pickle").exists()
    pickle.loads(value)  # the usual way
    assert (tmp_path / "made by the pickle").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({b"a": b"x"}, "layout that is not known .its first key is b'a'"),
        ({b"__len__": b"0"}, "has no pictures"),
        ({b"__len__": b"1", b"0": b"\x93abc"}, "neither a plain pickled nor a msgpacked"),
        ({b"__len__": b"1", b"0": pickle.dumps((b"x", 1, 2))}, "expected a pair"),
        ({b"__len__": b"1", b"0": pickle.dumps(("x", 1))}, "expected a pair"),
        ({b"__len__": b"1", b"0": pickle.dumps((b"x", 1.5))}, "the label is float"),
        ({b"__len__": b"1", b"0": pickle.dumps((b"x", " "))}, "the label is empty"),
        ({b"__len__": b"1", b"0": pickle.dumps((b"x", b"\xff"))}, "is no text"),
        ({b"num-samples": b"many"}, "num-samples is b'many', no number"),
        ({b"num-samples": b"2", b"image-000000001": b"x", b"label-000000001": b"1"}, "label-000000002 is missing"),
        ({b"a/1.jpg": b"x", b"b": b"x"}, "expected PERSON/PHOTO"),
    ],
)
def test_lmdb_refusals(tmp_path: Path, values: dict[bytes, bytes], message: str):
    with pytest.raises(DataError, match=message):
        lmdb_faces(write_lmdb(tmp_path / "db", values), "m", progress=False)


def test_lmdb_that_is_none(tmp_path: Path):
    pytest.importorskip("lmdb", reason="the extra `sources` is not installed")
    (tmp_path / "file").write_bytes(b"x" * 9000)
    for path in (tmp_path / "file", tmp_path / "nowhere"):
        with pytest.raises(DataError, match="is not a readable LMDB"):
            lmdb_faces(path, "m", progress=False)


@settings(max_examples=200)
@given(
    value=st.one_of(st.binary(max_size=60), st.binary(max_size=60).map(lambda b: b"\x80\x04" + b)),
    place=st.integers(0, 99),
)
def test_damaged_values_raise_only_data_errors(value: bytes, place: int):
    from anonfw.data.sources.lmdb_store import _pair

    for tried in (value, b"\x92" + value, msgpacked(b"picture", 300)[:place], pickle.dumps((b"picture", 3))[:place]):
        with contextlib.suppress(DataError):
            picture, _ = _pair(tried, "here")
            assert isinstance(picture, bytes)


# Installation


@pytest.mark.parametrize(("module", "script"), [("pyarrow", "parquet_faces.py"), ("lmdb", "lmdb_faces.py")])
def test_a_missing_library_is_named(root: Path, tmp_path: Path, module: str, script: str):
    (tmp_path / "a.parquet").write_bytes(b"")
    code = f"import runpy, sys; sys.modules[{module!r}] = None; sys.argv[0] = {str(root / 'data' / script)!r}; "
    code += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'anonfw[sources]'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["casia_webface.py", "dcface.py", "parquet_faces.py", "lmdb_faces.py"])
def test_scripts_load_no_torch(root: Path, script: str):
    code = (
        f"import runpy, sys; sys.argv = [{script!r}, '--help']\ntry: runpy.run_path({str(root / 'data' / script)!r}, "
    )
    code += "run_name='__main__')\nexcept SystemExit as done: assert not done.code\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"--workers", done.stdout)
