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
        channels: C, read from the recogniser's feature map. width: D. grid: m. dropout: of the features.
    """

    def __init__(self, channels: int, width: int = 512, grid: int = 5, dropout: float = 0.3) -> None:
        super().__init__()
        self.grid = grid
        self.block = nn.Sequential(
            nn.Dropout(dropout), nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1), nn.ReLU()
        )
        self.mix = nn.Parameter(torch.full((2, width), 0.5))
        self.position = nn.Parameter(torch.zeros(1, grid * grid + 1, width))
        nn.init.normal_(self.position, std=0.02)
        self.norm = nn.LayerNorm(width)

    def forward(self, features: Tensor) -> Tensor:
        """Features that the grid does not divide are resized (nearest) to the next smaller size that it does."""
        side = features.shape[-1] // self.grid * self.grid
        if side == 0:
            raise ValueError(f"{features.shape[-1]} px of features: too few for {self.grid} x {self.grid} patches")
        if side != features.shape[-1]:
            features = F.interpolate(features, (side, side), mode="nearest")
        x = self.block(features)
        patch = side // self.grid
        patches = F.unfold(x, patch, stride=patch).unflatten(1, (x.shape[1], patch * patch))
        whole = x.flatten(2).unsqueeze(-1)
        tokens = torch.cat([self._statistics(whole, 2), self._statistics(patches, 2)], 1)
        return self.norm(tokens + self.position)

    def _statistics(self, x: Tensor, over: int) -> Tensor:
        """(B,D,n,N) -> (B,N,D): a learned mix of mean and standard deviation over the n pixels of each patch."""
        x = x.float()
        mean, variance = x.mean(over), x.var(over, unbiased=False)
        std = (variance + 1e-6).sqrt()  # a root has no gradient at 0, where a patch is flat
        return (self.mix[0, :, None] * mean + self.mix[1, :, None] * std).transpose(1, 2)
