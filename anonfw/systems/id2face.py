"""ID²Face: our reading of the abstract of arXiv 2510.24213 (the paper's internals are not public; docs/id2face.md).

An identity VAE models who it is; everything else is read from the image with the inner face masked out; both are
recomposed across two photographs of one person and condition a diffusion model through a soft gate. At inference an
identity is drawn from the prior, at right angles to the person's own.

Symbols: e recogniser embedding, q(z|e) its posterior, e_hat decoded embedding, c_id identity tokens, c_n non-identity
tokens, x_0 / x_t clean and noisy sample in the codec's space. N = 2B: both photographs of each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import diffusion
from anonfw.batch import FaceBatch, StepOut
from anonfw.identity import embed_aligned
from anonfw.nets.attention import GatedKV, install
from anonfw.nets.identity_vae import IdentityVAE, Posterior, orthogonal
from anonfw.nets.non_identity import Canvas, IdentityMask, NonIdentityExtractor, face_region
from anonfw.system import System


class ID2Face(System):
    """Identity-Decoupled Latent Recomposer, Identity-Guided Latent Harmonizer, Orthogonal Identity Mapping.

    Args:
        size: H of the images in px. identity: frozen recogniser. codec: pixels or a frozen autoencoder.
        unet: (in_channels, out_channels, grid, token_width) -> diffusers U-Net. noise: `diffusion.noise_schedule`.
        token_width: D. identity_tokens: made of e_hat. latent_dim: Z of the VAE; beta: weight of its KL.
        masking: identity-masked learning. `spatial`: the inner face is hidden from E_n; `token`: identity tokens are
            replaced by a learned null with probability `null_share`; `both`.
        cell: side of the averages that stay visible inside the face (px at 112). factors, landmarks: what the
            measured-factor token reads (`NonIdentityExtractor`).
        self_share: share of samples that keep their own identity latent instead of the partner's (the self terms).
        gate: what the harmonizer's gate reads: the noisy hidden state, or the predicted x_0 (two passes).
        canvas: side in px of the square in which pixels are generated; None for the whole crop.
        max_weight: gamma of `diffusion.snr_weight`; None for no weighting.
        face_weight: extra weight of the error inside the hidden region (1 = none). Outside it the source is kept.
        sampler, steps: of `anonymize`. orthogonal_in: where the drawn identity is at right angles to the source.
        guidance, guidance_from: w and c' of `guided`; 1 is none. paste: keep the source's pixels outside the face.
    """

    def __init__(
        self,
        size: int,
        identity: nn.Module,
        codec: nn.Module,
        unet: Callable[..., nn.Module],
        noise,
        losses: Mapping[str, nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        token_width: int = 256,
        identity_tokens: int = 4,
        latent_dim: int = 128,
        beta: float = 1e-3,
        masking: Literal["spatial", "token", "both", "none"] = "both",
        null_share: float = 0.1,
        cell: int = 16,
        factors: Mapping[str, tuple[float, float]] | None = None,
        landmarks: bool = True,
        self_share: float = 0.25,
        gate: Literal["hidden", "prediction"] = "hidden",
        canvas: int | None = None,
        max_weight: float | None = 5.0,
        face_weight: float = 3.0,
        sampler: diffusion.Sampler = "dpm++",
        steps: int = 12,
        orthogonal_in: Literal["latent", "recognizer", "none"] = "latent",
        guidance: float = 1.0,
        guidance_from: Literal["nobody", "source"] = "nobody",
        paste: bool = True,
    ) -> None:
        super().__init__(losses, optimizer, schedule, seed)
        self.identity, self.codec, self.noise = identity, codec, noise
        self.null_share = null_share if masking in ("token", "both") else 0.0
        self.self_share, self.gate, self.max_weight, self.beta = self_share, gate, max_weight, beta
        self.sampler, self.steps, self.orthogonal_in, self.paste = sampler, steps, orthogonal_in, paste
        self.guidance, self.guidance_from = guidance, guidance_from
        self.canvas = Canvas(size, canvas)
        grid = self.canvas.side // codec.factor
        self.vae = IdentityVAE(identity.dim, latent_dim)
        self.mask = IdentityMask(size, cell, enabled=masking in ("spatial", "both"))
        self.extract = NonIdentityExtractor(token_width, size, factors=factors, landmarks=landmarks)
        self.to_identity_tokens = nn.Sequential(
            nn.Linear(identity.dim, 2 * token_width),
            nn.GELU(),
            nn.Linear(2 * token_width, identity_tokens * token_width),
        )
        self.identity_norm = nn.LayerNorm(token_width)
        self.null_identity = nn.Parameter(torch.zeros(1, identity_tokens, token_width))
        # The U-Net reads x_t beside what may be seen and the hidden region, as inpainting networks do.
        self.unet = unet(
            in_channels=2 * codec.channels + 1, out_channels=codec.channels, grid=grid, token_width=token_width
        )
        time_width = self.unet.time_embedding.linear_2.out_features
        install(self.unet, lambda attn: self._gate(attn, token_width, time_width))
        self.register_buffer("paste_mask", face_region(size, softness=0.08), persistent=False)
        inside = F.adaptive_avg_pool2d(self.canvas.cut(face_region(size)), grid)
        self.register_buffer("error_weight", 1 + (face_weight - 1) * inside, persistent=False)

    def _gate(self, attn, token_width: int, time_width: int) -> GatedKV:
        processor = GatedKV(attn.to_q.in_features, token_width, time_width, self.gate, self.codec.channels)
        processor.start_from(attn)
        return processor

    def step(self, batch: FaceBatch, rng: torch.Generator) -> StepOut:
        pair = FaceBatch.concatenate([batch, batch.partner])
        x, n, e = pair.pixels(), len(pair), self.embed(pair)

        # Condition: identity latents, and what is seen of the image without its inner face.
        q = self.vae.encode(e)
        e_hat = self.vae.decode(q.sample(rng))
        visible, region = self.mask(x)
        c_n = self.extract(visible, region, pair)

        # Recompose: the identity of one photograph with everything else of the other, in both directions.
        keep = torch.rand(n, 1, generator=rng, device=x.device) < self.self_share
        e_mix = torch.where(keep, e_hat, e_hat.roll(n // 2, 0))
        null = torch.rand(n, 1, 1, generator=rng, device=x.device) < self.null_share
        c_id = torch.where(null, self.null_identity, self.identity_tokens(e_mix))

        # Corrupt.
        x_0 = self.codec.encode(self.canvas.cut(x))
        t = diffusion.random_times(self.noise, n, rng)
        eps = torch.randn(x_0.shape, generator=rng, device=x.device)
        x_t = diffusion.corrupt(self.noise, x_0, eps, t)

        # Predict.
        prediction = self.predict(x_t, t, self.beside(visible, region), c_id, c_n)
        scale = self.error_weight.sqrt()
        return StepOut(
            prediction=prediction * scale,
            target=diffusion.target(self.noise, x_0, eps, t) * scale,
            t=t,
            weight=diffusion.snr_weight(self.noise, t, self.max_weight),
            terms=self.identity_terms(e, e_hat, q),
            metrics=q.statistics(),
        )

    def predict(self, x_t: Tensor, t: Tensor, beside: Tensor, c_id: Tensor, c_n: Tensor) -> Tensor:
        """The network's output in the schedule's prediction type, (N,c,h,h)."""
        kwargs = {
            "identity_tokens": c_id,
            "time_embedding": self.unet.time_embedding(self.unet.time_proj(t).to(c_n.dtype)),
        }
        x_in = torch.cat([x_t, beside], 1)
        if self.gate == "prediction":
            with torch.no_grad():
                first = self.unet(
                    x_in, t, c_n, cross_attention_kwargs=kwargs | {"gate_image": torch.zeros_like(x_t)}
                ).sample
                kwargs["gate_image"] = diffusion.x0_from(self.noise, first, x_t, t)
        return self.unet(x_in, t, c_n, cross_attention_kwargs=kwargs).sample

    def beside(self, visible: Tensor, region: Tensor) -> Tensor:
        """What the U-Net reads beside x_t: visible pixels in the codec's space and the hidden region, (N,c+1,h,h)."""
        seen = self.codec.encode(self.canvas.cut(visible))
        return torch.cat([seen, F.adaptive_avg_pool2d(self.canvas.cut(region), seen.shape[-1])], 1)

    def identity_tokens(self, e_hat: Tensor) -> Tensor:
        """(N,dim) -> c_id (N,identity_tokens,D)."""
        return self.identity_norm(
            self.to_identity_tokens(e_hat * e_hat.shape[-1] ** 0.5).unflatten(-1, self.null_identity.shape[1:])
        )

    def embed(self, batch: FaceBatch) -> Tensor:
        """(N,dim) embeddings: from the sidecar where the loader joined one, else by the recogniser."""
        if self.identity.name in batch.embeddings:
            return batch.embeddings[self.identity.name].float()
        with torch.no_grad():
            return embed_aligned(self.identity, batch.pixels(), "portrait")

    def identity_terms(self, e: Tensor, e_hat: Tensor, q: Posterior) -> dict[str, Tensor]:
        """`identity_vae` (N,): (1 - cos(e_hat, e)) + beta KL.  `alignment` (N/2,): symmetric KL within each pair."""
        one, other = (Posterior(*half) for half in zip(q.mu.chunk(2), q.logvar.chunk(2), strict=True))
        return {
            "identity_vae": 1 - (e_hat * e).sum(-1) + self.beta * q.kl_to_prior().sum(-1),
            "alignment": one.symmetric_kl(other),
        }

    def validation_step(self, batch: FaceBatch, batch_idx: int) -> None:
        """Also logs what inference meets: cosines of drawn identities to their source, and how alike they are."""
        super().validation_step(batch, batch_idx)
        e = self.embed(batch)
        z_s = self.vae.encode(e).mu
        z_a = orthogonal(self.noise_of(batch, "identity", 0, z_s.shape[1:]), z_s)
        e_a = self.vae.decode(z_a)
        alike = (e_a @ e_a.T - torch.eye(len(e_a), device=e_a.device)).sum() / max(1, len(e_a) * (len(e_a) - 1))
        measured = {
            "latent_cosine": F.cosine_similarity(z_a, z_s).mean(),
            "recognizer_cosine": (e_a * e).sum(-1).mean(),
            "mutual_cosine": alike,
        }
        self.log_dict(
            {f"val/drawn_{name}": value for name, value in measured.items()}, batch_size=len(batch), sync_dist=True
        )

    def recognizer_names(self) -> set[str]:
        return super().recognizer_names() | {self.identity.name}

    @torch.no_grad()
    def anonymize(self, batch: FaceBatch, draw: int = 0) -> Tensor:
        return self.render(batch, self.draw_identity(batch, draw), draw, self.guidance)

    @torch.no_grad()
    def reconstruct(self, batch: FaceBatch, draw: int = 0) -> Tensor:
        """The same photographs rendered with the people's own identity, for sample grids."""
        return self.render(batch, self.own_identity(batch), draw)

    def own_identity(self, batch: FaceBatch) -> Tensor:
        return self.vae.decode(self.vae.encode(self.embed(batch)).mu)

    def draw_identity(self, batch: FaceBatch, draw: int) -> Tensor:
        """OIM: z_r ~ N(0,I) at right angles to mu(x), decoded; optionally again in the recogniser's space. (B,dim)."""
        e = self.embed(batch)
        z_s = self.vae.encode(e).mu
        z_r = self.noise_of(batch, "identity", draw, z_s.shape[1:])
        if self.orthogonal_in == "none":
            return self.vae.decode(z_r)
        e_hat = self.vae.decode(orthogonal(z_r, z_s))
        return F.normalize(orthogonal(e_hat, e), dim=-1) if self.orthogonal_in == "recognizer" else e_hat

    def render(self, batch: FaceBatch, e_hat: Tensor, draw: int, guidance: float = 1.0) -> Tensor:
        x = batch.pixels()
        visible, region = self.mask(x)
        c_n, c_id = self.extract(visible, region, batch), self.identity_tokens(e_hat)
        beside = self.beside(visible, region)
        away = self.null_identity.expand_as(c_id)
        if guidance != 1 and self.guidance_from == "source":
            away = self.identity_tokens(self.own_identity(batch))

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            """prediction(c') + w (prediction(c_id) - prediction(c')): away from no identity, or from the source's."""
            prediction = self.predict(x_t, t, beside, c_id, c_n)
            if guidance == 1:
                return prediction
            return prediction.lerp(self.predict(x_t, t, beside, away, c_n), 1 - guidance)

        noise = self.noise_of(batch, "noise", draw, (self.codec.channels, *beside.shape[2:]))
        x_0 = diffusion.sample(self.noise, guided, noise, self.steps, self.sampler, self.codec.clip)
        out = self.canvas.put(x, self.codec.decode(x_0).clamp(-1, 1))
        return x + self.paste_mask * (out - x) if self.paste else out
