"""Apparent age and sex of aligned faces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from anonfw import align
from anonfw.data import FaceLoader
from anonfw.demographics import MEAN, Demographics, of_people
from anonfw.errors import AnonfwError
from anonfw.identity.bank import IdentityBank


@pytest.fixture(scope="module")
def demographics() -> Demographics:
    from anonfw.weights import WeightsError

    try:
        return Demographics()
    except WeightsError as error:
        pytest.skip(f"the estimators cannot be had here: {error}")


@pytest.fixture(scope="module")
def faces(embedded: Path) -> torch.Tensor:
    """(12,3,112,112) uint8 portrait crops of people who do not exist."""
    return next(iter(FaceLoader(embedded, "val", 12, shuffle=False, workers=0))).image


def test_years_and_probabilities(demographics: Demographics, faces: torch.Tensor):
    found = demographics(faces, "portrait")
    assert {name: (values.shape, values.dtype) for name, values in found.items()} == {
        "age": ((12,), torch.float32),
        "female": ((12,), torch.float32),
    }
    assert 0.25 <= found["age"].min() <= found["age"].max() <= 80
    assert 0 <= found["female"].min() <= found["female"].max() <= 1


def test_bytes_and_floats_in_parts_and_crops_say_the_same(
    demographics: Demographics, faces: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("anonfw.demographics.BATCH", 16)
    found = demographics(faces, "portrait")
    floats = demographics(faces.float() / 127.5 - 1, "portrait")
    many = demographics(faces[-5:].repeat(4, 1, 1, 1), "portrait")
    closer = demographics(align.window_to_arcface(faces.float() / 127.5 - 1, "portrait", 112), "arcface")
    for name, values in found.items():
        torch.testing.assert_close(floats[name], values, atol=1e-2, rtol=1e-3)
        torch.testing.assert_close(many[name][-5:], values[-5:], atol=1e-4, rtol=1e-4)
    assert (closer["age"] - found["age"]).abs().mean() < 2
    assert ((closer["female"] >= 0.5) == (found["female"] >= 0.5)).float().mean() >= 0.9
    assert demographics(faces[:0], "portrait")["age"].shape == (0,)


def test_the_chip_is_that_of_the_networks(demographics: Demographics):
    """dlib's chip with a padding of 0.2: the eyes stand where its five-point shape has them."""
    corners = np.array([[0.8596, 0.2135], [0.6461, 0.2290], [0.1206, 0.2137], [0.3341, 0.2291]])
    eyes = (corners.reshape(2, 2, 2).mean(1)[::-1] + 0.2) / 1.4  # image left first, as shares of the chip
    found = []
    for eye in align.ARCFACE_TEMPLATE[:2]:
        image = torch.full((1, 3, 112, 112), -1.0)
        y, x = np.round(eye[::-1]).astype(int)
        image[..., y - 1 : y + 2, x - 1 : x + 2] = 1.0
        seen: dict[str, np.ndarray] = {}

        class Session:
            def run(self, _, feed, seen=seen):
                seen.update(feed)
                return [np.zeros((1, 81), np.float32)]

        demographics._probabilities(Session(), (image + 1) * 127.5, "arcface", 64)
        chip = torch.from_numpy(seen["images"])[0] * 256 + MEAN  # the networks' own scale, undone
        assert chip.min() > -0.01 and chip.max() <= 255.01
        light = chip.sum(0)
        rows = torch.arange(64.0)
        place = torch.stack([(light.sum(0) * rows).sum(), (light.sum(1) * rows).sum()]) / light.sum()
        found.append(place.numpy() / 64)
    np.testing.assert_allclose(found, eyes, atol=0.012)


def test_real_faces(demographics: Demographics, real_data: Path):
    """UTKFace's labels, adults: years and sex."""
    import cv2

    from anonfw.detect import Detector

    detector, crops, truth = Detector(), [], []
    for file in sorted((real_data / "utkface").glob("*_*_*_*.jpg"))[::60]:
        age, sex = map(int, file.name.split("_")[:2])
        image = np.ascontiguousarray(cv2.imread(str(file))[..., ::-1])
        found = detector.detect(image)
        if 20 <= age <= 60 and len(found):
            matrix = align.similarity(found.landmarks[0], align.template("portrait", 112))
            crops.append(align.warp(image, matrix, 112))
            truth.append((age, sex))
    age, sex = np.array(truth).T
    found = demographics(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), "portrait")
    assert len(crops) > 15
    assert np.abs(found["age"].numpy() - age).mean() < 10
    assert ((found["female"].numpy() >= 0.5) == (sex == 1)).mean() > 0.85


def test_a_person_has_the_mean_of_the_first_photos(demographics: Demographics, embedded: Path):
    loader = FaceLoader(embedded, "val", 4, shuffle=False, workers=0, limit_identities=3)  # persons lie across batches
    photos = list(loader)
    identity = torch.cat([batch.identity for batch in photos])
    image = torch.cat([batch.image for batch in photos])
    found = of_people(loader, 2, demographics)
    for person in range(3):
        own = demographics(image[identity == person][:2], "portrait")
        for name, values in found.items():
            torch.testing.assert_close(values[person], own[name].mean(), atol=1e-3, rtol=1e-4)
    bank = IdentityBank(torch.eye(3), loader.table.people, "e", attributes=found)
    assert bank.nearest(torch.eye(3), like=found).tolist() == [0, 1, 2]


def test_what_is_no_picture(demographics: Demographics, embedded: Path):
    for shape in ((1, 1, 64, 64), (3, 64, 64), (1, 3, 64, 32)):
        with pytest.raises(ValueError, match="square RGB images"):
            demographics(torch.zeros(shape), "arcface")
    with pytest.raises(ValueError, match="unknown alignment"):
        demographics(torch.zeros(1, 3, 64, 64), "passport")
    loader = FaceLoader(embedded, "val", 16, shuffle=False, workers=0, decode=False, sidecars=["arcface_mbf"])
    with pytest.raises(AnonfwError, match="decode=True"):
        of_people(loader, demographics=demographics)
