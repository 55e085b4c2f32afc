"""Where diffusion happens: on pixels, or on the latents of a frozen autoencoder. One interface.

Shape legend: B images of H px, c channels on a grid of h = H / factor.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
        kind: the diffusers class. dtype: precision that it is run in.
    Raises:
        OSError: the weights are neither in the folder nor in the hub's cache (diffusers names what is missing).
    """

    def __init__(
        self,
        source: str,
        subfolder: str | None = None,
        revision: str | None = None,
        kind: str = "AutoencoderKL",
        dtype: Dtype = "fp32",
    ) -> None:
        super().__init__()
        import diffusers

        self.vae = getattr(diffusers, kind).from_pretrained(
            source, subfolder=subfolder, revision=revision, torch_dtype=DTYPES[dtype]
        )
        self.vae.requires_grad_(False).eval()
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.channels = self.vae.config.latent_channels
        self.scale = self.vae.config.scaling_factor

    def train(self, mode: bool = True) -> Autoencoder:  # noqa: ARG002 a frozen net stays in eval mode
        return super().train(False)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        def mode(pixels: Tensor) -> Tensor:
            out = self.vae.encode(pixels)
            return out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latents

        return self._finite(mode, images) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return self._finite(lambda z: self.vae.decode(z).sample, latents / self.scale)

    def _finite(self, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`run(x)` as float32. SDXL's autoencoder overflows in fp16: it is then run, and kept, in fp32."""
        out = run(x.to(self.vae.dtype))
        if self.vae.dtype != torch.float32 and not torch.isfinite(out).all():
            warnings.warn(f"the autoencoder is not finite in {self.vae.dtype}: it runs in float32 from now on")
            self.vae.float()
            out = run(x.float())
        return out.float()

    def clip(self, latents: Tensor) -> Tensor:
        return latents
