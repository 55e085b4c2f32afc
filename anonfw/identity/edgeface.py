"""EdgeFace (George et al., 2024): a small hybrid of convolutions and attention, the judge of what ArcFace trained."""

from __future__ import annotations

from pathlib import Path

from anonfw.identity.base import OnnxRecognizer


class EdgeFace(OnnxRecognizer):
    """EdgeFace-S (gamma 0.5), or another member of the family as an ONNX file.

    Args:
        weights: a name of the weights table or the path of an ONNX file.
    """

    def __init__(self, weights: str | Path = "edgeface_s") -> None:
        super().__init__(weights)
