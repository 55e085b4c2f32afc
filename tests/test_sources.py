"""Published face sets become data sets: InsightFace's and DCFace's records, folders, parquet, LMDB."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tiny_dataset as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from anonfw.align import template
from anonfw.data.card import Card, DataError
from anonfw.data.index import open_index
from anonfw.data.loader import FaceLoader
from anonfw.data.recordio import Header, RecordWriter, pack, write_face_set
from anonfw.data.sources import Source
from anonfw.data.sources.convert import Crop, convert
from anonfw.data.sources.folders import folders
from anonfw.data.sources.id_images import COPY, mark
from anonfw.data.sources.lmdb_store import lmdb_faces
from anonfw.data.sources.parquet_files import parquet
from anonfw.data.sources.records import dcface, insightface, natural
from anonfw.data.verify import verify_dataset

SIZE = tiny.SIZE
NAMED = {"name": "set", "title": "a test", "licence": "none", "splits": {"train": 0.7, "val": 0.3}, "seed": 0}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ANONFW_CACHE", str(folder))
    return folder


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


# InsightFace


def test_records_return_byte_for_byte(tmp_path: Path):
    people = faces()
    write_face_set(tmp_path / "set", people, SIZE)
    counts = write(tmp_path / "out", insightface(tmp_path / "set", "casia", progress=False))
    assert counts == {"identities": 9, "samples": sum(map(len, people)), "skipped": 0}
    assert verify_dataset(tmp_path / "out") == []
    assert pictures(tmp_path / "out") == {f"casia_{i:06d}": jpegs for i, jpegs in enumerate(people)}
    card = Card.load(tmp_path / "out")
    assert (card.image_size, card.alignment, card.splits()) == (SIZE, "arcface", ["train", "val"])
    about = card.about
    assert about["given"] == {"identities": 9, "pictures": sum(map(len, people))} and about["skipped"] == 0
    assert about["source"]["images"] == sum(map(len, people)) and "note" not in about["source"]
    import hashlib

    for file in ("train.rec", "train.idx", "train.lst", "property"):
        stored = (tmp_path / "set" / file).read_bytes()
        assert about["source"]["files"][file] == {"bytes": len(stored), "sha256": hashlib.sha256(stored).hexdigest()}
    shard = card.shards[0]
    index = open_index(tmp_path / "out" / shard.file, shard)
    assert np.allclose(index.landmarks, template("arcface", SIZE), atol=0.01)


def test_shuffled_records_are_grouped(tmp_path: Path):
    """No header record, no index: people come from the labels alone, also when their pictures lie apart."""
    people = faces(7)
    flat = [(label, jpeg) for label, jpegs in enumerate(people) for jpeg in jpegs]
    order = np.random.default_rng(3).permutation(len(flat))
    with RecordWriter(tmp_path / "set.rec") as writer:
        for key, number in enumerate(order.tolist()):
            label, jpeg = flat[number]
            writer.write(key, pack(Header(np.array([label, 0.5]) if key % 2 else float(label), key), jpeg))
    (tmp_path / "set.idx").unlink()
    write(tmp_path / "out", insightface(tmp_path, "casia", progress=False))
    assert verify_dataset(tmp_path / "out") == []
    found = pictures(tmp_path / "out")
    assert {name: set(jpegs) for name, jpegs in found.items()} == {
        f"casia_{label:06d}": set(jpegs) for label, jpegs in enumerate(people)
    }
    place = {jpeg: i for i, jpeg in enumerate(flat[number][1] for number in order.tolist())}
    assert all([place[jpeg] for jpeg in jpegs] == sorted(place[jpeg] for jpeg in jpegs) for jpegs in found.values())


def test_script_workers_and_interruption(root: Path, tmp_path: Path):
    """One worker, two workers, and a run that is killed and continued: the same files byte for byte."""
    people = [faces(9)[number % 9] for number in range(300)]
    people[5] = [b"no picture", tiny.jpeg(3)]
    write_face_set(tmp_path / "set", people, SIZE)

    def command(out: str, workers: int) -> list[str]:
        arguments = ["--size", SIZE, "--shard-samples", 40, "--workers", workers, "--splits", "train=0.8,val=0.2"]
        named = [tmp_path / "set", tmp_path / out, *arguments]
        return [sys.executable, str(root / "data" / "casia_webface.py"), *map(str, named)]

    done = subprocess.run(command("one", 1), cwd=root, capture_output=True, text=True, check=True)
    assert "pictures of 300 people written now, 1 skipped" in done.stdout
    subprocess.run(command("two", 2), cwd=root, capture_output=True, check=True)
    process = subprocess.Popen(command("killed", 2), cwd=root, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        while len(list((tmp_path / "killed").glob("*.tar"))) < 3 and process.poll() is None:
            time.sleep(0.001)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*.tar")}
    assert not Card.load(tmp_path / "killed", complete=False).complete
    with open(tmp_path / "killed" / "skipped.jsonl", "ab") as log:
        log.write(b'{"photo": "train.rec, rec')  # half a line
    subprocess.run(command("killed", 2), cwd=root, capture_output=True, check=True)
    named = {shard.file for shard in Card.load(tmp_path / "killed").shards}
    assert first.keys() <= named
    files = {out: {p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("one", "two", "killed")}
    assert files["one"] == files["two"] == files["killed"]
    assert any((tmp_path / "killed" / name).stat().st_mtime_ns == changed for name, changed in first.items())
    assert verify_dataset(tmp_path / "one") == []
    batch = next(iter(FaceLoader(tmp_path / "one", "train", 4, "pairs", workers=0)))
    assert batch.image.shape[1:] == (3, SIZE, SIZE)
    again = subprocess.run(command("one", 1), cwd=root, capture_output=True, text=True, check=True)
    assert "0 pictures of 0 people written now" in again.stdout
    assert {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()} == files["two"]


def test_splits_share_nobody_and_do_not_depend_on_the_set(tmp_path: Path):
    write_face_set(tmp_path / "set", faces(40), SIZE)
    write_face_set(tmp_path / "part", faces(15), SIZE)
    for name in ("set", "part"):
        write(tmp_path / f"{name}_out", insightface(tmp_path / name, "casia", progress=False))

    def split_of(out: Path) -> dict[str, str]:
        shards = Card.load(out).shards
        return {
            name.decode(): shard.split
            for shard in shards
            for name in open_index(out / shard.file, shard).names.tolist()
        }

    whole, part = split_of(tmp_path / "set_out"), split_of(tmp_path / "part_out")
    assert len(whole) == 40 and set(whole.values()) == {"train", "val"}
    assert part.items() <= whole.items()


def test_pictures_that_cannot_be_copied(tmp_path: Path):
    grey = simplejpeg.encode_jpeg(tiny.picture(1)[..., :1].copy(), 95, colorspace="GRAY")
    large = tiny.jpeg(2, 64)
    png = cv2.imencode(".png", tiny.picture(3)[..., ::-1])[1].tobytes()
    wide = cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes()
    broken, good = tiny.jpeg(4)[:-40], tiny.jpeg(5)
    write_face_set(tmp_path / "set", [[grey, large, png, wide, broken, b"", b"\xff\xd8", good]], SIZE)
    write(tmp_path / "out", insightface(tmp_path / "set", "a", progress=False), splits={"train": 1.0})
    (samples,) = contents(tmp_path / "out").values()
    assert [key.rpartition("_")[2] for key, _, _ in samples] == ["0001", "0002", "0003", "0008"]
    assert samples[3][1] == good and verify_dataset(tmp_path / "out") == []
    assert simplejpeg.decode_jpeg_header(samples[0][1])[2] == "YCbCr"
    made = [simplejpeg.decode_jpeg(jpeg).astype(int) for _, jpeg, _ in samples]
    assert np.abs(made[1] - cv2.resize(tiny.picture(2, 64), (SIZE, SIZE), interpolation=cv2.INTER_AREA)).mean() < 6
    assert np.abs(made[2] - tiny.picture(3)).mean() < 6
    assert skipped(tmp_path / "out") == {
        "train.rec, record 4": "30 x 20 px is no aligned crop: it is not square",
        "train.rec, record 5": "its JPEG is broken",
        "train.rec, record 6": "not a readable picture",
        "train.rec, record 7": "its JPEG is broken",
    }


def test_min_photos_and_limit(tmp_path: Path):
    write_face_set(tmp_path / "set", faces(9), SIZE)
    source = insightface(tmp_path / "set", "a", progress=False)
    write(tmp_path / "out", source, min_photos=3, limit=4)
    assert sorted(pictures(tmp_path / "out")) == [f"a_{label:06d}" for label in (1, 2, 4, 5)]
    with pytest.raises(DataError, match="nobody has 9 or more"):
        write(tmp_path / "none", source, min_photos=9)
    assert not (tmp_path / "none").exists()


def test_scan_is_kept_until_the_file_changes(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    import anonfw.data.sources.records as records

    write_face_set(tmp_path / "set", faces(3), SIZE)
    first = insightface(tmp_path / "set", "a", progress=False)
    monkeypatch.setattr(records, "scan", None)
    again = insightface(tmp_path / "set", "a", progress=False)
    assert np.array_equal(first.places, again.places) and first.about == again.about
    monkeypatch.undo()
    monkeypatch.setenv("ANONFW_CACHE", str(cache))
    write_face_set(tmp_path / "set", faces(4), SIZE)
    assert len(insightface(tmp_path / "set", "a", progress=False).places) > len(first.places)
    (stored,) = (cache / "scans").iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    assert len(insightface(tmp_path / "set", "a", progress=False).places) > len(first.places)


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_contradictions_in_a_face_set(tmp_path: Path):
    def expect(message: str, damage) -> None:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        write_face_set(tmp_path / "set", faces(4), SIZE)
        damage(tmp_path / "set")
        with pytest.raises(DataError, match=message) as caught:
            insightface(tmp_path / "set", "a", progress=False)
        assert str(tmp_path) in str(caught.value)

    def records(*made: tuple[int, bytes]):
        def damage(folder: Path) -> None:
            for file in ("train.lst", "property"):
                (folder / file).unlink()
            with RecordWriter(folder / "train.rec") as writer:
                for key, record in made:
                    writer.write(key, record)

        return damage

    header = pack(Header(np.array([3.0, 4.0])))
    image = pack(Header(0.0, 1), tiny.jpeg(0))
    other = pack(Header(1.0, 2), tiny.jpeg(1))
    person = pack(Header(np.array([1.0, 3.0]), 3))
    expect(
        "points to byte 44 of train.rec, where no record starts",
        lambda f: _replace(f / "train.idx", "\t40\n", "\t44\n"),
    )
    expect("names 15 of the 16 records", lambda f: _replace(f / "train.idx", "1\t40\n", ""))
    expect("cannot be read|no .rec file", lambda f: (f / "train.rec").unlink())
    expect("label 3, but .*property says that there are 2 people", lambda f: (f / "property").write_text("2,112,112\n"))
    expect("is not PEOPLE,HEIGHT,WIDTH", lambda f: (f / "property").write_text("people\n"))
    expect("images have the keys 1 to 2, but 1 of these exist", records((0, header), (1, image), (3, person)))
    expect("people's records are 3 to 9", records((0, pack(Header(np.array([3.0, 9.0])))), (1, image), (2, other)))
    expect("people's records are nan", records((0, pack(Header(np.array([np.nan, 4.0])))), (1, image), (2, other)))
    expect(
        "images 1 to 30, outside",
        records((0, header), (1, image), (2, other), (3, pack(Header(np.array([1.0, 30.0]), 3)))),
    )
    expect("label 0.5 is no person's", records((0, pack(Header(0.5, 0), b"x")), (1, other)))
    expect("label -1 is no person's", records((0, pack(Header(-1.0, 0), b"x")), (1, other)))
    expect("label nan is no person's", records((0, pack(Header(np.nan, 0), b"x")), (1, other)))
    expect("label inf is no person's", records((0, pack(Header(np.inf, 0), b"x")), (1, other)))
    expect("all 2 records have the label 0.*data/dcface.py", records((0, image), (1, image)))
    expect("there are no images", records((0, pack(Header(np.array([1.0, 2.0])))), (1, pack(Header(np.ones(2), 1)))))
    expect(
        "expected train.rec there",
        lambda f: [shutil.copy(f / "train.rec", f / n) for n in ("a.rec", "b.rec")] and (f / "train.rec").unlink(),
    )
    with pytest.raises(DataError, match="no such folder"):
        insightface(tmp_path / "nowhere", "a", progress=False)


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_face_set_raises_only_data_errors(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory):
    """Any byte of any of the four files: it is refused, or whatever can be read is read."""
    folder = tmp_path_factory.mktemp("damaged")
    write_face_set(folder, [[b"a" * 30, b"b"], [b"c" * 7]], SIZE)
    path = folder / data.draw(st.sampled_from(["train.rec", "train.rec", "train.idx", "property", "train.lst"]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        source = insightface(folder, "a", progress=False)
        for group in source.groups():
            for place in group.places:
                source.reader.read(place)
    except DataError:
        pass


def test_lines_of_lst_are_only_compared(tmp_path: Path):
    write_face_set(tmp_path / "set", faces(3), SIZE)
    (tmp_path / "set" / "train.lst").write_text("1\ta\t0\n")
    about = insightface(tmp_path / "set", "a", progress=False).about
    assert about["note"] == "train.lst has 1 lines for 9 images; it was not used"


def test_another_source_or_setting_is_not_mixed(tmp_path: Path):
    write_face_set(tmp_path / "set", faces(3), SIZE)
    write(tmp_path / "out", insightface(tmp_path / "set", "a", progress=False))
    with pytest.raises(DataError, match="begun with other settings .seed"):
        write(tmp_path / "out", insightface(tmp_path / "set", "a", progress=False), seed=5)
    write_face_set(tmp_path / "set", faces(4), SIZE)
    with pytest.raises(DataError, match="begun with other settings .*source"):
        write(tmp_path / "out", insightface(tmp_path / "set", "a", progress=False))


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
