"""A small text-to-image model of faces, trained from scratch: Stable Diffusion 1.5's layout at 1/100 of its size.

Latents of a frozen autoencoder are diffused; captions come in through a CLIP text encoder that is trained along. It is
there so that identity adapters and reverse personalization can be measured where no released weights are to be had
(docs/face_model.md). `save_pipeline` writes a folder that diffusers opens.

Symbols: x_0 / x_t clean and noisy latents, c the caption's states, t time, eps noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import diffusion, tiny_pipelines
from anonfw.batch import FaceBatch, StepOut
from anonfw.errors import AnonfwError
from anonfw.nets.codec import Autoencoder
from anonfw.system import System


class TextToImage(System):
    """It makes faces of nobody and changes no photograph: `anonymize` belongs to an adapter on top of it.

    Args:
        size: side in px of the pictures; those of a batch are resized to it. codec: frozen autoencoder.
        unet: (in_channels, out_channels, grid, token_width) -> diffusers U-Net.
        noise: `diffusion.noise_schedule`.
        losses, optimizer, schedule, seed: as in `System`.
        token_width: D of the caption's states. words: those that are one token (`tiny_pipelines.tokenizer`).
        drop_caption: share of the samples whose caption is "", for guidance.
        drop_clause: share of a caption's clauses that are left out, so that short captions mean something, too.
        max_weight: gamma of `diffusion.snr_weight`; None for no weighting.
        sampler, steps, guidance: of `generate`.
    """

    def __init__(
        self,
        size: int,
        codec: Autoencoder,
        unet: Callable[..., nn.Module],
        noise,
        losses: Mapping[str, nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        token_width: int = 160,
        words: str = tiny_pipelines.WORDS,
        drop_caption: float = 0.1,
        drop_clause: float = 0.2,
        max_weight: float | None = None,
        sampler: diffusion.Sampler = "dpm++",
        steps: int = 20,
        guidance: float = 2.0,
    ) -> None:
        super().__init__(losses, optimizer, schedule, seed)
        if size % codec.factor:
            raise AnonfwError(f"size {size} is no multiple of {codec.factor}, the autoencoder's pixels a position")
        self.size, self.grid, self.codec, self.noise = size, size // codec.factor, codec, noise
        self.drop_caption, self.drop_clause, self.max_weight = drop_caption, drop_clause, max_weight
        self.sampler, self.steps, self.guidance = sampler, steps, guidance
        self.tokenizer = tiny_pipelines.tokenizer(words)
        self.text_encoder = tiny_pipelines.text_encoder(len(self.tokenizer), token_width)
        self.unet = unet(codec.channels, codec.channels, self.grid, token_width)

    def step(self, batch: FaceBatch, rng: torch.Generator) -> StepOut:
        # Condition: the caption, thinned; of some samples nothing is left.
        c = self.text(self.thinned(batch.caption, rng))

        # Corrupt.
        x_0 = self.latents(batch)
        t = diffusion.random_times(self.noise, len(x_0), rng)
        eps = torch.randn(x_0.shape, generator=rng, device=x_0.device)
        x_t = diffusion.corrupt(self.noise, x_0, eps, t)

        # Predict.
        return StepOut(
            prediction=self.unet(x_t, t, c).sample,
            target=diffusion.target(self.noise, x_0, eps, t),
            t=t,
            weight=diffusion.snr_weight(self.noise, t, self.max_weight),
        )

    def thinned(self, captions: Sequence[str], rng: torch.Generator) -> list[str]:
        """Captions without some of their clauses ("30-year-old woman, smiling" has two), or empty."""
        if not captions:
            raise AnonfwError(
                "the batch has no captions: `embed DATASET --captions`, then the loader's `captions: true`"
            )
        kept = []
        for caption in captions:
            clauses = caption.split(", ")
            draws = torch.rand(1 + len(clauses), generator=rng, device=rng.device).tolist()
            left = [clause for clause, draw in zip(clauses, draws[1:], strict=True) if draw >= self.drop_clause]
            kept.append("" if draws[0] < self.drop_caption else ", ".join(left))
        return kept

    def text(self, captions: Sequence[str]) -> Tensor:
        """c (B,77,D)."""
        ids = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return self.text_encoder(ids.to(self.device)).last_hidden_state

    def latents(self, batch: FaceBatch) -> Tensor:
        """x_0 (B,c,h,h): from sidecars, else encoded from the pictures."""
        if batch.latents is not None:
            if batch.latents.shape[1:] != (self.codec.channels, self.grid, self.grid):
                raise AnonfwError(
                    f"the batch's latents are {tuple(batch.latents.shape[1:])}; size {self.size} has "
                    f"{(self.codec.channels, self.grid, self.grid)}: `embed DATASET --latents ... --size {self.size}`"
                )
            return batch.latents
        images = F.interpolate(batch.pixels(), (self.size, self.size), mode="bicubic", antialias=True)
        return self.codec.encode(images.clamp(-1, 1))

    def anonymize(self, batch: FaceBatch, draw: int = 0) -> Tensor:  # noqa: ARG002 System's signature
        raise AnonfwError(
            "a text-to-image model makes new faces and cannot anonymize a photograph: train an identity adapter on it "
            "(recipes/face_adapter.yaml)"
        )

    @torch.no_grad()
    def generate(self, captions: Sequence[str], draw: int = 0, guidance: float | None = None) -> Tensor:
        """(B,3,size,size) in [-1,1]: a face of nobody for each caption. Row i starts from the same noise in each call.

        Args:
            guidance: w of classifier-free guidance (Ho & Salimans 2022), eps(empty) + w (eps(c) - eps(empty)).
        """
        w = self.guidance if guidance is None else guidance
        c, empty = self.text(captions), self.text([""])

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            """prediction("") + w (prediction(c) - prediction(""))."""
            there = self.unet(x_t, t, c).sample
            return there if w == 1 else self.unet(x_t, t, empty.expand_as(c)).sample.lerp(there, w)

        shape = (self.codec.channels, self.grid, self.grid)
        noise = torch.stack([torch.randn(shape, generator=self.rng(f"draw {draw}", i)) for i in range(len(captions))])
        x_0 = diffusion.sample(self.noise, guided, noise.to(self.device), self.steps, self.sampler)
        return self.codec.decode(x_0).clamp(-1, 1)

    def save_pipeline(self, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes a `StableDiffusionPipeline` in diffusers' layout, the autoencoder included.

        Raises:
            AnonfwError: a parameter does not fit into `dtype`.
        """
        from copy import deepcopy

        from diffusers import DDIMScheduler, StableDiffusionPipeline

        parts = [deepcopy(part).to("cpu", dtype).eval() for part in (self.unet, self.text_encoder, self.codec.vae)]
        for part in parts:
            if not all(bool(value.isfinite().all()) for value in part.parameters()):
                raise AnonfwError(f"parameters of {type(part).__name__} are not finite as {dtype}: not saved")
        unet, text_encoder, vae = parts
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=self.tokenizer,
            unet=unet,
            scheduler=DDIMScheduler.from_config(
                self.noise.config, clip_sample=False, timestep_spacing="trailing", steps_offset=1
            ),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)
