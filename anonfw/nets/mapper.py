"""E_I: the embeddings of several recognisers, joined and mapped into one space (IDDiffuse, Eq. 3).

Shape legend: B samples, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw.batch import FaceBatch
from anonfw.errors import AnonfwError


class Ensemble(nn.Module):
    """v(x) = [F_1(x), F_2(x), ...] / sqrt(n): unit-norm embeddings of n frozen recognisers side by side, unit norm.

    Args:
        recognizers: of `anonfw.identity`, each another one.
        alignment: crop of the batch's images.
    """

    def __init__(self, recognizers: Sequence[nn.Module], alignment: str = "portrait") -> None:
        super().__init__()
        self.names = [recognizer.name for recognizer in recognizers]
        if not self.names or len(set(self.names)) < len(self.names):
            raise ValueError(f"an ensemble needs one recogniser or more, each another one, not {self.names}")
        self.recognizers = nn.ModuleList(recognizers)
        self.alignment = alignment
        self.dim = sum(recognizer.dim for recognizer in recognizers)

    def forward(self, batch: FaceBatch) -> Tensor:
        """(B,D) unit norm."""
        return self.join(self.parts(batch))

    def join(self, parts: Mapping[str, Tensor]) -> Tensor:
        """The recognisers' embeddings by name -> (B,D) unit norm."""
        return F.normalize(torch.cat([parts[name] for name in self.names], -1), dim=-1)

    def parts(self, batch: FaceBatch) -> dict[str, Tensor]:
        """Name -> (B,D_i) unit norm: from the sidecars that the loader joined, else by the recogniser.

        Raises:
            AnonfwError: neither sidecar nor pictures, or a sidecar of another width.
        """
        return {recognizer.name: self._part(recognizer, batch) for recognizer in self.recognizers}

    def _part(self, recognizer: nn.Module, batch: FaceBatch) -> Tensor:
        if recognizer.name in batch.embeddings:
            e = batch.embeddings[recognizer.name].float()
            if e.shape[1] != recognizer.dim:
                raise AnonfwError(
                    f"the {recognizer.name} embeddings are {e.shape[1]} wide, {recognizer.name} gives {recognizer.dim}"
                )
            return e
        if not batch.image.numel():
            raise AnonfwError(
                f"no {recognizer.name} embeddings and no pictures to compute them from: name it in the loader's "
                "sidecars (python -m anonfw embed makes them), or say decode: true"
            )
        with torch.no_grad():
            return recognizer(recognizer.crop(batch.pixels(), self.alignment))


class Mapper(nn.Module):
    """MLP D -> hidden -> ... -> dim with BatchNorm and ReLU between, unit-norm output. The paper: 2048, 1024, 512.

    Args:
        inputs: D.
        hidden, dim: widths; no `hidden` is a linear map.
        skip: add a linear map beside the MLP, orthogonal at first, while the MLP's last layer starts at zero: it begins
            as a projection that keeps what the recognisers know, instead of forgetting it. Not in the paper.
    """

    def __init__(self, inputs: int, hidden: Sequence[int] = (2048, 1024), dim: int = 512, skip: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.scale = inputs**0.5  # unit norm to unit variance
        self.skip = nn.utils.skip_init(nn.Linear, inputs, dim, bias=False) if skip else None
        for width in hidden:
            layers += [nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
            inputs = width
        self.layers = nn.Sequential(*layers, nn.Linear(inputs, dim))
        self.dim = dim
        if self.skip is not None:
            nn.init.orthogonal_(self.skip.weight)
            nn.init.zeros_(self.layers[-1].weight)
            nn.init.zeros_(self.layers[-1].bias)

    def forward(self, v: Tensor) -> Tensor:
        """(B,D) -> (B,dim) unit norm."""
        v = v * self.scale
        z = self.layers(v) if self.skip is None else self.layers(v) + self.skip(v)
        return F.normalize(z.float(), dim=-1)
