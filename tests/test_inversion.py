"""Inversion: exact reconstruction, and the steps against diffusers' own schedulers under the same noise."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anonfw import diffusion
from anonfw.inversion import SOLVERS, inversion_times, invert, replay, step

PREDICTIONS = ("epsilon", "sample", "v_prediction")
BACKBONES = ("sd15", "sdxl")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def released_schedule(prediction: str = "epsilon"):
    """SD 1.5's and SDXL's own: scaled linear from 0.00085 to 0.012."""
    return diffusion.noise_schedule(prediction, shape="scaled_linear", beta_start=0.00085, beta_end=0.012)


@cache
def backbone(kind: str, shape: str = "tiny"):
    """A randomly initialised U-Net with SD 1.5's or SDXL's block structure, and the keywords that it is called with.

    `tiny` has two or three narrow levels; `shaped` has every block, layer and attention of SDXL's (2, 10 and 10 deep
    transformers included), with widths (32, 64, 128) for (320, 640, 1280).
    """
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 16, "cross_attention_dim": 16, "norm_num_groups": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        if kind == "sd15":
            unet = UNet2DConditionModel(
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                block_out_channels=(16, 32),
                layers_per_block=1,
                attention_head_dim=4,
                **common,
            )
            return unet.eval(), {}
        wide = shape == "shaped"
        unet = UNet2DConditionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(32, 64, 128) if wide else (8, 16, 16),
            layers_per_block=2 if wide else 1,
            transformer_layers_per_block=(1, 2, 10) if wide else (1, 1, 2),
            attention_head_dim=(1, 2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 12,
            **common,
        )
    return unet.eval(), {"text_embeds": 12}


def conditioned(kind: str, dtype: torch.dtype, shape: str = "tiny", text_seed: int = 7):
    """`predict` of that backbone under a drawn text (and pooled text and time ids)."""
    unet, needs = backbone(kind, shape)
    unet.to(dtype)
    text = torch.randn(1, 5, 16, generator=generator(text_seed), dtype=dtype)
    added = None
    if needs:
        pooled = torch.randn(1, 12, generator=generator(8), dtype=dtype)
        added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]], dtype=dtype)}

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        n = x_t.shape[0]
        rows = added and {name: value.expand(n, -1) for name, value in added.items()}
        return unet(x_t, t, text.expand(n, -1, -1), added_cond_kwargs=rows).sample

    return predict


def image_and_draws(n: int, steps: int, dtype: torch.dtype, side: int = 8, seed: int = 0):
    x_0 = torch.randn(n, 4, side, side, generator=generator(seed), dtype=dtype)
    return x_0, torch.randn(n, steps, 4, side, side, generator=generator(seed + 1), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", BACKBONES)
@settings(max_examples=4)
@given(skip=st.floats(0, 0.9), steps=st.integers(1, 6), seed=st.integers(0, 2**20))
def test_the_same_conditions_give_the_image_back(kind, solver, dtype, skip, steps, seed):
    schedule, predict = released_schedule(), conditioned(kind, dtype)
    x_0, draws = image_and_draws(2, steps, dtype, seed=seed)
    trajectory = invert(schedule, predict, x_0, draws, inversion_times(schedule, steps, skip), solver)
    error = (replay(schedule, predict, trajectory) - x_0).abs().max().item()
    assert error <= (2e-6 if dtype == torch.float32 else 1e-14) * x_0.abs().max().item()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_prediction_type_is_inverted(solver, prediction):
    schedule, predict = released_schedule(prediction), conditioned("sd15", torch.float64)
    x_0, draws = image_and_draws(2, 3, torch.float64)
    trajectory = invert(schedule, predict, x_0, draws, inversion_times(schedule, 3, 0.5), solver)
    torch.testing.assert_close(replay(schedule, predict, trajectory), x_0, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_network_of_sdxls_shape_is_inverted(solver):
    """Every block, layer and attention of SDXL's U-Net, at reduced widths."""
    schedule, predict = released_schedule(), conditioned("sdxl", torch.float32, "shaped")
    unet, _ = backbone("sdxl", "shaped")
    assert sum(".attn2." in name for name in unet.attn_processors) == 70
    x_0, draws = image_and_draws(1, 4, torch.float32, side=16)
    trajectory = invert(schedule, predict, x_0, draws, inversion_times(schedule, 4, 0.7), solver)
    error = (replay(schedule, predict, trajectory) - x_0).abs().max().item()
    print(f"\n{solver}: largest inversion error {error:.1e} on values up to {x_0.abs().max():.1f}")
    assert error <= 1e-5


@pytest.mark.parametrize("solver", SOLVERS)
def test_other_conditions_give_another_image(solver):
    schedule = released_schedule()
    x_0, draws = image_and_draws(1, 6, torch.float64)
    times = inversion_times(schedule, 6, 0.3)
    trajectory = invert(schedule, conditioned("sd15", torch.float64), x_0, draws, times, solver)
    other = replay(schedule, conditioned("sd15", torch.float64, text_seed=11), trajectory)
    assert (other - x_0).abs().max() > 1e-3


