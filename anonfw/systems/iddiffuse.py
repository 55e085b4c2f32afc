"""IDDiffuse (Shaheryar, Lee and Jung, ACCV 2024): a dual-condition DDPM over an identity mapper.

A person is replaced by a synthetic identity X̂ (E_I and its bank, `anonfw.identity.mapped`), everything else is told by
the texture of the photograph. Both condition the U-Net: as keys and values beside the features' own (Eq. 8), the
identity also beside the time. What the paper leaves open, and what is ours, is a named argument (docs/iddiffuse.md).

Symbols: z = E_I(x) unit-norm identity, z_hat that of X̂, c the condition's tokens, E_t texture extractor, x_0 / x_t
clean and noisy sample in the codec's space, gamma the strength of the source identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw import diffusion
from anonfw.batch import FaceBatch, StepOut
from anonfw.errors import AnonfwError
from anonfw.identity.mapped import MappedIdentity, between
from anonfw.nets.attention import ConcatKV, install
from anonfw.nets.non_identity import Canvas, IdentityMask, MeasuredFactors, face_region
from anonfw.nets.texture import TextureExtractor
from anonfw.system import System


class IDDiffuse(System):
    """Trained on cross batches: a photograph, and a photograph of the synthetic person that it is to become.

    Args:
        size: H of the images in px. identity: E_I and bank, frozen. codec: pixels or a frozen autoencoder.
        unet: (in_channels, out_channels, grid, token_width, vector_width) -> diffusers U-Net.
        noise: `diffusion.noise_schedule`. token_width: D. identity_tokens: made of z.
        texture: the mapper's recogniser whose early features E_t reads; None for no texture condition.
        texture_grid, texture_side, texture_dropout: m, largest side of the feature map, and dropout of E_t.
        factors: name -> (mean, spread), measured properties (head pose, expression) that two more tokens carry; None
            is the paper.
        self_share: share of the rows that keep their own identity, and learn what it looks like; 0 is the paper.
        cross_weight: weight of a cross row's error inside the face, where the target is the real person whom the
            condition does not name; 1 is the paper.
        judged: cross rows of a batch whose image the losses see (`StepOut.x0_hat`); None for all.
        surroundings: the U-Net also reads the photograph without its inner face, as inpainting networks do.
        canvas: side in px of the square in which pixels are generated; None for the whole crop.
        max_weight: of `diffusion.snr_weight`; None for no weighting.
        face_weight: extra weight of the error inside the face (1 = none).
        sampler, steps: of `anonymize`. guidance: w of `guided`, away from the source's identity; 1 is none.
        paste: keep the source's pixels outside the face.
    """

    def __init__(
        self,
        size: int,
        identity: MappedIdentity,
        codec: nn.Module,
        unet: Callable[..., nn.Module],
        noise,
        losses: Mapping[str, nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        token_width: int = 512,
        identity_tokens: int = 4,
        texture: str | None = "arcface_mbf",
        texture_grid: int = 5,
        texture_side: int | None = None,
        texture_dropout: float = 0.3,
        factors: Mapping[str, tuple[float, float]] | None = None,
        self_share: float = 0.0,
        cross_weight: float = 1.0,
        judged: int | None = None,
        surroundings: bool = False,
        canvas: int | None = None,
        max_weight: float | None = None,
        face_weight: float = 1.0,
        sampler: diffusion.Sampler = "ddim",
        steps: int = 50,
        guidance: float = 1.0,
        paste: bool = False,
    ) -> None:
        super().__init__(losses, optimizer, schedule, seed)
        self.identity, self.codec, self.noise = identity, codec, noise
        self.self_share, self.judged, self.max_weight = self_share, judged, max_weight
        self.sampler, self.steps, self.guidance, self.paste = sampler, steps, guidance, paste
        self.canvas = Canvas(size, canvas)
        grid = self.canvas.side // codec.factor
        self.to_identity_tokens = nn.Sequential(
            nn.Linear(identity.dim, 2 * token_width),
            nn.GELU(),
            nn.Linear(2 * token_width, identity_tokens * token_width),
            nn.Unflatten(-1, (identity_tokens, token_width)),
            nn.LayerNorm(token_width),
        )
        self.texture, self.texture_from = None, texture
        if texture is not None:
            eyes = identity.recognizer(texture)
            channels = eyes.features(torch.zeros(1, 3, eyes.size, eyes.size)).shape[1]
            self.texture = TextureExtractor(channels, token_width, texture_grid, texture_dropout, texture_side)
        self.measured = MeasuredFactors(token_width, size, factors, landmarks=False) if factors else None
        self.mask = IdentityMask(size, cell=0) if surroundings else None
        self.unet = unet(
            in_channels=codec.channels + (codec.channels + 1 if surroundings else 0),
            out_channels=codec.channels,
            grid=grid,
            token_width=token_width,
            vector_width=identity.dim,
        )
        install(self.unet, lambda attn: ConcatKV(attn.to_q.in_features))
        self.register_buffer("paste_mask", face_region(size, softness=0.08), persistent=False)
        inside = F.adaptive_avg_pool2d(self.canvas.cut(face_region(size)), grid)
        self.register_buffer("error_weight", 1 + (face_weight - 1) * inside, persistent=False)
        self.register_buffer("cross_weight", 1 + (cross_weight - 1) * inside, persistent=False)

    def step(self, batch: FaceBatch, rng: torch.Generator) -> StepOut:
        if batch.partner is None:
            raise AnonfwError("IDDiffuse trains on cross batches: set the loader's mode=cross and cross=DATASET")
        x, n = batch.pixels(), len(batch)

        # Condition: the identity of the synthetic partner, in the last rows the person's own; the photograph's texture.
        cross = torch.arange(n, device=x.device) < round((1 - self.self_share) * n)
        z = torch.where(cross[:, None], self.identity(batch.partner), self.identity(batch))
        c_image, beside = self.seen(batch, x, rng)

        # Corrupt.
        x_0 = self.codec.encode(self.canvas.cut(x))
        t = diffusion.random_times(self.noise, n, rng)
        eps = torch.randn(x_0.shape, generator=rng, device=x.device)
        x_t = diffusion.corrupt(self.noise, x_0, eps, t)

        # Predict; of the cross rows also the image, for the losses that look at it (Eq. 7).
        prediction = self.predict(x_t, t, z, c_image, beside)
        judged = int(cross.sum()) if self.judged is None else min(self.judged, int(cross.sum()))
        x0_hat = diffusion.x0_from(self.noise, prediction[:judged].float(), x_t[:judged], t[:judged])
        weight = self.error_weight * torch.where(cross[:, None, None, None], self.cross_weight, 1)
        return StepOut(
            prediction=prediction * weight.sqrt(),
            target=diffusion.target(self.noise, x_0, eps, t) * weight.sqrt(),
            t=t,
            weight=diffusion.snr_weight(self.noise, t, self.max_weight),
            x0_hat=self.image(x[:judged], x0_hat),
        )

    def seen(
        self, batch: FaceBatch, x: Tensor, rng: torch.Generator | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(tokens of texture and measured factors (B,N,D), what the U-Net reads beside x_t (B,c+1,h,h)), None for none.

        Args:
            rng: of the texture's dropout in training.
        """
        tokens, beside = [], None
        if self.texture is not None:
            eyes = self.identity.recognizer(self.texture_from)
            with torch.no_grad():
                features = eyes.features(eyes.crop(x, self.identity.ensemble.alignment))
            tokens.append(self.texture(features, rng))
        if self.measured is not None:
            tokens.append(self.measured(batch))
        if self.mask is not None:
            visible, region = (self.canvas.cut(image) for image in self.mask(x))
            seen = self.codec.encode(visible)
            beside = torch.cat([seen, F.adaptive_avg_pool2d(region, seen.shape[-1])], 1)
        return (torch.cat(tokens, 1) if tokens else None), beside

    def predict(self, x_t: Tensor, t: Tensor, z: Tensor, c_image: Tensor | None, beside: Tensor | None) -> Tensor:
        """The network's output in the schedule's prediction type, (N,c,h,h)."""
        z = z * z.shape[-1] ** 0.5  # unit variance
        c_id = self.to_identity_tokens(z)
        c = c_id if c_image is None else torch.cat([c_id, c_image], 1)
        return self.unet(x_t if beside is None else torch.cat([x_t, beside], 1), t, c, class_labels=z).sample

    def image(self, x: Tensor, x_0: Tensor) -> Tensor:
        """(B,3,H,W): the decoded sample in its place, with the photograph x around it where it is kept."""
        out = self.canvas.put(x, self.codec.decode(x_0))
        return x + self.paste_mask * (out - x) if self.paste else out

    def recognizer_names(self) -> set[str]:
        return super().recognizer_names() | set(self.identity.names)

    @torch.no_grad()
    def anonymize(
        self, batch: FaceBatch, draw: int = 0, strength: float = 0.0, identities: Tensor | None = None
    ) -> Tensor:
        """The photographs of the synthetic people that the bank has for these (Eq. 2).

        Rows with one `batch.identity` are one person and get one identity. Who has a person's photographs in several
        batches maps them once, `identity.choose(z, batch)`, and hands on what came out.

        Args:
            strength: gamma, how much of the person's own identity stays: 0 full anonymization, 1 none.
            identities: (B,) numbers in the bank; None asks the bank.
        Raises:
            ValueError: a strength outside [0,1]. BankError: nobody in the bank is below the ceiling.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is in [0,1], not {strength}")
        z = self.identity(batch)
        if identities is None:
            identities = self.identity.choose(z, batch)
        return self.render(batch, between(z, self.identity.centres(identities), strength), z, draw)

    @torch.no_grad()
    def reconstruct(self, batch: FaceBatch, draw: int = 0) -> Tensor:
        """The same photographs rendered with the people's own identity, for sample grids."""
        z = self.identity(batch)
        return self.render(batch, z, z, draw)

    def render(self, batch: FaceBatch, z_hat: Tensor, z: Tensor, draw: int) -> Tensor:
        """(B,3,H,W): identity z_hat in the photographs of people whose identity is z."""
        x = batch.pixels()
        c_image, beside = self.seen(batch, x)

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            """prediction(z) + w (prediction(z_hat) - prediction(z)): away from the source's identity."""
            prediction = self.predict(x_t, t, z_hat, c_image, beside)
            if self.guidance == 1 or z_hat is z:
                return prediction
            return prediction.lerp(self.predict(x_t, t, z, c_image, beside), 1 - self.guidance)

        grid = self.canvas.side // self.codec.factor
        noise = self.noise_of(batch, "noise", draw, (self.codec.channels, grid, grid))
        x_0 = diffusion.sample(self.noise, guided, noise, self.steps, self.sampler, self.codec.clip)
        return self.image(x, x_0).clamp(-1, 1)
