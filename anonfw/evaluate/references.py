"""Rows to compare an anonymizer with: no change, classical obfuscation, and another person's photo.

Each is a callable `(batch, draw) -> (B,3,H,W) float32 in [-1,1]`, the signature of `System.anonymize`. `draws` is the
number of different outputs worth asking for: 1 where a draw changes nothing, None where every draw differs.
Obfuscations change the inside of the fixed face ellipse (`protocols.face_ellipse`) and nothing else.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.evaluate.protocols import face_ellipse


class Reference(Protocol):
    draws: int | None

    def __call__(self, batch: FaceBatch, draw: int) -> Tensor: ...


class Original:
    """The photo itself: what a recogniser does when nothing is anonymized."""

    draws = 1

    def __call__(self, batch: FaceBatch, draw: int) -> Tensor:  # noqa: ARG002 (one signature for all)
        return batch.pixels()


class GaussianBlur:
    """Gaussian blur of the face.

    Args:
        sigma: standard deviation as a share of the crop's side (0.05 is 5.6 px at 112).
        alignment: crop of the images; it places the ellipse.
    """

    draws = 1

    def __init__(self, sigma: float = 0.05, alignment: str = "portrait"):
        self.sigma, self.alignment = sigma, alignment

    def __call__(self, batch: FaceBatch, draw: int) -> Tensor:  # noqa: ARG002
        images = batch.pixels()
        size = images.shape[-1]
        sigma = self.sigma * size
        radius = min(round(3 * sigma), size - 1)
        steps = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
        kernel = torch.exp(-0.5 * (steps / sigma) ** 2)
        kernel = (kernel / kernel.sum()).expand(3, 1, -1)
        padded = F.pad(images, [radius] * 4, mode="reflect")
        blurred = F.conv2d(padded, kernel[:, :, None], groups=3)
        blurred = F.conv2d(blurred, kernel[..., None], groups=3)
        return _inside_face(images, blurred, self.alignment)


class Pixelation:
    """Mosaic of the face.

    Args:
        blocks: mosaic cells across the crop's side (16 is a cell of 7 px at 112: 9 x 12 cells on the face).
        alignment: crop of the images; it places the ellipse.
    """

    draws = 1

    def __init__(self, blocks: int = 16, alignment: str = "portrait"):
        self.blocks, self.alignment = blocks, alignment

    def __call__(self, batch: FaceBatch, draw: int) -> Tensor:  # noqa: ARG002
        images = batch.pixels()
        mosaic = F.interpolate(F.adaptive_avg_pool2d(images, self.blocks), images.shape[-2:], mode="nearest")
        return _inside_face(images, mosaic, self.alignment)


class SolidBox:
    """A black rectangle over the face: the ellipse's bounding box."""

    draws = 1

    def __init__(self, alignment: str = "portrait"):
        self.alignment = alignment

    def __call__(self, batch: FaceBatch, draw: int) -> Tensor:  # noqa: ARG002
        images = batch.pixels()
        rows, columns = np.nonzero(face_ellipse(images.shape[-1], self.alignment))
        images[:, :, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] = -1.0
        return images


class RandomOtherFace:
    """The whole photo of another person, drawn at random from the evaluated set: chance level of every measure.

    The choice is a function of (seed, draw, sample index) alone, so it does not depend on batch size or order.

    Args:
        pool: photos to draw from, with identities; more than one person.
        seed: of the choice.
    Raises:
        ValueError: the pool holds one person only.
    """

    draws = None

    def __init__(self, pool: FaceBatch, seed: int = 0):
        if len(pool.identity.unique()) < 2:
            raise ValueError("a random other face needs photos of at least two people")
        self.pool, self.seed = pool, seed

    def choose(self, batch: FaceBatch, draw: int) -> Tensor:
        """(B,) rows of the pool, each of another person than its sample."""
        identity = self.pool.identity.cpu()
        rows = []
        for person, index in zip(batch.identity.tolist(), batch.index.tolist(), strict=True):
            others = torch.nonzero(identity != person).flatten()
            rng = np.random.default_rng([self.seed, draw, index])
            rows.append(int(others[rng.integers(len(others))]))
        return torch.tensor(rows, dtype=torch.int64)

    def __call__(self, batch: FaceBatch, draw: int) -> Tensor:
        return self.pool.select(self.choose(batch, draw)).to(batch.device).pixels()


def _inside_face(images: Tensor, changed: Tensor, alignment: str) -> Tensor:
    mask = torch.from_numpy(face_ellipse(images.shape[-1], alignment)).to(images.device)
    return torch.where(mask, changed, images)


NAMES = ("original", "blur", "pixelate", "box", "random_other")


def build_references(names: list[str] | tuple[str, ...], pool: FaceBatch, alignment: str, seed: int) -> dict:
    """name -> Reference, in the order of `names`.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise ValueError(f"unknown reference {', '.join(map(repr, unknown))}; there are {', '.join(NAMES)}")
    makers = {
        "original": Original,
        "blur": lambda: GaussianBlur(alignment=alignment),
        "pixelate": lambda: Pixelation(alignment=alignment),
        "box": lambda: SolidBox(alignment),
        "random_other": lambda: RandomOtherFace(pool, seed),
    }
    return {name: makers[name]() for name in names}
