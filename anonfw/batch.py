"""The two contracts that every part of the project speaks: what a loader yields and what a step returns.

Shape legend: B samples, H and W pixels (H = W), D width of a recogniser's embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor


@dataclass
class FaceBatch:
    """B aligned faces. Images stay uint8 until they are on the device: call `pixels()` there.

    Attributes:
        image: (B,3,H,W) uint8, RGB, aligned as the data set's card says (`anonfw.align`).
        identity: (B,) int64, number of the person inside the data set.
        index: (B,) int64, position of the sample in the data set's index.
        key: B strings, the shard keys (unique inside a data set).
        landmarks: (B,5,2) float32, x and y in pixels of `image`: eyes, nose tip, mouth corners (image left first).
        factors: name -> (B,) float32, measured properties such as `yaw`; NaN where a sample has none.
        embeddings: recogniser name -> (B,D) float32 unit-norm, joined from sidecars.
        caption: B strings, what a sentence says of each picture; empty where the data set has no captions.
        latents: (B,c,h,w) float32, the autoencoder's encoding of each picture as it is in the batch (mirrored where it
            is), times its scaling factor; from sidecars. None where none were asked for.
        text: encoded captions from sidecars: `states` (B,77,D) and, with SDXL's second encoder, `pooled` (B,P);
            float32. Empty where none were asked for.
        partner: the second half of a pair, row by row: another photo of the same person (pairs), or a sample of
            another data set (cross batches). None for plain batches.
    """

    image: Tensor
    identity: Tensor
    index: Tensor
    key: list[str]
    landmarks: Tensor
    factors: dict[str, Tensor] = field(default_factory=dict)
    embeddings: dict[str, Tensor] = field(default_factory=dict)
    caption: list[str] = field(default_factory=list)
    latents: Tensor | None = None
    text: dict[str, Tensor] = field(default_factory=dict)
    partner: FaceBatch | None = None

    def __len__(self) -> int:
        return self.image.shape[0]

    @property
    def device(self) -> torch.device:
        return self.image.device

    def pixels(self) -> Tensor:
        """(B,3,H,W) float32 in [-1,1]."""
        return self.image.to(torch.float32).div_(127.5).sub_(1.0)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FaceBatch:
        """The same batch with every tensor on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> FaceBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function) -> FaceBatch:
        def apply(value):
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, dict):
                return {name: function(tensor) for name, tensor in value.items()}
            if isinstance(value, FaceBatch):
                return value._map(function)
            return value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def select(self, rows: Tensor | list[int] | slice) -> FaceBatch:
        """The batch of those rows, in that order."""
        rows = torch.arange(len(self))[rows] if isinstance(rows, slice) else torch.as_tensor(rows)
        taken = self._map(lambda tensor: tensor[rows.to(tensor.device)])

        def reword(batch: FaceBatch) -> FaceBatch:
            partner = reword(batch.partner) if batch.partner is not None else None
            key = [batch.key[i] for i in rows.tolist()]
            caption = [batch.caption[i] for i in rows.tolist()] if batch.caption else []
            return replace(batch, key=key, caption=caption, partner=partner)

        return reword(taken)

    @staticmethod
    def concatenate(batches: list[FaceBatch]) -> FaceBatch:
        """One batch of all rows. Partners are dropped; all must have the same factors, embeddings, text, and so on."""
        first = batches[0]
        has_latents = first.latents is not None
        return FaceBatch(
            image=torch.cat([b.image for b in batches]),
            identity=torch.cat([b.identity for b in batches]),
            index=torch.cat([b.index for b in batches]),
            key=[key for b in batches for key in b.key],
            landmarks=torch.cat([b.landmarks for b in batches]),
            factors={name: torch.cat([b.factors[name] for b in batches]) for name in first.factors},
            embeddings={name: torch.cat([b.embeddings[name] for b in batches]) for name in first.embeddings},
            caption=[caption for b in batches for caption in b.caption],
            latents=torch.cat([b.latents for b in batches]) if has_latents else None,
            text={name: torch.cat([b.text[name] for b in batches]) for name in first.text},
        )


@dataclass
class StepOut:
    """What a system's step hands to the losses. N = samples that went through the network (B, or 2B for pairs).

    Attributes:
        prediction: (N,...) the network's output.
        target: (N,...) what it is regressed on; same shape. None where nothing is (embeddings).
        x0_hat: (R,3,H,W) clean images implied by the prediction of the first R <= N rows, in [-1,1] (not clamped);
            None where a system predicts no image.
        t: (N,) int64 diffusion time of each sample, 0 = clean; None where nothing diffuses.
        weight: (N,) per-sample loss weight (for example from a signal-to-noise weighting); None means 1.
        terms: name -> (N,) or (B,) further loss terms that the step computed on the way (KL, alignment, ...).
        metrics: name -> scalar, logged and never differentiated (active latent dimensions, ...).
        rng: the step's generator, which `System` hands on: a loss that draws, draws from it.
    """

    prediction: Tensor
    target: Tensor | None = None
    t: Tensor | None = None
    x0_hat: Tensor | None = None
    weight: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)
    rng: torch.Generator | None = None
