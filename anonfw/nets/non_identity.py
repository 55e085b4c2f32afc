"""Everything but the person: what of an image the model may see, and the tokens made of it.

Shape legend: B images of H px, N tokens of width D, K measured factors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw.align import template
from anonfw.batch import FaceBatch
from anonfw.errors import AnonfwError


def face_region(size: int, softness: float = 0.0) -> Tensor:
    """(1,1,size,size) in [0,1]: 1 on the inner face of a `portrait` crop, an ellipse from mid-forehead to chin.

    Args:
        softness: share of the radius over which the edge falls to 0, inwards; 0 is a hard edge.
    """
    centre_x, centre_y = face_centre(size)
    unit = size / 112.0
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    radius = (((x - centre_x) / (36.0 * unit)) ** 2 + ((y - centre_y) / (40.0 * unit)) ** 2).sqrt()
    if softness == 0.0:
        return (radius <= 1).float()[None, None]
    return ((1 - radius) / softness).clamp(0, 1)[None, None]


def face_centre(size: int) -> tuple[float, float]:
    """(x, y) of the middle of the inner face in a `portrait` crop of `size` px."""
    centre = template("portrait", size).mean(0)
    return float(centre[0]), float(centre[1]) + 2.0 * size / 112.0


class Canvas:
    """The square of an aligned crop in which pixels are generated: the inner face and a rim of its surroundings.

    Args:
        size: H of the crop. side: of the square, in px; None for the whole crop.
    Raises:
        ValueError: a square that is larger than the crop or cuts the hidden region.
    """

    def __init__(self, size: int, side: int | None) -> None:
        self.side = side or size
        x, y = face_centre(size)
        self.x = min(max(round(x - self.side / 2), 0), size - self.side)
        self.y = min(max(round(y - self.side / 2), 0), size - self.side)
        region = face_region(size)
        if self.side > size or self.cut(region).sum() < 0.99 * region.sum():
            raise ValueError(f"a canvas of {self.side} px does not hold the face of a {size} px crop")

    def cut(self, images: Tensor) -> Tensor:
        """(B,c,H,H) -> (B,c,side,side)."""
        return images[..., self.y : self.y + self.side, self.x : self.x + self.side]

    def put(self, images: Tensor, patch: Tensor) -> Tensor:
        """A copy of (B,c,H,H) with (B,c,side,side) in its square."""
        out = images.clone()
        self.cut(out).copy_(patch)
        return out


class IdentityMask(nn.Module):
    """The spatial half of identity-masked learning: the inner face is taken out before anything reads the image.

    Args:
        size: H. cell: side in pixels of the averages that stay visible inside the face, at H = 112 (they keep skin tone
            and light, far below what a recogniser can read); 0 leaves nothing but the mean colour.
        enabled: False lets the whole image through (an ablation: identity then leaks by construction).
    """

    def __init__(self, size: int, cell: int = 16, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled
        self.grid = 1 if cell == 0 else max(1, round(112 / cell))
        self.register_buffer("region", face_region(size), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B,3,H,H) -> (what may be seen (B,3,H,H), region that is hidden (B,1,H,H))."""
        region = self.region.to(images.dtype).expand(images.shape[0], -1, -1, -1)
        if not self.enabled:
            return images, region
        weight = F.adaptive_avg_pool2d(region, self.grid)
        inside = F.adaptive_avg_pool2d(images * region, self.grid) / weight.clamp_min(1e-3)
        inside = torch.where(weight > 1e-3, inside, torch.zeros_like(inside))
        mean = (images * region).sum((2, 3), keepdim=True) / region.sum((2, 3), keepdim=True)
        inside = torch.where(weight > 0.05, inside, mean)
        coarse = F.interpolate(inside, images.shape[-2:], mode="bilinear", align_corners=False)
        return images * (1 - region) + coarse * region, region


class MeasuredFactors(nn.Sequential):
    """What was measured on a photograph (head pose, expression) -> two tokens. A linear layer, SiLU, a linear layer.

    Args:
        width: D. size: H of the images.
        factors: name -> (mean, spread) in the population, of what is read from `FaceBatch.factors`.
        landmarks: whether the five landmarks are read too, relative to the crop's template.
    """

    def __init__(self, width: int, size: int, factors: Mapping[str, tuple[float, float]], landmarks: bool) -> None:
        inputs = 2 * len(factors) + (10 if landmarks else 0)
        super().__init__(nn.Linear(inputs, 256), nn.SiLU(), nn.Linear(256, 2 * width))
        self.factors, self.landmarks, self.size = dict(factors), landmarks, size
        self.register_buffer(
            "template", torch.tensor(template("portrait", size), dtype=torch.float32), persistent=False
        )

    def forward(self, batch: FaceBatch) -> Tensor:
        """(B,2,D).

        Raises:
            AnonfwError: the data set has not measured one of the factors.
        """
        return super().forward(self.measurements(batch)).unflatten(-1, (2, -1))

    def measurements(self, batch: FaceBatch) -> Tensor:
        """(B, 2K + 10): each factor over its spread with a flag whether it is known, then the landmarks' offsets."""
        columns = []
        for name, (mean, spread) in self.factors.items():
            if name not in batch.factors:
                raise AnonfwError(
                    f"the model reads the factor {name!r}, but the data set has only {sorted(batch.factors)}; "
                    "write the shards with measured factors (--factors)"
                )
            value = (batch.factors[name].float() - mean) / spread
            known = torch.isfinite(value)
            columns += [torch.where(known, value, torch.zeros_like(value)).clamp(-5, 5), known.float()]
        if self.landmarks:
            columns += ((batch.landmarks - self.template) * (16.0 / self.size)).flatten(1).unbind(-1)
        return torch.stack(columns, -1)


class NonIdentityExtractor(nn.Module):
    """E_n: masked image -> a grid of tokens, and one token of measured factors (pose, expression).

    Args:
        width: D. grid: tokens a side. channels: of the convolutions.
        factors: name -> (mean, spread) in the population, what the measured-factor token reads from
            `FaceBatch.factors`; empty for none.
        landmarks: whether that token also reads the five landmarks, relative to the crop's template.
    """

    def __init__(
        self,
        width: int,
        size: int,
        grid: int = 7,
        channels: int = 64,
        factors: Mapping[str, tuple[float, float]] | None = None,
        landmarks: bool = True,
    ) -> None:
        super().__init__()
        self.factors = dict(factors or {})
        layers: list[nn.Module] = [nn.Conv2d(4, channels, 7, stride=4, padding=3), nn.SiLU()]
        side = -(-size // 4)
        while side > grid:
            layers += [nn.GroupNorm(8, channels), nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), nn.SiLU()]
            channels, side = 2 * channels, -(-side // 2)
        self.convolutions = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(grid))
        self.to_tokens = nn.Linear(channels, width)
        self.position = nn.Parameter(torch.zeros(1, grid * grid, width))
        self.norm = nn.LayerNorm(width)
        self.measured = MeasuredFactors(width, size, self.factors, landmarks) if self.factors or landmarks else None

    def forward(self, visible: Tensor, region: Tensor, batch: FaceBatch) -> Tensor:
        """(B,3,H,H) in [-1,1], (B,1,H,H) -> c_n (B,N,D)."""
        features = self.convolutions(torch.cat([visible, region], 1))
        tokens = self.to_tokens(features.flatten(2).transpose(1, 2)) + self.position
        if self.measured is not None:
            tokens = torch.cat([tokens, self.measured(batch)], 1)
        return self.norm(tokens)
