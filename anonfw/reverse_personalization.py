"""Reverse personalization (arXiv 2512.22984) and its relatives: anonymizing with an identity adapter, without training.

The photograph is inverted under the null identity and sampled again with the same noise, guided away from its own
identity e. Modes, all of one formula

    eps = eps_u + w (eps_c - eps_u)

    mode       inverted                               eps_u                    eps_c         w      source
    reverse    as eps, null for e and no prompt       null, attribute prompt   e, ""         -10    arXiv 2512.22984
    nullface   under null, ""; no guidance            null, ""                 -e, prompt    +10    arXiv 2503.08478
    faceid     not at all: starts from noise          null, ""                 e, prompt     +7.5   IP-Adapter FaceID

The null identity is zeros (512): an adapter maps them to tokens of their own, which condition dropping has trained.

Shape legend: N faces, (c,h,w) the space that is diffused, (H,W) pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anonfw import diffusion
from anonfw.dotted import suggest
from anonfw.errors import AnonfwError
from anonfw.inversion import Predict, Solver, Trajectory, inversion_times, invert, replay

Mode = Literal["reverse", "nullface", "faceid"]
# (x_t (N,c,h,w), t (N,), identity (N,D), text of `encode`) -> output in the schedule's prediction type.
ConditionalPredict = Callable[[Tensor, Tensor, Tensor, Any], Tensor]

SEXES = ("female", "male")
RACES = ("asian", "indian", "black", "white", "middle-eastern", "latino-hispanic")
OLDEST = 120


class Defaults(NamedTuple):
    """What a mode takes where the caller says nothing: the released defaults (docs/reverse_personalization.md)."""

    guidance: float
    steps: int
    skip: float
    solver: Solver
    sign: float  # of e
    prompt_in: Literal["unconditional", "conditional"]
    mask_delay: int
    zero_text: bool
    last_noise: bool


DEFAULTS: dict[Mode, Defaults] = {
    "reverse": Defaults(-10.0, 100, 0.7, "sde-dpm++", 1.0, "unconditional", 10, zero_text=True, last_noise=True),
    "nullface": Defaults(10.0, 30, 0.7, "ddpm", -1.0, "conditional", 10, zero_text=False, last_noise=False),
    "faceid": Defaults(7.5, 30, 0.0, "ddpm", 1.0, "conditional", 0, zero_text=False, last_noise=True),
}


def attribute_prompt(
    age: int | None = None, sex: str | None = None, race: str | None = None, text: str | None = None
) -> str | None:
    """ "{age}-year-old {race} {gender}", then the free text: `attribute_prompt(30, "female", "asian", "smiling")` is
    "30-year-old asian woman, smiling". None where nothing is asked for.

    The word for the gender goes by age, as in the paper's experiments: up to 14 baby-boy and baby-girl, up to 24 boy
    and girl, then (and without an age) man and woman; "person" where the sex is left open.

    Raises:
        AnonfwError: an attribute has no such value.
    """
    if age is not None and (isinstance(age, bool) or not isinstance(age, int) or not 0 <= age <= OLDEST):
        raise AnonfwError(f"age {age!r} is not a whole number of years from 0 to {OLDEST}")
    for name, value, known in (("sex", sex, SEXES), ("race", race, RACES)):
        if value is not None and value not in known:
            hint = suggest(str(value).lower(), known)
            raise AnonfwError(f"no {name} {value!r}{hint} ({', '.join(known)}; anything else goes into `text`)")
    words = [f"{age}-year-old"] if age is not None else []
    words += [race] if race else []
    if words or sex:
        words.append(_gender_word(age, sex))
    parts = [" ".join(words)] if words else []
    return ", ".join(parts + ([text] if text else [])) or None


def _gender_word(age: int | None, sex: str | None) -> str:
    if sex is None:
        return "person"
    female = sex == "female"
    if age is not None and age <= 14:
        return "baby-girl" if female else "baby-boy"
    if age is not None and age <= 24:
        return "girl" if female else "boy"
    return "woman" if female else "man"


@dataclass
class ReversePersonalization:
    """The sampler behind an identity adapter's `anonymize`. None takes the mode's value of `DEFAULTS`.

        anonymizer = ReversePersonalization(mode="reverse", guidance=-10, age=40, sex="male")
        x_0 = anonymizer(
            schedule,                                   # a diffusers schedule: `alphas_cumprod`, prediction type
            predict,                                    # (x_t, t, identity (N,512), text) -> (N,c,h,w)
            codec.encode(images),                       # (N,c,h,w)
            embeddings,                                 # (N,512) unit norm
            encode,                                     # list of N captions -> text; None -> all-zero text states
            lambda shape: system.noise_of(batch, "anonymize", draw, shape),
            mask=region,                                # (N,1,H,W), 1 = anonymise; or None
        )

    Args:
        mode: `reverse`, `nullface` or `faceid`.
        guidance: w. Further from 0: further from the person, and a worse picture. Of the other sign it would lead
            towards the person, which is refused.
        steps: of the sampler; inverting takes as many again. skip: share of the noise range that is left out.
        identity_scale: factor of e.
        zero_text: the unconditional branch without a prompt reads all-zero text states where the conditional one reads
            the encoding of "", and the inversion is guided by that difference: what SDXL's pipeline does to an absent
            negative prompt. False: both read "". SD 1.5 and models that never saw zeros want False.
        mask_delay: steps before the mask has an effect.
        last_noise: of `inversion.invert`. age, sex, race, text: of `attribute_prompt`.
    Raises:
        AnonfwError: unknown mode or attribute, a number out of its range, or guidance towards the person.
    """

    mode: Mode = "reverse"
    guidance: float | None = None
    steps: int | None = None
    skip: float | None = None
    identity_scale: float = 1.0
    zero_text: bool | None = None
    mask_delay: int | None = None
    last_noise: bool | None = None
    age: int | None = None
    sex: str | None = None
    race: str | None = None
    text: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in DEFAULTS:
            raise AnonfwError(f"no mode {self.mode!r}{suggest(str(self.mode), DEFAULTS)} ({', '.join(DEFAULTS)})")
        for name in ("guidance", "steps", "skip", "zero_text", "mask_delay", "last_noise"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(DEFAULTS[self.mode], name))
        if self.steps < 1 or not 0 <= self.skip < 1 or self.mask_delay < 0:
            raise AnonfwError(
                f"steps {self.steps}, skip {self.skip}, mask_delay {self.mask_delay}: "
                "at least 1 step, skip from 0 to below 1, no negative delay"
            )
        if self.mode != "faceid" and self.guidance * DEFAULTS[self.mode].guidance < 0:
            raise AnonfwError(
                f"guidance {self.guidance} leads towards the person in mode {self.mode}: "
                f"give a number {'up to' if self.mode == 'reverse' else 'from'} 0"
            )
        self.prompt = attribute_prompt(self.age, self.sex, self.race, self.text)

    @torch.no_grad()
    def __call__(
        self,
        schedule,
        predict: ConditionalPredict,
        x_0: Tensor,
        embedding: Tensor,
        encode: Callable[[list[str] | None], Any],
        noise_of: Callable[[tuple[int, ...]], Tensor],
        mask: Tensor | None = None,
        prompts: Sequence[str] | None = None,
    ) -> Tensor:
        """(N,c,h,w): somebody else's clean sample.

        Args:
            encode: N captions -> the text that `predict` takes; None -> its all-zero states.
            noise_of: shape of one face's noise -> (N,*shape) standard normal; each row from that face's own seed, so
                that an output does not depend on who shares its batch.
            mask: (N,1,H,W) or (1,1,H,W) in [0,1]; outside, eps_u alone is followed. Pixels outside are not yet the
                photograph's: paste them after decoding.
            prompts: one a face, in place of the composed one.
        Raises:
            AnonfwError: a face without an identity (zeros or not finite): it would come back as it is.
        """
        n = len(x_0)
        if nobody := (~(embedding.norm(dim=-1) > 0) | ~embedding.isfinite().all(-1)).nonzero().flatten().tolist():
            raise AnonfwError(
                f"no identity was found in face {', '.join(map(str, nobody))} of {n} (its embedding is zero or not "
                "finite): nothing to lead away from, so it would not be anonymized. Leave it out, or embed it again"
            )
        asked = list(prompts) if prompts is not None else [self.prompt] * n if self.prompt else None
        empty = encode([""] * n)
        absent = encode(None) if self.zero_text else empty
        wanted = encode(asked) if asked else None
        defaults = DEFAULTS[self.mode]
        e, null = defaults.sign * self.identity_scale * embedding, torch.zeros_like(embedding)
        unconditional = wanted if asked and defaults.prompt_in == "unconditional" else absent
        conditional = wanted if asked and defaults.prompt_in == "conditional" else empty
        branches = (null, unconditional), (e, conditional)
        if self.mode == "faceid":
            guided = self.guided(predict, *branches)
            return diffusion.sample(schedule, guided, noise_of(tuple(x_0.shape[1:])), self.steps, "ddim")
        trajectory = self.inverted(schedule, predict, x_0, null, empty, absent, noise_of)
        region = None if mask is None else latent_mask(mask, x_0)
        mask_from = trajectory.times[min(self.mask_delay, self.steps)]
        return replay(schedule, self.guided(predict, *branches, region, mask_from), trajectory)

    def inverted(
        self, schedule, predict: ConditionalPredict, x_0: Tensor, null: Tensor, empty: Any, absent: Any, noise_of
    ) -> Trajectory:
        """The photograph as a start and noise maps under nobody's identity.

        `reverse` inverts under guidance as well: eps(null, absent) + w (eps(null, "") - eps(null, absent)), one pass
        where absent text and "" are the same.
        """
        times = inversion_times(schedule, self.steps, self.skip)
        draws = noise_of((self.steps, *x_0.shape[1:])).to(x_0)
        if self.mode == "reverse" and self.zero_text:
            nobody = self.guided(predict, (null, absent), (null, empty))
        else:
            nobody = lambda x_t, t: predict(x_t, t, null, empty)  # noqa: E731
        return invert(schedule, nobody, x_0, draws, times, DEFAULTS[self.mode].solver, self.last_noise)

    def guided(
        self,
        predict: ConditionalPredict,
        unconditional: tuple[Tensor, Any],
        conditional: tuple[Tensor, Any],
        region: Tensor | None = None,
        mask_from: int = 0,
    ) -> Predict:
        """(x_t, t) -> eps_u + w (eps_c - eps_u); from time `mask_from` on m eps + (1 - m) eps_u.

        Outputs of every prediction type may be mixed so: at one x_t they are affine in each other. The two branches
        are two calls, which halves the memory of one call with both.
        """
        w = self.guidance

        def prediction(x_t: Tensor, t: Tensor) -> Tensor:
            out_u = predict(x_t, t, *unconditional)
            if w == 0:
                return out_u
            change = w * (predict(x_t, t, *conditional) - out_u)
            return out_u + (change if region is None or int(t[0]) > mask_from else region * change)

        return prediction


def latent_mask(mask: Tensor, x_0: Tensor) -> Tensor:
    """A mask of pixels on the grid of latents, by averages: (N,1,H,W) -> (N,1,h,w)."""
    return F.adaptive_avg_pool2d(mask.to(x_0), x_0.shape[-2:])
