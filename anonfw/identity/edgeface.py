"""EdgeFace (George et al., 2024): a small hybrid of convolutions and attention, the judge of what ArcFace trained."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from anonfw.identity.base import Recognizer, origin
from anonfw.identity.onnx_graph import convert, early_and_late


class EdgeFace(Recognizer):
    """EdgeFace-S (gamma 0.5), or another member of the family as an ONNX file.

    `features` is the map of the first stage, a quarter of the input's resolution: (B,48,28,28) for EdgeFace-S.

    Args:
        weights: a name of the weights table or the path of an ONNX file.
    Raises:
        WeightsError: neither a name nor a file, or the file cannot be fetched.
        ValueError: the graph is not a recogniser's.
    """

    def __init__(self, weights: str | Path = "edgeface_s") -> None:
        super().__init__()
        found = origin(weights)
        self.name, self.licence, self.sha256 = found.name, found.licence, found.sha256
        net, self.size, self.dim = convert(found.file)
        self.first, self.last = early_and_late(net, self.size)
        self.freeze()

    def early(self, images: Tensor) -> Tensor:
        return self.first(images)

    def embed(self, images: Tensor) -> Tensor:
        return self.last(self.first(images))
