"""Reverse personalization: its formula, its exact fixed points, masks, prompts, and independence of the batch."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anonfw import diffusion
from anonfw.errors import AnonfwError
from anonfw.inversion import inversion_times, step
from anonfw.reverse_personalization import ReversePersonalization, attribute_prompt

MODES = ("reverse", "nullface", "faceid")
INVERTING = ("reverse", "nullface")
DIM = 12


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@cache
def schedule():
    return diffusion.noise_schedule("epsilon", shape="scaled_linear", beta_start=0.00085, beta_end=0.012)


@cache
def network():
    """A tiny U-Net that reads three text tokens and two identity tokens (drawn projection), in float64."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            attention_head_dim=4,
            cross_attention_dim=16,
            norm_num_groups=8,
        )
        to_tokens = torch.nn.Linear(DIM, 32)
    return unet.double().eval(), to_tokens.double().eval()


def predict(x_t: torch.Tensor, t: torch.Tensor, identity: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    unet, to_tokens = network()
    tokens = torch.cat([text, to_tokens(identity).unflatten(-1, (2, 16))], 1)
    return unet(x_t, t, tokens).sample


def encode_for(n: int):
    """Captions -> drawn states, a pure function of the words; None -> zeros."""

    def encode(captions: list[str] | None) -> torch.Tensor:
        if captions is None:
            return torch.zeros(n, 3, 16, dtype=torch.float64)
        rows = [torch.randn(3, 16, generator=generator(sum(c.encode())), dtype=torch.float64) for c in captions]
        return torch.stack(rows)

    return encode


def noise_for(keys: list[int]):
    return lambda shape: torch.stack([torch.randn(shape, generator=generator(k), dtype=torch.float64) for k in keys])


def faces(keys: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    x_0 = torch.stack([torch.randn(4, 8, 8, generator=generator(100 + k), dtype=torch.float64) for k in keys])
    e = torch.stack([torch.randn(DIM, generator=generator(200 + k), dtype=torch.float64) for k in keys])
    return x_0, torch.nn.functional.normalize(e, dim=-1)


def run(keys: list[int], mask: torch.Tensor | None = None, prompts=None, **options):
    x_0, e = faces(keys)
    options = {"steps": 3, "last_noise": True} | options
    anonymizer = ReversePersonalization(**options)
    return anonymizer(schedule(), predict, x_0, e, encode_for(len(keys)), noise_for(keys), mask, prompts=prompts)


# The formula.


@pytest.mark.parametrize("prompt", [None, "woman"])
def test_reverse_mode_is_the_papers_formula(prompt):
    """Sections of the algorithm written out: asymmetric inversion, then 11 eps(null, attribute) - 10 eps(e, "")."""
    x_0, e = faces([3])
    null, empty, zeros = torch.zeros_like(e), encode_for(1)([""]), encode_for(1)(None)
    draws, times = noise_for([3])((3, 4, 8, 8)), inversion_times(schedule(), 3, 0.7)

    def eps_inversion(x_t, t):
        return 11 * predict(x_t, t, null, zeros) - 10 * predict(x_t, t, null, empty)

    attribute = encode_for(1)([prompt]) if prompt else zeros

    def eps_generation(x_t, t):
        return 11 * predict(x_t, t, null, attribute) - 10 * predict(x_t, t, e, empty)

    def walk(x_t, eps, arrive):
        before = None
        for i, (t, t_next) in enumerate(pairwise(times)):
            abar = schedule().alphas_cumprod[t].double()
            x0_hat = (x_t - (1 - abar).sqrt() * eps(x_t, torch.tensor([t]))) / abar.sqrt()
            mu, s = step(schedule(), "sde-dpm++", x_t, x0_hat, t, t_next, before)
            before, x_t = (x0_hat, t), arrive(i, mu, s)
        return x_t

    def noisy(i):
        abar = schedule().alphas_cumprod[times[i]].double()
        return x_0 if i == 3 else abar.sqrt() * x_0 + (1 - abar).sqrt() * draws[:, i]

    maps = []

    def solve(i, mu, s):
        maps.append((noisy(i + 1) - mu) / s)
        return noisy(i + 1)

    with torch.no_grad():
        walk(noisy(0), eps_inversion, solve)
        expected = walk(noisy(0), eps_generation, lambda i, mu, s: mu + s * maps[i])
    out = run([3], mode="reverse", zero_text=True, sex="female" if prompt else None)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("mode", MODES)
def test_identities_and_texts_of_each_branch(mode):
    """What the network is asked, by mode: (identity, text) of the passes of inversion and generation."""
    x_0, e = faces([1])
    seen = []

    def recorder(x_t, t, identity, text):
        seen.append(("null" if not identity.any() else "e" if torch.equal(identity, e) else "-e", text))
        return torch.zeros_like(x_t)

    def encode(captions):
        return "zeros" if captions is None else captions[0]

    anonymizer = ReversePersonalization(mode, steps=1, text="man", zero_text=mode == "reverse")
    anonymizer(schedule(), recorder, x_0, e, encode, noise_for([1]))
    assert (
        seen
        == {
            "reverse": [("null", "zeros"), ("null", ""), ("null", "man"), ("e", "")],
            "nullface": [("null", ""), ("null", ""), ("-e", "man")],
            "faceid": [("null", ""), ("e", "man")],
        }[mode]
    )


# Fixed points: where there is nothing to change, the photograph comes back.


@pytest.mark.parametrize("mode", INVERTING)
@pytest.mark.parametrize("zero_text", [False, True])
def test_a_photograph_of_nobody_is_returned(mode, zero_text):
    """Under the null identity generation repeats the inversion, whatever the guidance."""
    out = run([1, 2], mode=mode, zero_text=zero_text and mode == "reverse", identity_scale=0.0)
    torch.testing.assert_close(out, faces([1, 2])[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", INVERTING)
def test_no_guidance_returns_the_photograph(mode):
    torch.testing.assert_close(run([1, 2], mode=mode, guidance=0, zero_text=False), faces([1, 2])[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("mode", INVERTING)
def test_guidance_changes_the_photograph_the_more_the_larger_it_is(mode):
    sign = -1 if mode == "reverse" else 1
    x_0 = faces([1])[0]
    change = [(run([1], mode=mode, guidance=sign * w, zero_text=False) - x_0).norm() for w in (1, 3, 8)]
    assert change == sorted(change) and change[0] > 1e-6


def test_guidance_leads_away_from_the_person_where_the_answer_is_known():
    """Faces of a person lie around 2e, those of nobody around 0 (exact networks of two Gaussians): the photograph's
    component along e falls with |w|, in both modes, and everything at right angles to e stays."""
    e = torch.nn.functional.normalize(torch.randn(1, 16, generator=generator(0), dtype=torch.float64), dim=-1)

    def exact(x_t, t, identity, text):
        signal, noise = diffusion.signal_and_noise(schedule(), t, x_t)
        mean = 2 * identity.reshape(x_t.shape)
        gain = signal * 0.25 / (signal**2 * 0.25 + noise**2)
        return diffusion.prediction_from_x0(schedule(), mean + gain * (x_t - signal * mean), x_t, t)

    aside = torch.randn(1, 16, generator=generator(1), dtype=torch.float64)
    aside -= (aside @ e.T) * e
    photograph = (2 * e + aside).reshape(1, 1, 4, 4)
    for mode, sign in (("reverse", -1), ("nullface", 1)):
        along = []
        for w in (0, 1, 3, 6, 10):
            anonymizer = ReversePersonalization(mode, guidance=sign * w, steps=20, zero_text=False, last_noise=True)
            out = anonymizer(schedule(), exact, photograph, e, encode_for(1), noise_for([0])).reshape(1, 16)
            along.append((out @ e.T).item())
            torch.testing.assert_close(out - (out @ e.T) * e, aside, rtol=0, atol=1e-5)
        assert along[0] == pytest.approx(2.0, abs=1e-6)
        assert along == sorted(along, reverse=True) and along[-1] < 0


# Masks.


@pytest.mark.parametrize("mode", INVERTING)
def test_a_mask_of_ones_is_no_mask_and_a_late_mask_neither(mode):
    free = run([1], mode=mode)
    ones, zeros = torch.ones(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
    torch.testing.assert_close(run([1], ones, mode=mode, mask_delay=0), free, rtol=0, atol=1e-10)
    torch.testing.assert_close(run([1], zeros, mode=mode, mask_delay=3), free, rtol=0, atol=1e-10)
    assert (run([1], zeros, mode=mode, mask_delay=2) - free).abs().max() > 1e-6


@pytest.mark.parametrize("mode", INVERTING)
def test_an_empty_mask_returns_the_photograph(mode):
    out = run([1, 2], torch.zeros(1, 1, 32, 32), mode=mode, mask_delay=0, zero_text=False)
    torch.testing.assert_close(out, faces([1, 2])[0], rtol=0, atol=1e-9)


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**20), mode=st.sampled_from(INVERTING), delay=st.integers(0, 4), scale=st.sampled_from((1, 4))
)
def test_a_mask_acts_where_it_is_and_nowhere_else(seed, mode, delay, scale):
    """With a network that looks at each position alone: photograph outside, unmasked result inside."""

    def pointwise(x_t, t, identity, text):
        return torch.tanh(x_t + identity.mean(-1)[:, None, None, None] * 5) * 0.5

    mask = (torch.rand(2, 1, 8, 8, generator=generator(seed)) > 0.5).double()
    x_0, e = faces([seed, seed + 1])
    anonymizer = ReversePersonalization(mode, steps=4, zero_text=False, last_noise=True, mask_delay=delay)

    def out(m):
        return anonymizer(schedule(), pointwise, x_0, e, encode_for(2), noise_for([1, 2]), m)

    masked, free = out(mask.repeat_interleave(scale, 2).repeat_interleave(scale, 3)), out(None)
    inside = mask.expand_as(x_0).bool()
    torch.testing.assert_close(masked[inside], free[inside], rtol=0, atol=1e-9)
    if delay == 0:
        torch.testing.assert_close(masked[~inside], x_0[~inside], rtol=0, atol=1e-9)
    elif delay < 4:
        assert (masked - free)[~inside].abs().max() > 1e-6


# Batches.


@pytest.mark.parametrize("mode", MODES)
def test_a_face_does_not_depend_on_who_shares_its_batch(mode):
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    prompts = {5: "man", 6: "old woman", 7: ""}
    options = {"mode": mode, "mask_delay": 1, "mask": mask}
    together = run([5, 6, 7], prompts=list(prompts.values()), **options)
    turned = run([7, 5], prompts=[prompts[7], prompts[5]], **options)
    for row, key in enumerate(prompts):
        alone = run([key], prompts=[prompts[key]], **options)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(turned, together[[2, 0]], rtol=1e-8, atol=1e-8)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_same_seed_gives_the_same_face_and_another_seed_another(mode):
    x_0, e = faces([1])

    def out(seed):
        anonymizer = ReversePersonalization(mode, steps=2)
        return anonymizer(schedule(), predict, x_0, e, encode_for(1), noise_for([seed]))

    assert torch.equal(out(4), out(4))
    assert (out(4) - out(5)).abs().max() > 1e-3


# Prompts and options.


@pytest.mark.parametrize(
    ("wanted", "prompt"),
    [
        ({}, None),
        ({"age": 30, "sex": "female", "race": "asian"}, "30-year-old asian woman"),
        ({"age": 25, "sex": "male"}, "25-year-old man"),
        ({"age": 24, "sex": "male", "race": "latino-hispanic"}, "24-year-old latino-hispanic boy"),
        ({"age": 15, "sex": "female"}, "15-year-old girl"),
        ({"age": 14, "sex": "female"}, "14-year-old baby-girl"),
        ({"age": 0, "sex": "male"}, "0-year-old baby-boy"),
        ({"age": 70}, "70-year-old person"),
        ({"race": "black", "text": "smiling"}, "black person, smiling"),
        ({"sex": "male"}, "man"),
        ({"text": "with a beard"}, "with a beard"),
    ],
)
def test_attribute_prompts(wanted, prompt):
    assert attribute_prompt(**wanted) == prompt
    assert ReversePersonalization(**wanted).prompt == prompt


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sex": "femal"}, "no sex 'femal'; did you mean 'female'"),
        ({"race": "Asian"}, "did you mean 'asian'"),
        ({"race": "martian"}, "asian, indian, black, white, middle-eastern, latino-hispanic"),
        ({"age": "old"}, "age 'old' is not a whole number"),
        ({"age": 200}, "from 0 to 120"),
        ({"mode": "revers"}, "did you mean 'reverse'"),
        ({"skip": 1.0}, "skip from 0 to below 1"),
        ({"steps": 0}, "at least 1 step"),
        ({"mask_delay": -1}, "no negative delay"),
        ({"guidance": 5}, "leads towards the person in mode reverse: give a number up to 0"),
        ({"mode": "nullface", "guidance": -10}, "leads towards the person in mode nullface"),
    ],
)
def test_wrong_options_are_told_with_a_suggestion(options, message):
    with pytest.raises(AnonfwError, match=message):
        ReversePersonalization(**options)


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_face_without_an_identity_is_refused(value):
    """It would come back as the photograph itself, unnoticed."""
    x_0, e = faces([1, 2, 3])
    e[1] = value
    with pytest.raises(AnonfwError, match="no identity was found in face 1 of 3"):
        ReversePersonalization(steps=2)(schedule(), predict, x_0, e, encode_for(3), noise_for([1, 2, 3]))


def test_a_prompt_changes_the_result_and_prompts_of_a_call_win():
    plain, woman = run([1], mode="reverse"), run([1], mode="reverse", sex="female")
    assert (plain - woman).abs().max() > 1e-3
    torch.testing.assert_close(run([1], mode="reverse", sex="male", prompts=["woman"]), woman)


def test_defaults_are_the_released_ones():
    reverse, nullface = ReversePersonalization(), ReversePersonalization("nullface")
    assert (reverse.guidance, reverse.steps, reverse.skip, reverse.identity_scale) == (-10.0, 100, 0.7, 1.0)
    assert reverse.zero_text and reverse.prompt is None
    assert (nullface.guidance, nullface.steps, nullface.skip, nullface.mask_delay) == (10.0, 30, 0.7, 10)
    assert not nullface.last_noise
