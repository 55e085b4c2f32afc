"""Apparent age and sex of aligned faces, by two small networks (dlib's, as ONNX): how a photograph looks, no more.

They were trained on upright chips of dlib's five points. With its padding of 0.2 a chip has the eyes at a height of
0.301 and 0.375 of its side apart, so it is a fixed window of an aligned face and no landmarks are needed.
docs/identity_mapper.md has the errors on real faces.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anonfw import align
from anonfw.detect import load_session
from anonfw.errors import AnonfwError

WINDOW = (8.98, 23.35, 93.87)  # x, y, side in the units of the arcface crop (`align.window`)
MEAN = torch.tensor([122.782, 117.001, 104.298])[:, None, None]
AGE_SIZE, SEX_SIZE = 64, 32
CLASSES = np.array([0.25, *range(1, 81)], np.float32)  # years of the classes; the estimate is their mean
BATCH = 64


class Demographics:
    """Age and sex of a batch of aligned faces.

    Args:
        age_weights, sex_weights: names in the table of weights, or .onnx files.
        threads: onnxruntime's threads.
    """

    def __init__(
        self, age_weights: str | Path = "age_dlib", sex_weights: str | Path = "sex_dlib", threads: int = 1
    ) -> None:
        self.age_session = load_session(age_weights, threads)
        self.sex_session = load_session(sex_weights, threads)

    def __call__(self, images: Tensor, alignment: str) -> dict[str, Tensor]:
        """`age` (B,) in years, 0.25 to 80; `female` (B,) probability in [0,1].

        Args:
            images: (B,3,s,s) RGB, uint8, or floats in [-1,1]; any device. The answers are float32 on the CPU.
            alignment: of the crops, `arcface` or `portrait`.
        Raises:
            ValueError: another shape, or an unknown alignment.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise ValueError(f"expected square RGB images (B,3,s,s), got {tuple(images.shape)}")
        ages, females = [np.zeros(0, np.float32)], [np.zeros(0, np.float32)]
        for part in images.detach().split(BATCH):
            pixels = part.float().cpu() if part.dtype == torch.uint8 else (part.float().cpu() + 1) * 127.5
            ages.append(self._probabilities(self.age_session, pixels, alignment, AGE_SIZE) @ CLASSES)
            females.append(self._probabilities(self.sex_session, pixels, alignment, SEX_SIZE)[:, 0])
        return {"age": torch.from_numpy(np.concatenate(ages)), "female": torch.from_numpy(np.concatenate(females))}

    def _probabilities(self, session: Any, pixels: Tensor, alignment: str, size: int) -> np.ndarray:
        chip = align.window(pixels, alignment, WINDOW, size).clamp(0, 255)
        return session.run(None, {"images": ((chip - MEAN) / 256).numpy()})[0]


def of_people(loader: Iterable, photos: int = 3, demographics: Demographics | None = None) -> dict[str, Tensor]:
    """Means over each person's first `photos`, in the order of the loader's people: attributes for an `IdentityBank`.

    Args:
        loader: a FaceLoader that decodes and passes over the photos once (`mode="images"`, `shuffle=False`).
    Returns:
        `age` in years and `female` in [0,1], (M,); NaN for a person without a usable photo.
    Raises:
        AnonfwError: the loader decodes no pictures.
    """
    demographics = demographics or Demographics()
    table = loader.table
    sums = {name: torch.zeros(len(table.people)) for name in ("age", "female")}
    count = torch.zeros(len(table.people))
    for batch in loader:
        if not batch.image.numel():
            raise AnonfwError("age and sex are estimated from pictures: open the loader with decode=True")
        taken = []
        for row, person in enumerate(batch.identity.tolist()):
            if count[person] < photos:
                count[person] += 1
                taken.append(row)
        for name, values in demographics(batch.image[taken], table.card.alignment).items():
            sums[name].index_add_(0, batch.identity[taken].cpu(), values)
    return {name: values / count for name, values in sums.items()}
