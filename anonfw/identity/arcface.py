"""ArcFace: the recognisers of insightface's model zoo."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anonfw.identity.base import OnnxRecognizer
from anonfw.identity.onnx_graph import takes_raw_pixels


class ArcFace(OnnxRecognizer):
    """Any ArcFace ONNX file of the insightface model zoo; by default the MobileFaceNet of buffalo_sc.

    Args:
        weights: a name of the weights table (`arcface_mbf`, `arcface_r50`) or the path of an ONNX file, for example
            `~/.insightface/models/antelopev2/glintr100.onnx`.
    """

    def __init__(self, weights: str | Path = "arcface_mbf") -> None:
        super().__init__(weights)
        self.raw_pixels = takes_raw_pixels(self.file)

    def embed(self, images: Tensor) -> Tensor:
        return super().embed((images + 1) * 127.5 if self.raw_pixels else images)
