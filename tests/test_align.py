"""Crops: the similarity against an independent fit, and the fixed window against the landmarks' own crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anonfw import align


@given(
    angle=st.floats(-3, 3), scale=st.floats(0.1, 10), x=st.floats(-500, 500), y=st.floats(-500, 500)
)
def test_similarity_recovers_what_was_done(angle: float, scale: float, x: float, y: float):
    turned = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = align.ARCFACE_TEMPLATE @ turned.T + [x, y]
    matrix = align.similarity(moved, align.ARCFACE_TEMPLATE)
    np.testing.assert_allclose(align.transform_points(moved, matrix), align.ARCFACE_TEMPLATE, atol=1e-6)


def test_similarity_is_the_least_squares_one():
    """Against scikit-image's estimator of the same transform (insightface aligns with it)."""
    transform = pytest.importorskip("skimage.transform")
    rng = np.random.default_rng(0)
    noisy = align.ARCFACE_TEMPLATE * 1.7 + 30 + rng.normal(0, 4, (5, 2))
    fitted = transform.SimilarityTransform.from_estimate(noisy, align.ARCFACE_TEMPLATE)
    np.testing.assert_allclose(align.similarity(noisy, align.ARCFACE_TEMPLATE), fitted.params[:2], atol=1e-8)


def test_no_similarity_for_one_point():
    with pytest.raises(ValueError, match="coincide"):
        align.similarity(np.ones((5, 2)), align.ARCFACE_TEMPLATE)
    with pytest.raises(ValueError, match="unknown alignment"):
        align.template("profile", 112)


@pytest.mark.parametrize("size", [112, 224])
def test_window_of_the_portrait_is_the_arcface_crop(size: int):
    """One photograph cropped both ways: the portrait's window shows what the recogniser's own crop shows."""
    y, x = np.mgrid[0:400, 0:400]
    photo = np.stack([127 + 100 * np.sin(x / 17), 127 + 100 * np.cos(y / 23), 127 + 60 * np.sin((x + y) / 31)], -1)
    photo = photo.astype(np.uint8)
    landmarks = align.ARCFACE_TEMPLATE * 1.6 + [90, 70]
    portrait = align.warp(photo, align.similarity(landmarks, align.template("portrait", size)), size)
    arcface = align.warp(photo, align.similarity(landmarks, align.template("arcface", 112)), 112)
    as_tensor = torch.from_numpy(portrait).permute(2, 0, 1)[None].float() / 127.5 - 1
    window = align.window_to_arcface(as_tensor, "portrait")
    expected = torch.from_numpy(arcface).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert (window - expected)[..., 4:-4, 4:-4].abs().mean() < 0.03


def test_batched_warp_is_the_image_warp():
    rng = np.random.default_rng(0)
    photo = (rng.random((40, 40, 3)).repeat(4, 0).repeat(4, 1) * 255).astype(np.uint8)
    matrix = align.similarity(align.ARCFACE_TEMPLATE * 1.1 + 10, align.template("arcface", 112))
    expected = align.warp(photo, matrix, 112).astype(np.float32) / 127.5 - 1
    image = torch.from_numpy(photo).permute(2, 0, 1)[None].float() / 127.5 - 1
    ours = align.warp_batch(image, torch.from_numpy(matrix)[None], 112)[0].permute(1, 2, 0).numpy()
    assert np.abs(ours - expected)[2:-2, 2:-2].mean() < 0.01
