"""Where diffusion happens: on pixels, or on the latents of a frozen autoencoder. One interface.

Shape legend: B images of H px, c channels on a grid of h = H / factor.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pixels(nn.Module):
    """Images as they are, `patch` x `patch` pixels folded into channels: (B,3,H,W) <-> (B,3 patch^2,H/patch,W/patch).

    Args:
        spread: standard deviation that images are brought to by a fixed factor. Photographs in [-1,1] have about 0.5;
            the noise schedules assume 1.
    """

    def __init__(self, patch: int = 1, spread: float = 0.5) -> None:
        super().__init__()
        self.factor = patch
        self.channels = 3 * patch * patch
        self.spread = spread

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor) / self.spread

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents * self.spread, self.factor)

    def clip(self, latents: Tensor) -> Tensor:
        """Latents whose image lies in [-1,1]."""
        return latents.clamp(-1 / self.spread, 1 / self.spread)


class Autoencoder(nn.Module):
    """A frozen diffusers `AutoencoderKL` (or `AutoencoderTiny`): SD 1.5's makes (B,3,512,512) to (B,4,64,64).

    Args:
        source: local folder or hub id. subfolder, revision: as in diffusers' `from_pretrained`.
        kind: the diffusers class.
    Raises:
        OSError: the weights are neither in the folder nor in the hub's cache (diffusers names what is missing).
    """

    def __init__(
        self,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        kind: str = "AutoencoderKL",
    ) -> None:
        super().__init__()
        import diffusers

        self.vae = getattr(diffusers, kind).from_pretrained(source, subfolder=subfolder, revision=revision)
        self.vae.requires_grad_(False).eval()
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.channels = self.vae.config.latent_channels
        self.scale = self.vae.config.scaling_factor

    def train(self, mode: bool = True) -> Autoencoder:  # noqa: ARG002 a frozen net stays in eval mode
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        out = self.vae.encode(images.to(self.vae.dtype))
        latents = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents
        return latents.float() * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self.vae.decode((latents / self.scale).to(self.vae.dtype)).sample.float()

    def clip(self, latents: Tensor) -> Tensor:
        return latents
