"""The detector on crops, on pictures with several faces or none, and on what is not a picture."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anonfw.align import similarity, template, warp
from anonfw.data.card import Card
from anonfw.detect import Detector, Faces, non_maximum_suppression


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.fixture(scope="module")
def portraits(embedded: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """(image, landmarks) of the first photo of 16 shipped test people."""
    tar = embedded / Card.load(embedded).of_split("test")[0].file
    found: dict[str, tuple] = {}
    with tarfile.open(tar) as opened:
        members = {member.name: member for member in opened}
        for name in members:
            if name.endswith(".json"):
                record = json.load(opened.extractfile(members[name]))
                if record["identity"] not in found:
                    content = opened.extractfile(members[name.replace(".json", ".jpg")]).read()
                    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
                    found[record["identity"]] = np.ascontiguousarray(image), np.array(record["landmarks"])
    return list(found.values())[:16]


def paste(canvas: np.ndarray, image: np.ndarray, left: int, top: int, side: int) -> None:
    canvas[top : top + side, left : left + side] = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


def test_a_portrait_crop_has_one_face_where_its_record_says(detector, portraits):
    errors = []
    for image, landmarks in portraits:
        faces = detector.detect(image)
        assert len(faces) == 1
        assert faces.boxes.shape == (1, 4) and faces.landmarks.shape == (1, 5, 2) and faces.scores.shape == (1,)
        assert faces.boxes.dtype == faces.landmarks.dtype == faces.scores.dtype == np.float32
        errors.append(np.linalg.norm(faces.landmarks[0] - landmarks, axis=1).mean())
    assert np.mean(errors) < 2.0 and max(errors) < 4.0


@pytest.mark.parametrize("side", [64, 224, 256, 700])
def test_a_face_that_fills_its_picture_is_found_at_any_size(detector, portraits, side):
    for image, landmarks in portraits[:8]:
        points = landmarks.astype(np.float64)
        crop = warp(image, similarity(points, template("arcface", side)), side)
        faces = detector.detect(crop)
        assert len(faces) == 1
        error = np.linalg.norm(faces.landmarks[0] - template("arcface", side), axis=1).mean()
        assert error < 5 * side / 112


@pytest.mark.shared
def test_real_photographs(detector, real_data):
    """The named person of an LFW photo is the face at its centre."""
    photos = sorted((real_data / "lfw").glob("A*/*_0001.jpg"))[:40]
    central = 0
    for path in photos:
        image = cv2.imread(str(path))[..., ::-1]
        faces = detector.detect(np.ascontiguousarray(image))
        centres = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2
        central += bool((np.abs(centres - np.array(image.shape[1::-1]) / 2).max(1) < 25).any())
    assert len(photos) == 40 and central >= 39


def test_several_faces_largest_first(detector, portraits):
    canvas = np.full((480, 640, 3), 90, np.uint8)
    places = [(20, 30, 100), (400, 20, 200), (150, 250, 150), (420, 300, 70)]
    for (image, _), place in zip(portraits, places, strict=False):
        paste(canvas, image, *place)
    faces = detector.detect(canvas)
    assert len(faces) == 4
    areas = np.prod(faces.boxes[:, 2:] - faces.boxes[:, :2], axis=1)
    assert (np.diff(areas) <= 0).all()
    for row, (left, top, side) in enumerate(sorted(places, key=lambda place: -place[2])):
        x, y = (faces.boxes[row, :2] + faces.boxes[row, 2:]) / 2
        assert left < x < left + side and top < y < top + side
        inside = (faces.landmarks[row] > [left, top]) & (faces.landmarks[row] < [left + side, top + side])
        assert inside.all()


def test_coordinates_are_those_of_the_given_picture_whatever_its_size(detector, portraits):
    image, _ = portraits[0]
    canvas = np.full((333, 517, 3), 120, np.uint8)
    paste(canvas, image, 200, 80, 180)
    small = detector.detect(canvas)
    large = detector.detect(cv2.resize(canvas, None, fx=3, fy=3, interpolation=cv2.INTER_LINEAR))
    assert len(small) == len(large) == 1
    # Pixel centres are whole numbers: three times larger moves them by (x + .5) * 3 - .5.
    assert np.abs((small.landmarks + 0.5) * 3 - 0.5 - large.landmarks).max() < 3 * 2.5


@pytest.mark.parametrize("shape", [(112, 112), (16, 200), (700, 900)])
def test_no_face_gives_empty_arrays(detector, shape):
    ramp = np.linspace(0, 255, shape[1]).astype(np.uint8)
    image = np.repeat(np.broadcast_to(ramp, shape)[..., None], 3, axis=2)
    faces = detector.detect(np.ascontiguousarray(image))
    assert len(faces) == 0
    assert faces.boxes.shape == (0, 4) and faces.landmarks.shape == (0, 5, 2) and faces.scores.shape == (0,)


def test_the_threshold_is_a_lower_bound_of_the_score(detector, portraits):
    image, _ = portraits[1]
    score = detector.detect(image).scores[0]
    assert len(detector.detect(image, float(score) - 0.01)) >= 1
    assert len(detector.detect(image, float(score) + 0.01)) == 0


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((64, 64), np.uint8), r"uint8 of shape \(64, 64\)"),
        (np.zeros((3, 64, 64), np.uint8), r"\(3, 64, 64\)"),
        (np.zeros((64, 64, 3), np.float32), "float32"),
        ("photo.jpg", "got str"),
        (np.zeros((12, 64, 3), np.uint8), "64 x 12 px; at least 16"),
    ],
)
def test_what_is_not_a_picture_is_refused(detector, image, message):
    with pytest.raises(ValueError, match=message):
        detector.detect(image)


def test_another_network_is_refused():
    with pytest.raises(ValueError, match="landmarks_106 is not a SCRFD detector with landmarks: no output score_8"):
        Detector("landmarks_106")


def intersection_over_union(a: np.ndarray, b: np.ndarray) -> float:
    width, height = np.maximum(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0)
    return width * height / (np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - width * height)


corner = st.floats(0, 100, allow_nan=False)
side = st.floats(1, 60, allow_nan=False)


@given(st.lists(st.tuples(corner, corner, side, side, st.floats(0.01, 1)), min_size=1, max_size=12))
def test_suppression_keeps_the_best_of_each_heap(rows):
    values = np.array(rows)
    boxes = np.concatenate([values[:, :2], values[:, :2] + values[:, 2:4]], axis=1)
    scores = values[:, 4]
    kept = non_maximum_suppression(boxes, scores, 0.4)
    assert scores[kept[0]] == scores.max()
    for i, a in enumerate(kept):
        for b in kept[i + 1 :]:
            assert intersection_over_union(boxes[a], boxes[b]) <= 0.4 + 1e-9
    for lost in set(range(len(rows))) - set(kept.tolist()):
        rivals = [a for a in kept if scores[a] >= scores[lost]]
        assert any(intersection_over_union(boxes[a], boxes[lost]) > 0.4 - 1e-9 for a in rivals)


def test_faces_counts_its_rows():
    assert len(Faces(np.zeros((3, 4)), np.zeros((3, 5, 2)), np.zeros(3))) == 3
