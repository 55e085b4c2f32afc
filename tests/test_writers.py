"""The scripts of data/: photographs to data sets, with and without detection."""

from __future__ import annotations

import json
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import tiny_dataset as tiny
from hypothesis import given
from hypothesis import strategies as st

from anonfw import align
from anonfw.data.build import Cropper, Person, Recipe, build, folder_people, key_of, split_of
from anonfw.data.card import KEY, Card, DataError
from anonfw.data.index import open_index
from anonfw.data.loader import FaceLoader
from anonfw.data.table import open_table
from anonfw.data.verify import verify_dataset
from anonfw.data.writer import Sample

SPLITS = {"train": 0.8, "val": 0.1, "test": 0.1}


# Names


@given(st.text(min_size=1), st.integers(0, 99999))
def test_any_name_gives_a_key(name: str, number: int):
    assert KEY.fullmatch(key_of(name, number))


@given(st.lists(st.text(min_size=1, max_size=100), unique=True, max_size=30))
def test_keys_of_different_people_differ(names: list[str]):
    assert len({key_of(name, 1) for name in names}) == len(names)


@given(st.text(), st.integers(0, 2**31))
def test_a_split_depends_on_seed_and_name_only(name: str, seed: int):
    assert split_of(name, SPLITS, seed) == split_of(name, {k: 10 * v for k, v in SPLITS.items()}, seed)
    assert split_of(name, {"all": 1.0}, seed) == "all"
    assert split_of(name, {"none": 0.0, "all": 1.0}, seed) == "all"


def test_splits_have_their_shares():
    found = [split_of(f"person {i}", SPLITS, 0) for i in range(5000)]
    assert found.count("train") == pytest.approx(4000, abs=100)
    assert found.count("val") == pytest.approx(500, abs=80)
    assert found != [split_of(f"person {i}", SPLITS, 1) for i in range(5000)]


