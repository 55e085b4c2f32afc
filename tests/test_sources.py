"""Published face sets become data sets: InsightFace's records, and what holds for every source."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tiny_dataset as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_sources import SIZE, contents, faces, pictures, skipped, write

from anonfw.align import template
from anonfw.data.card import Card, DataError
from anonfw.data.index import open_index
from anonfw.data.loader import FaceLoader
from anonfw.data.recordio import Header, RecordWriter, pack, write_face_set
from anonfw.data.sources import Group
from anonfw.data.sources.convert import Crop, Worker, _outcomes
from anonfw.data.sources.records import insightface
from anonfw.data.verify import verify_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ANONFW_CACHE", str(folder))
    return folder


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


def test_few_pictures_wait_for_the_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import anonfw.data.sources.convert as module

    waiting = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, workers: int, _context: object, start: Callable, arguments: tuple) -> None:
            super().__init__(workers, initializer=start, initargs=arguments)

        def submit(self, function: Callable, group: Group) -> Future:
            waiting.append(len(group.places))
            return super().submit(function, group)

    write_face_set(tmp_path / "set", people := faces(40), SIZE)
    source = insightface(tmp_path / "set", "a", progress=False)
    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(module, "UNDER_WAY", 10)
    taken = 0
    for number, (group, (samples, _)) in enumerate(_outcomes(source.groups(), Worker(source, Crop(SIZE)), 2)):
        assert group.name == f"a_{number:06d}" and [sample.jpeg for sample in samples] == people[number]
        taken += len(group.places)
        assert sum(waiting) - taken <= 10 and waiting
    assert taken == sum(waiting) == sum(map(len, people))


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
