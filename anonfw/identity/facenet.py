"""FaceNet (Schroff et al., 2015; Sandberg's Inception-ResNet-v1 trained on VGGFace2), through facenet_pytorch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anonfw.identity.base import Recognizer, origin
from anonfw.identity.checkpoint import load_state, read_state

if TYPE_CHECKING:
    from facenet_pytorch import InceptionResnetV1

# Trained with (x - 127.5) / 128 where [-1,1] is (x - 127.5) / 127.5.
STANDARDISATION = 127.5 / 128


class FaceNet(Recognizer):
    """Inception-ResNet-v1 at 160 px, 512-d.

    It was trained on upright boxes with a margin, not on five-point alignment. `window` is the part of an aligned face
    that serves it best (measured: docs/encoders.md).

    `features` is the map after the stem's third convolution, before its pooling: (B,64,77,77).

    Args:
        weights: a name of the weights table, or the path of a safetensors or torch file with the state of
            `facenet_pytorch.InceptionResnetV1`.
    Raises:
        WeightsError: neither a name nor a file, the file cannot be had, or it is not of this network.
    """

    window = (-6.0, -4.0, 124.0)

    def __init__(self, weights: str | Path = "facenet_vggface2") -> None:
        super().__init__()
        found = origin(weights)
        self.name, self.licence, self.sha256 = found.name, found.licence, found.sha256
        self.size, self.dim = 160, 512
        self.net = empty_net()
        state = {name: value for name, value in read_state(found.file, "").items() if not name.startswith("logits.")}
        load_state(self.net, {name: value.float() for name, value in state.items()}, found.file, "FaceNet")
        self.freeze()

    def early(self, images: Tensor) -> Tensor:
        x = images * STANDARDISATION
        return self.net.conv2d_2b(self.net.conv2d_2a(self.net.conv2d_1a(x)))

    def embed(self, images: Tensor) -> Tensor:
        return self.net(images * STANDARDISATION)


def empty_net() -> InceptionResnetV1:
    """The network before its weights are loaded; drawing its first values touches no random state."""
    from facenet_pytorch import InceptionResnetV1

    with torch.random.fork_rng(devices=[]):
        return InceptionResnetV1(pretrained=None).eval()
