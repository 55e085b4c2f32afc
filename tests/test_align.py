"""Crops: the similarity against an independent fit, and the fixed window against the landmarks' own crop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anonfw import align


@given(angle=st.floats(-3, 3), scale=st.floats(0.1, 10), x=st.floats(-500, 500), y=st.floats(-500, 500))
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


def test_a_shrinking_window_does_not_alias():
    """A pattern finer than the recogniser's pixels becomes its mean; sampled without a filter it would be a new one."""
    stripes = torch.tensor([-1.0, 1.0]).repeat(160)
    fine = stripes.expand(1, 3, 320, 320).contiguous()
    for out in (112, 96):
        window = align.window_to_arcface(fine, "portrait", out)
        assert window.abs().max() < 0.35 and window.mean().abs() < 0.02
    coarse = torch.nn.functional.interpolate(torch.eye(20).expand(1, 3, 20, 20), (320, 320), mode="bilinear")
    small = torch.nn.functional.interpolate(torch.eye(20).expand(1, 3, 20, 20), (140, 140), mode="bilinear")
    both = [align.window_to_arcface(images, "portrait") for images in (coarse, small)]
    assert (both[0] - both[1])[..., 2:-2, 2:-2].abs().max() < 0.12


@pytest.mark.parametrize(("size", "out"), [(112, 112), (128, 112), (112, 160)])
def test_a_window_that_does_not_shrink_is_plain_bilinear(size: int, out: int):
    images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, y, side = align.arcface_window(size)
    steps = torch.arange(out, dtype=torch.float64) * side / out
    grid = torch.stack(torch.meshgrid(*((start + steps + 0.5) * 2 / size - 1 for start in (x, y)), indexing="xy"), -1)
    expected = torch.nn.functional.grid_sample(images, grid.expand(2, -1, -1, -1), align_corners=False)
    torch.testing.assert_close(align.window_to_arcface(images, "portrait", out), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("alignment", align.ALIGNMENTS)
def test_any_window_and_what_lies_outside(alignment: str):
    """A ramp stays a ramp, in the units of the arcface crop; beyond the picture its border goes on."""
    scale, offset = (0.8, 11.2) if alignment == "portrait" else (1.0, 0.0)
    ramp = ((torch.arange(112.0) - offset) / scale).expand(1, 3, 112, 112).contiguous()
    window = align.window(ramp, alignment, (-30.0, 10.0, 80.0), 160)[0, 0, 0]
    wanted = (-30 + torch.arange(160.0) / 2).clamp(min=-offset / scale)
    torch.testing.assert_close(window, wanted, atol=1e-4, rtol=0)
    assert align.window(ramp, "arcface", (0.0, 0.0, 112.0), 112) is ramp


def test_windows_differentiate_after_inference_mode():
    images = torch.zeros(1, 3, 190, 190)
    with torch.inference_mode():
        align.window_to_arcface(images, "portrait")
    align.window_to_arcface(images.requires_grad_(), "portrait").sum().backward()
    assert images.grad.sum() == pytest.approx(3 * 112 * 112, rel=1e-4)
