"""IDDiffuse's texture extractor E_t (Eq. 5-6, after DCFace): patch statistics of a recogniser's early features.

Shape legend: B images, C x h x w early features, m x m patches, D width of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TextureExtractor(nn.Module):
    """(B,C,h,w) features -> (B, m^2 + 1, D) tokens: mean and standard deviation of each patch, and of the whole image.

    The true standard deviation is used. (DCFace's released code computes E[x] - E[x^2] and calls it variance; the paper
    states the standard deviation.)

    Args:
        channels: C, read from the recogniser's feature map. width: D. grid: m.
        dropout: share of the features that is zeroed where `forward` is handed a generator, in training.
        side: largest h that is read; larger maps are resized (nearest), which saves most of the cost on a CPU.
    """

    def __init__(
        self, channels: int, width: int = 512, grid: int = 5, dropout: float = 0.3, side: int | None = None
    ) -> None:
        super().__init__()
        self.grid, self.dropout, self.side = grid, dropout, side
        self.block = nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1), nn.ReLU())
        self.mix = nn.Parameter(torch.full((2, width), 0.5))
        self.position = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        nn.init.normal_(self.position, std=0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Features that the grid does not divide are resized (nearest) to the next smaller size that it does.

        Args:
            rng: what dropout draws from; without one, or in eval mode, nothing is dropped.
        """
        side = min(features.shape[-1], self.side or features.shape[-1]) // self.grid * self.grid
        if side == 0:
            raise ValueError(f"{features.shape[-1]} px of features: too few for {self.grid} x {self.grid} patches")
        if side != features.shape[-1]:
            features = F.interpolate(features, (side, side), mode="nearest")
        if rng is not None and self.training and self.dropout:
            kept = torch.empty_like(features).bernoulli_(1 - self.dropout, generator=rng)
            features = features * kept.div_(1 - self.dropout)
        x = self.block(features).float()
        patch = side // self.grid
        mean, square = (F.avg_pool2d(values, patch).flatten(2) for values in (x, x.square()))  # (B,D,m^2)
        # The patches are of one size, so the whole image's moments are the means of theirs.
        mean, square = (torch.cat([part.mean(-1, keepdim=True), part], -1) for part in (mean, square))
        # A root has no gradient at 0, where a patch is flat.
        std = ((square - mean.square()).clamp_min(0) + 1e-6).sqrt()
        tokens = (self.mix[0, :, None] * mean + self.mix[1, :, None] * std).transpose(1, 2)
        return self.norm(tokens + self.position)