# Folders of aligned crops: no networks


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """12 people with two aligned crops each, some things beside them, and two photos that cannot be used."""
    folder = tmp_path / "photos"
    for number in range(12):
        place = folder / (f"person_{number:02d}" if number else "Zoë O'Hara")
        place.mkdir(parents=True)
        for photo in range(2):
            image = tiny.picture(10 * number + photo, 48)
            cv2.imwrite(str(place / f"{photo}.png"), image[..., ::-1])
    (folder / "person_01" / "notes.txt").write_text("no picture")
    (folder / "person_02" / "broken.jpg").write_bytes(tiny.jpeg(0)[:100])
    cv2.imwrite(str(folder / "person_03" / "wide.png"), np.zeros((48, 60, 3), np.uint8))
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def script(root: Path, monkeypatch, capsys):
    """Runs a script of data/ in this process: exit code, what it printed, what it complained."""

    def run(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(root / "data" / name), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return run


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_image_folder_script(root: Path, script, photos: Path, tmp_path: Path):
    arguments = ("--aligned", "--size", 48, "--name", "mine", "--shard-samples", 6, "--splits", "train=0.7,val=0.3")
    code, printed, bar = script("image_folder.py", photos, tmp_path / "one", *arguments, "--workers", 1)
    assert code == 0 and "24 photos of 12 people written now, 2 skipped" in printed
    assert "26/26" in bar  # it counts every photo
    command = [sys.executable, root / "data" / "image_folder.py", photos, tmp_path / "two", *arguments, "--workers", 2]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert verify_dataset(tmp_path / "one") == []
    skipped = [json.loads(line) for line in (tmp_path / "one" / "skipped.jsonl").read_text().splitlines()]
    assert [(Path(each["photo"]).name, each["reason"].split()[0]) for each in skipped] == [
        ("broken.jpg", "not"),
        ("wide.png", "60"),
    ]
    card = Card.load(tmp_path / "one")
    assert card.image_size == 48 and card.splits() == ["train", "val"]
    table = open_table(tmp_path / "one", "train")
    assert "Zoë O'Hara" in table.people + open_table(tmp_path / "one", "val").people
    assert np.allclose(table.landmarks[0], align.template("arcface", 48), atol=0.01)
    batch = next(iter(FaceLoader(tmp_path / "one", "train", 4, "pairs", workers=0)))
    number = int(batch.key[0].split("_")[1]) if batch.key[0].startswith("person") else 0
    original = tiny.picture(10 * number + int(batch.key[0][-1]) - 1, 48).astype(int)
    assert np.abs(batch.image[0].permute(1, 2, 0).numpy() - original).mean() < 4  # a JPEG of quality 95
    _, printed, _ = script("image_folder.py", photos, tmp_path / "one", *arguments)
    assert "0 photos of 0 people written now" in printed
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


@pytest.mark.slow
def test_a_killed_script_continues(root: Path, photos: Path, tmp_path: Path):
    for number in range(12, 44):
        shutil.copytree(photos / "person_05", photos / f"person_{number:03d}")
    arguments = [photos, "OUT", "--aligned", "--size", 256, "--shard-samples", 8, "--workers", 1]

    def command(out: Path) -> list[str]:
        named = [str(out) if each == "OUT" else str(each) for each in arguments]
        return [sys.executable, str(root / "data" / "image_folder.py"), *named]

    subprocess.run(command(tmp_path / "whole"), cwd=root, check=True, capture_output=True)
    process = subprocess.Popen(command(tmp_path / "killed"), cwd=root, stderr=subprocess.DEVNULL)
    while len(list((tmp_path / "killed").glob("*.tar"))) < 3 and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not Card.load(tmp_path / "killed", complete=False).complete
    subprocess.run(command(tmp_path / "killed"), cwd=root, check=True, capture_output=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_script_refusals(script, photos: Path, tmp_path: Path):
    for arguments, message in (
        ((tmp_path / "nowhere", tmp_path / "out"), "is not a folder; expected"),
        ((photos / "empty", tmp_path / "out"), "no sub-folder with pictures"),
        ((photos, tmp_path / "out", "--splits", "train"), "expected NAME=SHARE"),
        ((photos, tmp_path / "out", "--min-photos", 9), "no photographs for folder"),
    ):
        code, _, complaint = script("image_folder.py", *arguments, "--aligned")
        assert code == 2 and message in complaint
    assert not (tmp_path / "out" / "card.json").exists()


def test_other_settings_are_not_mixed(photos: Path, tmp_path: Path):
    people = folder_people(photos)[:2]
    named = {"name": "mine", "source": "x", "licence": "x", "splits": {"train": 1.0}, "progress": False}
    build(tmp_path / "out", people, Recipe(48, aligned=True), seed=0, **named)
    with pytest.raises(DataError, match="other settings"):
        build(tmp_path / "out", people, Recipe(48, aligned=True, quality=50), seed=0, **named)


# Detection and alignment


@pytest.fixture(scope="session")
def weights():
    """Detector and estimators, fetched where needed."""
    from anonfw.weights import WeightsError, path

    try:
        return [path(name) for name in ("scrfd_500m", "head_pose", "landmarks_106")]
    except WeightsError as error:
        pytest.skip(f"the detector cannot be had here: {error}")


@pytest.fixture(scope="session")
def scene(embedded: Path, weights, tmp_path_factory) -> tuple[Path, np.ndarray, np.ndarray]:
    """A turned and enlarged face of nobody on grey, and where its five points lie; another, small face in a corner."""
    table = open_table(embedded, "val")
    pictures = FaceLoader(embedded, "val", 8, shuffle=False, workers=0)
    batch = next(iter(pictures))
    face, small = (batch.image[row].permute(1, 2, 0).numpy() for row in (0, 7))
    zoom, turn = 1.8, np.deg2rad(12)
    rotation = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    matrix = np.concatenate([rotation, [[140], [60]]], axis=1)
    canvas = np.full((480, 480, 3), 128, np.uint8)
    inside = cv2.warpAffine(np.full(face.shape[:2], 255, np.uint8), matrix, (480, 480)) > 128
    canvas[inside] = cv2.warpAffine(face, matrix, (480, 480))[inside]
    canvas[400:480, 0:80] = cv2.resize(small, (80, 80), interpolation=cv2.INTER_AREA)
    folder = tmp_path_factory.mktemp("scene") / "people" / "nobody"
    folder.mkdir(parents=True)
    cv2.imwrite(str(folder / "1.png"), canvas[..., ::-1])
    cv2.imwrite(str(folder / "2.png"), np.full((200, 200, 3), 128, np.uint8))
    return folder.parent, align.transform_points(table.landmarks[0], matrix), canvas


@pytest.mark.parametrize(("alignment", "size"), [("arcface", 112), ("portrait", 128), ("portrait", 64)])
def test_the_main_face_is_found_and_aligned(scene, alignment: str, size: int):
    folder, points, canvas = scene
    sample = Cropper(Recipe(size, alignment)).sample(folder / "nobody" / "1.png", "key")
    assert isinstance(sample, Sample)
    assert np.abs(sample.landmarks - align.template(alignment, size)).max() < 0.06 * size
    crop = simplejpeg.decode_jpeg(sample.jpeg)
    assert crop.shape == (size, size, 3)
    expected = align.warp(canvas, align.similarity(points, align.template(alignment, size)), size)
    assert np.abs(crop.astype(int) - expected).mean() < 12


def test_folders_with_detection_and_factors(scene, tmp_path: Path):
    folder, _, _ = scene
    named = {"name": "mine", "source": "x", "licence": "x", "splits": {"train": 1.0}, "progress": False}
    counts = build(tmp_path / "out", folder_people(folder), Recipe(112, "portrait", factors=True), seed=0, **named)
    assert counts == {"identities": 1, "samples": 1, "skipped": 1}
    shard = Card.load(tmp_path / "out").shards[0]
    index = open_index(tmp_path / "out" / shard.file, shard)
    assert {b"yaw", b"pitch", b"roll", b"mouth_open", b"smile", b"eye_open", b"brightness"} <= set(
        index.factor_names.tolist()
    )
    assert np.isfinite(index.factors).all()
    assert "no face found" in (tmp_path / "out" / "skipped.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.shared
def test_lfw_script(script, real_data: Path, weights, tmp_path: Path):
    arguments = ("--limit", 8, "--alignment", "portrait", "--size", 96, "--factors", "--workers", 1)
    script("lfw.py", real_data / "lfw", tmp_path / "lfw", *arguments)
    assert verify_dataset(tmp_path / "lfw") == []
    card = Card.load(tmp_path / "lfw")
    people = sum(shard.identities for shard in card.shards)
    samples = sum(shard.samples for shard in card.shards)
    expected = sorted(path for path in (real_data / "lfw").iterdir() if path.is_dir())[:8]
    assert people == 8 and samples >= 0.98 * sum(len(list(each.iterdir())) for each in expected)
    found = {name for split in card.splits() for name in open_table(tmp_path / "lfw", split).people}
    assert found == {path.name for path in expected}
    table = open_table(tmp_path / "lfw", "train")
    assert np.abs(table.landmarks - align.template("portrait", 96)).max() < 0.15 * 96
    assert np.abs(table.factors["yaw"]).max() < 90


def test_people_are_sorted_and_need_pictures(photos: Path):
    people = folder_people(photos)
    assert [person.name for person in people] == sorted(person.name for person in people)
    assert len(people) == 12 and all(isinstance(person, Person) for person in people)
    assert all(path.suffix != ".txt" for person in people for path in person.photos)