def test_multistep_solver_is_diffusers_under_the_same_noise():
    """All steps, first and second order, against DPMSolverMultistepScheduler of sde-dpmsolver++ on the same times."""
    from diffusers import DPMSolverMultistepScheduler

    schedule, predict = released_schedule(), conditioned("sd15", torch.float32)
    times = inversion_times(schedule, 8, 0.7)
    x_0, draws = image_and_draws(2, 8, torch.float32)
    trajectory = invert(schedule, predict, x_0, draws, times)
    theirs = DPMSolverMultistepScheduler.from_config(
        schedule.config,
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="sigma_min",
        lower_order_final=False,
    )
    theirs.set_timesteps(timesteps=list(times[:-1]))
    x_t = trajectory.x_start
    for i, t in enumerate(theirs.timesteps):
        with torch.no_grad():
            prediction = predict(x_t, t.expand(2))
        x_t = theirs.step(prediction, t, x_t, variance_noise=trajectory.noise[:, i], return_dict=False)[0]
    torch.testing.assert_close(x_t, x_0, rtol=0, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("t", [80, 320, 960])
def test_ddpm_step_is_diffusers_ddim_with_eta_one(prediction, t):
    from diffusers import DDIMScheduler

    schedule = released_schedule(prediction)
    theirs = DDIMScheduler.from_config(schedule.config, clip_sample=False, set_alpha_to_one=False)
    theirs.set_timesteps(25)
    x_t, output, noise = torch.randn(3, 2, 4, 8, 8, generator=generator()).unbind(0)
    expected = theirs.step(output, t, x_t, eta=1.0, variance_noise=noise, return_dict=False)[0]
    x0_hat = diffusion.x0_from(schedule, output, x_t, torch.tensor([t, t]))
    mu, s = step(schedule, "ddpm", x_t, x0_hat, t, t - 40)
    torch.testing.assert_close(mu + s * noise, expected, rtol=1e-4, atol=1e-4)


def test_without_the_last_noise_the_image_is_missed_by_what_the_last_step_gets_wrong():
    schedule, predict = released_schedule(), conditioned("sd15", torch.float64)
    x_0, draws = image_and_draws(1, 6, torch.float64)
    times = inversion_times(schedule, 6, 0.7)
    whole = invert(schedule, predict, x_0, draws, times, "ddpm")
    cut = invert(schedule, predict, x_0, draws, times, "ddpm", last_noise=False)
    assert (cut.noise[:, -1] == 0).all() and torch.equal(cut.noise[:, :-1], whole.noise[:, :-1])
    assert 1e-6 < (replay(schedule, predict, cut) - x_0).abs().max() < 1.0


def test_noisy_samples_are_drawn_independently():
    """What edit-friendly means: the start carries the first draw and no other."""
    schedule, predict = released_schedule(), conditioned("sd15", torch.float64)
    x_0, draws = image_and_draws(1, 4, torch.float64)
    times = inversion_times(schedule, 4, 0.7)
    start = invert(schedule, predict, x_0, draws, times).x_start
    expected = diffusion.corrupt(schedule, x_0, draws[:, 0], torch.tensor(times[:1]))
    torch.testing.assert_close(start, expected, rtol=0, atol=1e-6)


def test_times_are_the_papers():
    schedule = released_schedule()
    times = inversion_times(schedule, 100, 0.7)
    assert times[0] == 299 and times[-2:] == (1, 0) and len(times) == 101
    assert inversion_times(schedule, 1, 0.7) == (299, 0)


@given(skip=st.floats(0, 0.99), steps=st.integers(1, 1000))
def test_times_fall_strictly_or_are_refused(skip, steps):
    schedule = released_schedule()
    try:
        times = inversion_times(schedule, steps, skip)
    except ValueError as refusal:
        assert "lower `steps` or `skip`" in str(refusal) and steps > round(1000 * (1 - skip)) - 1
    else:
        assert len(times) == steps + 1 and all(a > b for a, b in pairwise(times))


def test_bad_input_is_refused():
    schedule, predict = released_schedule(), conditioned("sd15", torch.float32)
    x_0, draws = image_and_draws(1, 3, torch.float32)
    with pytest.raises(ValueError, match="need draws"):
        invert(schedule, predict, x_0, draws, inversion_times(schedule, 4, 0.7))
    with pytest.raises(ValueError, match="unknown solver 'euler'"):
        invert(schedule, predict, x_0, draws, inversion_times(schedule, 3, 0.7), "euler")
    with pytest.raises(ValueError, match="0 <= skip < 1"):
        inversion_times(schedule, 3, 1.0)
