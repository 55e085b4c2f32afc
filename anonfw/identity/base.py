"""What every recogniser is: a frozen module from aligned crops to unit-norm embeddings, differentiable in its input.

Shape legend: B images, D width of the embedding (`dim`), S pixels of the crop (`size`), C,h,w of the early map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import align
from anonfw import weights as weights_table
from anonfw.errors import AnonfwError

# A CPU's caches hold the activations of about this many images: 1.5 times as fast with gradients as 64 at once.
CPU_BATCH = 16


class Recognizer(nn.Module):
    """The contract. A subclass sets the attributes and gives `embed`, and `early` where it has such a map.

    Attributes:
        name: of the sidecars with its embeddings.
        dim: D.
        size: S.
        window: the part of an aligned face that it wants, as (x, y, side) in the units of the 112-pixel arcface crop
            (`align.window`).
        colour: channel order of its input; always RGB, whatever the net inside wants.
        licence, sha256: of its weights.
    """

    name: str
    dim: int
    size: int
    window: tuple[float, float, float] = (0.0, 0.0, 112.0)
    colour: str = "RGB"
    licence: str
    sha256: str

    def embed(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [-1,1] -> (B,D), any length."""
        raise NotImplementedError

    def early(self, images: Tensor) -> Tensor:  # noqa: ARG002
        """(B,3,S,S) in [-1,1] -> (B,C,h,w): what `features` gives."""
        raise AnonfwError(f"{self.name} has no early feature map; ArcFace, AdaFace, EdgeFace and FaceNet have one")

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,S,S) RGB in [-1,1] -> (B,D) float32 unit norm; differentiable in `images`.

        Raises:
            ValueError: another shape or dtype, or pixels that are plainly 0..255. (The range is looked at on the CPU
                only: on a GPU the look would wait for it. Unclamped predictions, outside [-1,1], are welcome.)
        """
        self._check(images)
        if not len(images):
            return images.new_zeros(0, self.dim, dtype=torch.float32)
        embedding = in_parts(self.embed, images)
        return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)

    def features(self, images: Tensor) -> Tensor:
        """The map of an early layer, where texture is still to be seen: (B,3,S,S) RGB in [-1,1] -> (B,C,h,w).

        Differentiable, not normalised; which layer and what C,h,w: docs/encoders.md. B is at least 1.

        Raises:
            AnonfwError: this recogniser has no such map.
            ValueError: as `forward`.
        """
        self._check(images)
        return in_parts(self.early, images)

    def crop(self, images: Tensor, alignment: str) -> Tensor:
        """Its input, cut from aligned images of any size, differentiably: (B,3,s,s) -> (B,3,S,S)."""
        return align.window(images, alignment, self.window, self.size)

    def train(self, mode: bool = True) -> Recognizer:  # noqa: ARG002
        """Stays in eval: a frozen recogniser must not move its batch statistics when the system trains."""
        return super().train(False)

    def freeze(self) -> Recognizer:
        return self.requires_grad_(False).eval()

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.size, self.size) or not images.is_floating_point():
            raise ValueError(
                f"{self.name} takes (B,3,{self.size},{self.size}) floats in [-1,1], got {tuple(images.shape)} "
                f"{images.dtype}; `embed_aligned` crops, `FaceBatch.pixels` scales"
            )
        if images.device.type == "cpu" and len(images):
            low, high = images.detach().aminmax()
            if low >= 0 and high > 2:
                raise ValueError(f"{self.name} takes [-1,1], got {low:.3g}..{high:.3g}: divide by 127.5, subtract 1")


@dataclass(frozen=True)
class Origin:
    """Where a recogniser's weights come from; `name` is that of its row of the table, else the file's."""

    file: Path
    name: str
    licence: str
    sha256: str


def origin(weights: str | Path) -> Origin:
    """The file behind a name of the weights table or a path.

    Raises:
        WeightsError: neither a name nor a file, or the file cannot be fetched.
    """
    if isinstance(weights, str) and weights in weights_table.table():
        row = weights_table.weight(weights)
        file, name, licence = weights_table.path(row.name), row.name, row.licence
    else:
        file = Path(weights).expanduser()
        if not file.is_file():
            raise weights_table.WeightsError(
                f"{weights} is neither a file nor a name of the weights table ({', '.join(weights_table.table())})"
            )
        name, licence = file.stem, "not stated"
    return Origin(file, name, licence, weights_table.file_sha256(file))


def in_parts(function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`function` of the images, on a CPU as many at a time as its caches hold."""
    images = images.contiguous(memory_format=torch.channels_last)  # 1.4 times as fast for ArcFace on a CPU
    if images.device.type != "cpu" or len(images) < 2 * CPU_BATCH:
        return function(images)
    return torch.cat([function(part) for part in images.tensor_split(len(images) // CPU_BATCH)])


def embed_aligned(recognizer: Recognizer, images: Tensor, alignment: str) -> Tensor:
    """Embeddings of aligned images, differentiably: (B,3,s,s) in [-1,1], any s and alignment -> (B,D) unit norm."""
    return recognizer(recognizer.crop(images, alignment))
