"""What every recogniser is: a frozen module from aligned crops to unit-norm embeddings, differentiable in its input.

Shape legend: B images, D width of the embedding (`dim`), S pixels of the crop (`size`).
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import align
from anonfw import weights as weights_table

# A CPU's caches hold the activations of about this many images: 1.5 times as fast with gradients as 64 at once.
CPU_BATCH = 16


class Recognizer(nn.Module):
    """The contract. A subclass sets the attributes and gives `embed`.

    Attributes:
        name: of the sidecars with its embeddings.
        dim: D.
        size: S.
        crop: alignment of its input (`anonfw.align`).
        colour: channel order of its input; always RGB, whatever the net inside wants.
        licence, sha256: of its weights.
    """

    name: str
    dim: int
    size: int
    crop: str = "arcface"
    colour: str = "RGB"
    licence: str
    sha256: str

    def embed(self, images: Tensor) -> Tensor:
        """(B,3,S,S) in [-1,1] -> (B,D), any length."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,S,S) RGB in [-1,1] -> (B,D) float32 unit norm; differentiable in `images`.

        Raises:
            ValueError: another shape or dtype, or pixels that are plainly 0..255. (The range is looked at on the CPU
                only: on a GPU the look would wait for it. Unclamped predictions, outside [-1,1], are welcome.)
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.size, self.size) or not images.is_floating_point():
            raise ValueError(
                f"{self.name} takes (B,3,{self.size},{self.size}) floats in [-1,1], got {tuple(images.shape)} "
                f"{images.dtype}; `embed_aligned` crops, `FaceBatch.pixels` scales"
            )
        if not len(images):
            return images.new_zeros(0, self.dim, dtype=torch.float32)
        if images.device.type == "cpu":
            low, high = images.detach().aminmax()
            if low >= 0 and high > 2:
                raise ValueError(f"{self.name} takes [-1,1], got {low:.3g}..{high:.3g}: divide by 127.5, subtract 1")
        embedding = self.embed(images)
        return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=1)

    def train(self, mode: bool = True) -> Recognizer:  # noqa: ARG002
        """Stays in eval: a frozen recogniser must not move its batch statistics when the system trains."""
        return super().train(False)

    def freeze(self) -> Recognizer:
        return self.requires_grad_(False).eval()


class OnnxRecognizer(Recognizer):
    """A recogniser from an ONNX file with one image input and one embedding output, converted to torch.

    Args:
        weights: a name of the weights table or the path of an ONNX file.
    Raises:
        WeightsError: neither a name nor a file, or the file cannot be fetched.
        ValueError: the graph is not a recogniser's.
    """

    def __init__(self, weights: str | Path) -> None:
        super().__init__()
        from anonfw.identity.onnx_graph import convert

        known = isinstance(weights, str) and weights in weights_table.table()
        if known:
            row = weights_table.weight(str(weights))
            file, self.name, self.licence = weights_table.path(row.name), row.name, row.licence
        else:
            file = Path(weights).expanduser()
            if not file.is_file():
                raise weights_table.WeightsError(
                    f"{weights} is neither a file nor a name of the weights table ({', '.join(weights_table.table())})"
                )
            self.name, self.licence = file.stem, "not stated"
        self.sha256 = weights_table.file_sha256(file)
        self.file = file
        self.net, self.size, self.dim = convert(file)
        self.net.to(memory_format=torch.channels_last)  # 1.4 times as fast for ArcFace on a CPU
        self.freeze()

    def embed(self, images: Tensor) -> Tensor:
        images = images.contiguous(memory_format=torch.channels_last)
        if images.device.type != "cpu":
            return self.net(images)
        parts = images.tensor_split(max(1, len(images) // CPU_BATCH))
        return torch.cat([self.net(part) for part in parts])


def embed_aligned(recognizer: Recognizer, images: Tensor, alignment: str) -> Tensor:
    """Embeddings of aligned images, differentiably: (B,3,S,S) in [-1,1], any S and alignment -> (B,D) unit norm."""
    return recognizer(align.window_to_arcface(images, alignment, recognizer.size))
