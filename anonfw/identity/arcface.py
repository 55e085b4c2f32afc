"""ArcFace: the recognisers of insightface's model zoo."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anonfw.identity.base import Recognizer, origin
from anonfw.identity.onnx_graph import convert, early_and_late, takes_raw_pixels


class ArcFace(Recognizer):
    """Any ArcFace ONNX file of the insightface model zoo; by default the MobileFaceNet of buffalo_sc.

    `features` is the map of the last layer that still has half the resolution of the input: (B,128,56,56) for the
    MobileFaceNet (before its first strided block), (B,64,56,56) for the ResNets (after their first stage).

    Args:
        weights: a name of the weights table (`arcface_mbf`, `arcface_r50`) or the path of an ONNX file, for example
            `~/.insightface/models/antelopev2/glintr100.onnx`.
    Raises:
        WeightsError: neither a name nor a file, or the file cannot be fetched.
        ValueError: the graph is not a recogniser's.
    """

    def __init__(self, weights: str | Path = "arcface_mbf") -> None:
        super().__init__()
        found = origin(weights)
        self.name, self.licence, self.sha256 = found.name, found.licence, found.sha256
        net, self.size, self.dim = convert(found.file)
        self.first, self.last = early_and_late(net, self.size)
        self.raw_pixels = takes_raw_pixels(found.file)
        self.freeze()

    def early(self, images: Tensor) -> Tensor:
        return self.first((images + 1) * 127.5 if self.raw_pixels else images)

    def embed(self, images: Tensor) -> Tensor:
        return self.last(self.early(images))
