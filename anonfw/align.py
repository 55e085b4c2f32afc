"""Where a face stands in its crop: five-point templates, the similarity that maps onto them, and warps.

Two crops are used everywhere. `arcface` is the recognisers' crop (112 px, insightface's template). `portrait` is the
generators' crop: the same template shrunk to 0.8 and moved, so that forehead, chin and some surroundings are inside.
Both come from one similarity fit, so the arcface crop is a fixed window of the portrait crop (`arcface_window`) and an
aligned data set needs no landmarks to be recognised.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # processes that only detect and crop import this file: they must not load torch for it
    import torch
    from torch import Tensor

# insightface's arcface_dst: eyes, nose tip, mouth corners in a 112 x 112 crop (pixel centres).
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
PORTRAIT_SCALE = 0.8
PORTRAIT_OFFSET = np.array([11.2, 9.0])
ALIGNMENTS = ("arcface", "portrait")


def template(alignment: str, size: int) -> np.ndarray:
    """(5,2) target points, in pixels of a `size` x `size` crop.

    Raises:
        ValueError: unknown alignment.
    """
    if alignment == "arcface":
        points = ARCFACE_TEMPLATE
    elif alignment == "portrait":
        points = ARCFACE_TEMPLATE * PORTRAIT_SCALE + PORTRAIT_OFFSET
    else:
        raise ValueError(f"unknown alignment {alignment!r}; there are {', '.join(ALIGNMENTS)}")
    return points * (size / 112.0)


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares similarity (rotation, one scale, shift) that maps `source` onto `target`: Umeyama 1991.

    Args:
        source, target: (K,2) points.
    Returns:
        (2,3) matrix M with target ~ M @ [x, y, 1].
    Raises:
        ValueError: the source points coincide.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    mean_s, mean_t = source.mean(0), target.mean(0)
    s, t = source - mean_s, target - mean_t
    variance = (s**2).sum() / len(s)
    if not np.isfinite(variance) or variance < 1e-12:
        raise ValueError("landmarks coincide or are not finite: no similarity can be fitted")
    u, d, vt = np.linalg.svd(t.T @ s / len(s))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / variance
    return np.concatenate([scale * rotation, (mean_t - scale * rotation @ mean_s)[:, None]], axis=1)


def warp(image: np.ndarray, matrix: np.ndarray, size: int, border: str = "reflect") -> np.ndarray:
    """Crop of `size` x `size` under the (2,3) `matrix` (source pixels -> crop pixels). (h,w,3) uint8 in and out.

    Shrinking by more than 1.5 is antialiased with a Gaussian first: bilinear sampling alone would alias.
    """
    import cv2

    scale = float(np.sqrt(abs(np.linalg.det(matrix[:, :2]))))
    if scale < 1 / 1.5:
        image = cv2.GaussianBlur(image, (0, 0), 0.45 / scale)
    mode = {"reflect": cv2.BORDER_REFLECT_101, "constant": cv2.BORDER_CONSTANT}[border]
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=mode)


def transform_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(...,2) points under a (2,3) matrix."""
    return np.asarray(points) @ matrix[:, :2].T + matrix[:, 2]


def arcface_window(size: int) -> tuple[float, float, float]:
    """(x, y, side) in pixels of the window of a `portrait` crop of `size` px that is the arcface crop."""
    unit = size / 112.0
    return PORTRAIT_OFFSET[0] * unit, PORTRAIT_OFFSET[1] * unit, PORTRAIT_SCALE * size


def window_to_arcface(images: Tensor, alignment: str, out: int = 112) -> Tensor:
    """Aligned images to the recognisers' crop, differentiably: (B,3,S,S) in [-1,1] -> (B,3,out,out).

    Raises:
        ValueError: unknown alignment.
    """
    return window(images, alignment, (0.0, 0.0, 112.0), out)


def window(images: Tensor, alignment: str, place: tuple[float, float, float], out: int) -> Tensor:
    """A square window of aligned images, differentiably: (B,3,S,S) in [-1,1] -> (B,3,out,out).

    Linear interpolation; where the window shrinks, antialiased like torchvision's and PIL's resize. What lies outside
    the image repeats its border.

    Args:
        place: (x, y, side) of the window in the units of the 112-pixel arcface crop, in which that crop is (0, 0, 112)
            and the portrait crop (-14, -11.25, 140).
    Raises:
        ValueError: unknown alignment.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"unknown alignment {alignment!r}; there are {', '.join(ALIGNMENTS)}")
    scale, offset = (PORTRAIT_SCALE, PORTRAIT_OFFSET) if alignment == "portrait" else (1.0, (0.0, 0.0))
    size = images.shape[-1]
    x, y, side = scale * place[0] + float(offset[0]), scale * place[1] + float(offset[1]), scale * place[2]
    unit = size / 112.0
    if (x, y, side) == (0.0, 0.0, 112.0) and size == out:
        return images
    import torch

    # Autocast would round pixels and weights to bf16.
    with torch.autocast(images.device.type, enabled=False):
        rows = _resampling(size, y * unit, side * unit, out, images.device, images.dtype)
        columns = _resampling(size, x * unit, side * unit, out, images.device, images.dtype)
        return rows @ (images @ columns.T)


@lru_cache(maxsize=64)
def _resampling(size: int, start: float, side: float, out: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(out,size) weights that resample a line of `size` pixels: output i lies on pixel start + i side/out."""
    import torch

    step = side / out
    support = max(step, 1.0)
    centres = start + np.arange(out) * step
    pixels = np.ceil(centres - support)[:, None] + np.arange(2 * math.ceil(support) + 1)
    weights = np.clip(1 - np.abs(pixels - centres[:, None]) / support, 0, None)
    matrix = np.zeros((out, size))
    inside = np.clip(pixels, 0, size - 1).astype(int)
    np.add.at(matrix, (np.arange(out)[:, None], inside), weights / weights.sum(1, keepdims=True))
    with torch.inference_mode(False):  # it is kept, and may next be wanted for a gradient
        return torch.from_numpy(matrix).to(device, dtype)
