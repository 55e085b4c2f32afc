"""Identity adapters in the manner of IP-Adapter-FaceID, for Stable Diffusion 1.5 and SDXL (docs/sdxl_adapter.md).

A frozen text-to-image model learns to listen to a recogniser's embedding: e becomes N tokens, and each cross-attention
layer attends to them beside the text. The null identity, which reverse personalization (arXiv 2512.22984) inverts and
guides with, means something because training drops identities: the zero vector goes through the trained projection.

Symbols: e recogniser embedding (unit norm), c the caption's encoding, x_0 / x_t clean and noisy latents, eps noise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import diffusion
from anonfw.batch import FaceBatch, StepOut
from anonfw.errors import AnonfwError
from anonfw.identity import embed_aligned
from anonfw.nets import identity_adapter
from anonfw.nets.backbone import Backbone, Text
from anonfw.nets.non_identity import face_region
from anonfw.reverse_personalization import ReversePersonalization
from anonfw.system import System


class IdentityAdapter(System):
    """Trains image_proj, K_id, V_id and LoRA on a frozen `backbone`; anonymizes by reverse personalization.

    Args:
        identity: frozen recogniser. Images without its sidecar are cropped for it by `alignment`.
        backbone: the text-to-image pipeline. Captions, latents and encoded texts of a batch are used as they come;
            what it lacks is made here.
        size: side in px that images are resized to before they are encoded; None leaves them.
        identity_tokens: N. lora_rank: of LoRA on every attention (128 in the released FaceID adapters); 0 is none.
        scale: of the identity's attention.
        drop_identity, drop_text, drop_both: shares of the samples whose e is replaced by zeros, whose caption by "",
            and whose both are. So the null identity is seen in drop_identity + drop_both of all samples.
        caption: what is said of a photograph that has no caption.
        noise_offset: standard deviation of a shift of eps that is equal over a channel (0.1 in some SDXL trainings).
        max_snr: gamma of min-SNR weighting; None for the plain loss.
        anonymizer: how `anonymize` samples. paste: keep the photograph's pixels outside the inner face (`portrait`
            crops), and follow the guidance inside it alone.
    Raises:
        AnonfwError: shares that do not add up, or a backbone that an adapter cannot sit in.
    """

    def __init__(
        self,
        identity: nn.Module,
        backbone: Backbone,
        losses: Mapping[str, nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        size: int | None = None,
        alignment: str = "portrait",
        identity_tokens: int = 4,
        lora_rank: int = 0,
        scale: float = 1.0,
        drop_identity: float = 0.05,
        drop_text: float = 0.05,
        drop_both: float = 0.05,
        caption: str = "a photo of a person",
        noise_offset: float = 0.0,
        max_snr: float | None = None,
        anonymizer: ReversePersonalization | None = None,
        paste: bool = False,
    ) -> None:
        super().__init__(losses, optimizer, schedule, seed)
        shares = {"drop_identity": drop_identity, "drop_text": drop_text, "drop_both": drop_both}
        if min(shares.values()) < 0 or sum(shares.values()) > 1:
            raise AnonfwError(f"the shares {shares} are not negative and add up to at most 1")
        self.identity, self.backbone, self.noise = identity, backbone, backbone.noise
        self.size, self.alignment, self.scale, self.caption = size, alignment, scale, caption
        edges = torch.tensor(list(shares.values()), dtype=torch.float32).cumsum(0)
        self.register_buffer("drop_edges", edges, persistent=False)
        self.noise_offset, self.max_snr = noise_offset, max_snr
        self.anonymizer, self.paste = anonymizer or ReversePersonalization(), paste
        self.projection = identity_adapter.identity_projection(identity.dim, backbone.token_width, identity_tokens)
        identity_adapter.add_identity(backbone.unet, lora_rank)

    def step(self, batch: FaceBatch, rng: torch.Generator) -> StepOut:
        n = len(batch)

        # Condition. One draw a sample decides what it loses: 0 its identity, 1 its caption, 2 both, 3 nothing.
        e, c = self.embed(batch), self.text(batch)
        lost = torch.bucketize(torch.rand(n, generator=rng, device=e.device), self.drop_edges, right=True)
        e = e.masked_fill(((lost == 0) | (lost == 2))[:, None], 0.0)
        c = self.backbone.empty_text().where((lost == 1) | (lost == 2), c)

        # Corrupt.
        x_0 = self.latents(batch)
        t = diffusion.random_times(self.noise, n, rng)
        eps = torch.randn(x_0.shape, generator=rng, device=x_0.device)
        if self.noise_offset:
            shift = torch.randn((*x_0.shape[:2], 1, 1), generator=rng, device=x_0.device)
            eps = eps + self.noise_offset * shift
        x_t = diffusion.corrupt(self.noise, x_0, eps, t)

        # Predict.
        return StepOut(
            prediction=self.predict(x_t, t, e, c, original=batch.image.shape[-1]),
            target=diffusion.target(self.noise, x_0, eps, t),
            t=t,
            weight=diffusion.snr_weight(self.noise, t, self.max_snr, added=0.0),
        )

    def predict(self, x_t: Tensor, t: Tensor, e: Tensor, c: Text, original: int = 0) -> Tensor:
        """The network's output (N,c,h,w) in the schedule's prediction type; zeros in e are the null identity.

        Args:
            x_t: (N,c,h,w). t: (N,). e: (N,dim). original: side in px of the photographs before they were resized, for
                SDXL's time ids; 0 where that is not known, and they count as not resized.
        """
        size = x_t.shape[-1] * self.backbone.factor
        time_ids = self.backbone.time_ids(len(x_t), original or size, size)
        return self.backbone.predict(x_t, t, c, time_ids, self.projection(e), self.scale)

    def embed(self, batch: FaceBatch) -> Tensor:
        """(B,dim) unit norm: from the sidecar where the loader joined one, else by the recogniser."""
        if self.identity.name in batch.embeddings:
            return batch.embeddings[self.identity.name].float()
        with torch.no_grad():
            return embed_aligned(self.identity, batch.pixels(), self.alignment)

    def text(self, batch: FaceBatch) -> Text:
        """The captions' encoding: from sidecars, else of the captions, else of the template."""
        if batch.text:
            text = Text(batch.text["states"], batch.text.get("pooled"))
            width, wanted = text.states.shape[-1], self.backbone.token_width
            if width != wanted or (text.pooled is None) == self.backbone.wants_pooled:
                pooled = "no pooled vector" if text.pooled is None else "a pooled vector"
                raise AnonfwError(
                    f"the batch's encoded texts have width {width} and {pooled}; this backbone reads width {wanted}: "
                    "they were made with another base model. Make them again with `embed`"
                )
            return text
        return self.encode(batch.caption or [self.caption] * len(batch))

    def encode(self, captions: Sequence[str] | None, n: int = 0) -> Text:
        """Encoded captions; None gives `n` rows of zeros, what SDXL's pipeline makes of an absent prompt."""
        if captions is not None:
            return self.backbone.encode_text(captions)
        empty = self.backbone.empty_text()
        return Text(*(None if part is None else part.new_zeros(n, *part.shape[1:]) for part in empty))

    def latents(self, batch: FaceBatch) -> Tensor:
        """x_0 (B,c,h,w): from sidecars, else encoded from the images."""
        if batch.latents is not None:
            if batch.latents.shape[1] != self.backbone.channels:
                raise AnonfwError(
                    f"the batch's latents have {batch.latents.shape[1]} channels, this backbone's autoencoder "
                    f"{self.backbone.channels}: they were made with another one. Make them again with `embed`"
                )
            return batch.latents
        if not batch.image.numel():
            raise AnonfwError("the batch has neither pictures nor latents: give the loader `decode: true` or latents")
        return self.backbone.encode_image(self.resized(batch.pixels()))

    def resized(self, images: Tensor, size: int | None = None) -> Tensor:
        """(B,3,H,H) -> (B,3,size,size); the system's size where none is given."""
        size = size or self.size or images.shape[-1]
        if images.shape[-1] == size:
            return images
        return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)

    def recognizer_names(self) -> set[str]:
        return super().recognizer_names() | {self.identity.name}

    @torch.no_grad()
    def anonymize(self, batch: FaceBatch, draw: int = 0) -> Tensor:
        x, n = batch.pixels(), len(batch)
        region = face_region(x.shape[-1], softness=0.08).to(x.device) if self.paste else None
        x_0 = self.anonymizer(
            self.noise,
            self.predict,
            self.latents(batch),
            self.embed(batch),
            lambda captions: self.encode(captions, n),
            lambda shape: self.noise_of(batch, "anonymize", draw, shape),
            region,
        )
        out = self.resized(self.backbone.decode(x_0).clamp(-1, 1), x.shape[-1])
        return out if region is None else x + region * (out - x)

    def interchange(self) -> dict[str, dict[str, Tensor]]:
        """The adapter in the released layout: `export` writes the file, and diffusers' `load_ip_adapter` reads it."""
        return {"ip_adapter.safetensors": identity_adapter.released_state(self.projection, self.backbone.unet)}

    def from_interchange(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """A released adapter's tensors by the names that they have here; other weights as they are."""
        if not identity_adapter.is_released(weights):
            return weights
        parts = identity_adapter.from_released(weights, self.projection, self.backbone.unet)
        return {
            **{f"projection.{name}": value for name, value in parts["projection"].items()},
            **{f"backbone.unet.{name}": value for name, value in parts["unet"].items()},
        }
