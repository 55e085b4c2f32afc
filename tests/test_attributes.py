"""Measured factors: signs, mirror images, independence of scale, and what they are measured from."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anonfw.align import transform_points
from anonfw.attributes import EYES, FACTORS, INNER_LIPS, MOUTH_CORNERS, Attributes, brightness, expression
from anonfw.data.card import Card

MIRRORED_POINTS = [1, 0, 2, 4, 3]


@pytest.fixture(scope="module")
def attributes() -> Attributes:
    return Attributes()


@pytest.fixture(scope="module")
def photos(embedded: Path) -> list[tuple[np.ndarray, np.ndarray, dict]]:
    """(image, landmarks, recorded factors) of the 24 most turned of the first 120 shipped test photos."""
    found = []
    with tarfile.open(embedded / Card.load(embedded).of_split("test")[0].file) as opened:
        members = {member.name: member for member in opened}
        for name in [name for name in members if name.endswith(".json")][:120]:
            record = json.load(opened.extractfile(members[name]))
            content = opened.extractfile(members[name.replace(".json", ".jpg")]).read()
            image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
            found.append((np.ascontiguousarray(image), np.array(record["landmarks"]), record["factors"]))
    return sorted(found, key=lambda photo: -abs(photo[2]["yaw"]))[:24]


def mirrored(image: np.ndarray, landmarks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    flipped = landmarks[MIRRORED_POINTS].copy()
    flipped[:, 0] = image.shape[1] - 1 - flipped[:, 0]
    return np.ascontiguousarray(image[:, ::-1]), flipped


def test_a_mirror_turns_yaw_and_roll_and_leaves_the_rest(attributes, photos):
    before = [attributes.measure(image, points) for image, points, _ in photos]
    after = [attributes.measure(*mirrored(image, points)) for image, points, _ in photos]
    assert list(before[0]) == list(FACTORS)
    for name in FACTORS:
        sign = -1 if name in ("yaw", "roll") else 1
        a, b = (np.array([measured[name] for measured in side]) for side in (before, after))
        error = np.abs(a - sign * b)
        if name in ("yaw", "pitch", "roll"):
            assert error.mean() < 3, name
        else:
            assert error.mean() < 0.4 * a.std() + 1e-3, name
        if name == "yaw":
            assert (np.sign(a) == -np.sign(b)).all()


def test_yaw_says_to_which_side_the_nose_points(attributes, photos):
    for image, points, _ in photos[:12]:
        nose = points[2, 0] - points[:2, 0].mean()
        assert np.sign(attributes.measure(image, points)["yaw"]) == np.sign(nose)


def test_pitch_rises_as_the_nose_does(attributes, photos):
    height, pitch = [], []
    for image, points, _ in photos:
        eyes, mouth = points[:2, 1].mean(), points[3:, 1].mean()
        height.append((mouth - points[2, 1]) / (mouth - eyes))
        pitch.append(attributes.measure(image, points)["pitch"])
    assert np.corrcoef(height, pitch)[0, 1] > 0.4


def test_roll_follows_a_tilted_picture_clockwise(attributes, photos):
    for image, points, _ in photos[-6:]:
        tilt = cv2.getRotationMatrix2D((55.5, 55.5), -12, 1)  # OpenCV counts anticlockwise
        turned = cv2.warpAffine(image, tilt, (112, 112), borderMode=cv2.BORDER_REFLECT_101)
        difference = (
            attributes.measure(turned, transform_points(points, tilt))["roll"]
            - attributes.measure(image, points)["roll"]
        )
        assert 6 < difference < 18


def test_scale_changes_little(attributes, photos):
    small, large = [], []
    for image, points, _ in photos:
        small.append(list(attributes.measure(image, points).values()))
        twice = cv2.resize(image, (224, 224), interpolation=cv2.INTER_LINEAR)
        large.append(list(attributes.measure(twice, (points + 0.5) * 2 - 0.5).values()))
    small, large = np.array(small), np.array(large)
    assert (np.abs(small - large).mean(0)[:3] < 1.5).all()
    assert (np.abs(small - large).mean(0)[3:] < 0.25 * small.std(0)[3:] + 1e-3).all()


def test_records_agree_with_the_shipped_crops(attributes, photos):
    """The records were measured on the 512 px renderings; a 112 px crop says nearly the same."""
    names = ("yaw", "mouth_open", "smile", "brightness")
    measured = [attributes.measure(image, points) for image, points, _ in photos]
    for name in names:
        now = np.array([values[name] for values in measured])
        then = np.array([factors[name] for _, _, factors in photos])
        assert np.corrcoef(now, then)[0, 1] > 0.9, name


def test_brightness_is_mean_luma_of_the_face(photos):
    image, points, _ = photos[0]
    value = brightness(image, points)
    assert brightness(image // 2, points) == pytest.approx(value / 2, abs=0.01)
    assert brightness(np.full_like(image, 255), points) == pytest.approx(1)
    edges = image.copy()
    edges[:12], edges[-12:] = 0, 0
    assert brightness(edges, points) == value


def face_points() -> np.ndarray:
    """106 points of which only those that count are placed: a neutral face of 100 px between the eyes."""
    points = np.zeros((106, 2))
    for centre, eye in zip((0, 100), EYES, strict=True):
        side = -1 if centre == 0 else 1
        points[list(eye)] = [[centre + 15 * side, 0], [centre - 15 * side, 0], [centre, -5], [centre, 5]]
    points[43:52] = [0, -30]
    points[97:106] = [100, -30]
    points[list(MOUTH_CORNERS)] = [[15, 110], [85, 110]]
    points[list(INNER_LIPS)] = [[50, 108], [50, 112]]
    return points


def test_expression_by_hand():
    neutral = expression(face_points())
    assert neutral == pytest.approx(
        {"mouth_open": 4 / 110, "smile": 0.7, "eye_open": 1 / 3, "brow_raise": 30 / 110}, abs=1e-9
    )
    points = face_points()
    points[INNER_LIPS[1], 1] += 20
    assert expression(points)["mouth_open"] == pytest.approx(24 / 110)
    points = face_points()
    points[list(MOUTH_CORNERS)] += [[-10, -8], [10, -8]]
    assert expression(points)["smile"] == pytest.approx(0.9 + 8 / 102)
    points = face_points()
    points[[eye[2] for eye in EYES], 1] += 5
    assert expression(points)["eye_open"] == pytest.approx(1 / 6)
    points = face_points()
    points[43:52, 1] -= 11
    points[97:106, 1] -= 11
    assert expression(points)["brow_raise"] == pytest.approx(41 / 110)


@given(st.floats(0.1, 20), st.floats(-3.1, 3.1), st.floats(-500, 500), st.floats(-500, 500))
def test_expression_is_free_of_place_size_and_tilt(scale, angle, x, y):
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = scale * face_points() @ rotation.T + [x, y]
    assert expression(moved) == pytest.approx(expression(face_points()), abs=1e-7)


def test_errors_name_what_is_wrong(attributes):
    image = np.zeros((112, 112, 3), np.uint8)
    with pytest.raises(ValueError, match=r"landmarks of shape \(106, 2\), expected \(5,2\)"):
        attributes.measure(image, np.zeros((106, 2)))
    with pytest.raises(ValueError, match="landmarks coincide"):
        attributes.measure(image, np.zeros((5, 2)))
    with pytest.raises(ValueError, match="float64"):
        attributes.measure(image.astype(np.float64), np.zeros((5, 2)))
