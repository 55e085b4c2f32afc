"""DCFace's release and folders a person become data sets; the id image is marked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset as tiny
from hypothesis import given
from hypothesis import strategies as st
from tiny_sources import SIZE, contents, faces, pictures, skipped, write

from anonfw.data.card import Card, DataError
from anonfw.data.loader import FaceLoader
from anonfw.data.recordio import Header, RecordWriter, pack
from anonfw.data.sources.folders import folders
from anonfw.data.sources.id_images import COPY, mark
from anonfw.data.sources.records import dcface, natural
from anonfw.data.verify import verify_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ANONFW_CACHE", str(folder))
    return folder


# DCFace


def oversampled(count: int = 4) -> list[list[bytes]]:
    """Three pictures a person, the second one (the id image) three times, at the end."""
    return [
        [tiny.jpeg(10 * person), tiny.jpeg(10 * person + 1), tiny.jpeg(10 * person + 2)]
        + 2 * [tiny.jpeg(10 * person + 1)]
        for person in range(count)
    ]


def write_dcface(folder: Path, people: list[list[bytes]]) -> None:
    """As its Writer does: label 0 everywhere, no header record, INDEX<TAB>PERSON/PHOTO."""
    folder.mkdir(parents=True)
    flat = [(f"{person}/{photo}.jpg", jpeg) for person, jpegs in enumerate(people) for photo, jpeg in enumerate(jpegs)]
    with RecordWriter(folder / "file.rec") as writer:
        for key, (_, jpeg) in enumerate(flat):
            writer.write(key, pack(Header(0.0, key), jpeg))
    (folder / "list.txt").write_text("".join(f"{key}\t{path}\n" for key, (path, _) in enumerate(flat)))


def test_dcface_release(root: Path, tmp_path: Path):
    people = oversampled(12)
    write_dcface(tmp_path / "release" / "record", people)
    command = [sys.executable, str(root / "data" / "dcface.py"), str(tmp_path / "release"), str(tmp_path / "out")]
    options = ["--size", str(SIZE), "--splits", "train=0.5,val=0.5", "--workers", "1"]
    done = subprocess.run([*command, *options], cwd=root, capture_output=True, text=True, check=True)
    assert "36 pictures of 12 people written now, 24 skipped" in done.stdout
    assert verify_dataset(tmp_path / "out") == []
    found = contents(tmp_path / "out")
    assert list(found) != [] and set(found) == {f"dcface_{person}" for person in range(12)}
    for person, jpegs in enumerate(people):
        samples = found[f"dcface_{person}"]
        assert [jpeg for _, jpeg, _ in samples] == jpegs[:3]
        assert [factors["id_image"] for _, _, factors in samples] == [0, 1, 0]
    assert set(skipped(tmp_path / "out").values()) == {COPY}
    loader = FaceLoader(tmp_path / "out", "train", 4, workers=0)
    assert set(np.unique(next(iter(loader)).factors["id_image"])) <= {0.0, 1.0}


def test_dcface_folder_and_options(root: Path, tmp_path: Path):
    for person, jpegs in enumerate(oversampled(3)):
        for photo, jpeg in enumerate(jpegs):
            place = tmp_path / "images" / str(person) / (f"{photo}.jpg" if photo != 2 else "id.jpg")
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(jpeg)
    base = [sys.executable, str(root / "data" / "dcface.py"), str(tmp_path / "images")]
    options = ["--size", str(SIZE), "--splits", "train=1", "--workers", "1"]
    subprocess.run([*base, str(tmp_path / "out"), *options, "--keep-copies"], cwd=root, capture_output=True, check=True)
    found = contents(tmp_path / "out")
    assert [factors["id_image"] for _, _, factors in found["dcface_0"]] == [0, 1, 1, 1, 0]  # 0 1 3 4 id: natural order
    options += ["--id-image", r"/id\.jpg$"]
    subprocess.run([*base, str(tmp_path / "named"), *options], cwd=root, capture_output=True, check=True)
    found = contents(tmp_path / "named")
    assert [factors["id_image"] for _, _, factors in found["dcface_1"]] == [0, 0, 1]
    assert Card.load(tmp_path / "named").about["source"]["copies"] == "left out"


def test_without_copies_the_id_image_is_unknown():
    assert mark(["a", "b"], [b"1", b"2"]) == [{}, {}]
    assert mark(["a", "b", "c"], [b"1", b"1", b"2"]) == [{"id_image": 1.0}, COPY, {"id_image": 0.0}]
    assert mark(["a", "b"], [b"1", b"2"], id_image="b") == [{"id_image": 0.0}, {"id_image": 1.0}]
    assert mark(["a", "b"], [b"1", b"2"], id_image="x") == [{}, {}]


def test_dcface_lists(tmp_path: Path):
    write_dcface(tmp_path / "set", oversampled(2))
    listing = tmp_path / "set" / "list.txt"
    good = listing.read_text()
    for text, message in (
        (good.replace("3\t0/3.jpg\n", ""), "does not name record 3 .1 such"),
        (good.replace("3\t0/3.jpg", "3\t3.jpg"), "line 4: .*is not INDEX<TAB>PERSON/PHOTO"),
        (good.replace("3\t0/3.jpg", "x\t0/3.jpg"), "line 4"),
        (good + "99\t0/9.jpg\n", "no record 99"),
        (None, "is missing: the records of DCFace have no labels"),
    ):
        listing.unlink() if text is None else listing.write_text(text)
        with pytest.raises(DataError, match=message):
            dcface(tmp_path / "set", progress=False)


def test_natural_order():
    assert sorted(["10", "9", "b", "a2", "a10", "²", ""], key=natural) == ["", "9", "10", "a2", "a10", "b", "²"]


@given(st.lists(st.text(max_size=6)))
def test_natural_order_takes_any_name(names: list[str]):
    assert sorted(sorted(names, key=natural, reverse=True), key=natural) == sorted(names, key=natural)


# Folders


def test_folders_copy_jpegs(tmp_path: Path):
    people = faces(5)
    for person, jpegs in enumerate(people):
        (tmp_path / "in" / f"p{person}").mkdir(parents=True)
        for photo, jpeg in enumerate(jpegs):
            (tmp_path / "in" / f"p{person}" / f"{photo}.JPG").write_bytes(jpeg)
    (tmp_path / "in" / "p0" / "notes.txt").write_text("no picture")
    (tmp_path / "in" / "file").touch()
    write(tmp_path / "out", folders(tmp_path / "in", "f"))
    assert pictures(tmp_path / "out") == {f"f_p{person}": jpegs for person, jpegs in enumerate(people)}
    with pytest.raises(DataError, match="no sub-folder with pictures"):
        folders(tmp_path / "in" / "p0", "f")
    with pytest.raises(DataError, match="is not a folder"):
        folders(tmp_path / "nowhere", "f")
