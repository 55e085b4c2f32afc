"""Schedule identities, and samplers against diffusers' own loop and an analytic solution."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anonfw import diffusion

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(t=st.integers(0, 999), seed=st.integers(0, 2**32))
def test_target_and_x0_are_inverse(prediction: str, t: int, seed: int):
    schedule = diffusion.noise_schedule(prediction)
    x0, eps = torch.randn(2, 3, 3, 4, 4, generator=generator(seed)).unbind(0)
    times = torch.full((3,), t)
    x_t = diffusion.corrupt(schedule, x0, eps, times)
    perfect = diffusion.target(schedule, x0, eps, times)
    signal, _ = diffusion.signal_and_noise(schedule, times, x0)
    # Dividing by the signal amplifies float32 rounding where there is next to no signal left.
    tolerance = 1e-5 / float(signal.min()) if prediction == "epsilon" else 1e-5
    torch.testing.assert_close(diffusion.x0_from(schedule, perfect, x_t, times), x0, rtol=0, atol=tolerance)
    torch.testing.assert_close(
        diffusion.prediction_from_x0(schedule, x0, x_t, times), perfect, rtol=0, atol=1e-4 / max(0.004, t / 1000)
    )


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_corruption_is_diffusers(prediction: str):
    schedule = diffusion.noise_schedule(prediction)
    x0, eps = torch.randn(2, 5, 3, 8, 8, generator=generator()).unbind(0)
    t = torch.tensor([0, 10, 500, 900, 999])
    torch.testing.assert_close(diffusion.corrupt(schedule, x0, eps, t), schedule.add_noise(x0, eps, t))
    if prediction == "v_prediction":
        torch.testing.assert_close(diffusion.target(schedule, x0, eps, t), schedule.get_velocity(x0, eps, t))


@given(n=st.integers(1, 300), seed=st.integers(0, 2**32))
def test_times_fill_the_range(n: int, seed: int):
    """Stratified: each N-th of the range holds exactly one time."""
    schedule = diffusion.noise_schedule()
    t = diffusion.random_times(schedule, n, generator(seed))
    assert t.min() >= 0 and t.max() <= 999
    strata = torch.arange(n) * 1000 / n
    ordered = t.sort().values
    assert (ordered >= strata.floor()).all() and (ordered <= (strata + 1000 / n).ceil()).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_weight_means_the_same_for_every_prediction(prediction: str):
    """The weighted error of a wrong prediction is min(SNR + 1, gamma) times the error of its x_0."""
    schedule = diffusion.noise_schedule(prediction)
    x0, eps, wrong = torch.randn(3, 4, 3, 4, 4, generator=generator()).unbind(0)
    t = torch.tensor([100, 300, 500, 800])
    x_t = diffusion.corrupt(schedule, x0, eps, t)
    guess = diffusion.target(schedule, x0, eps, t) + 0.1 * wrong
    error = (guess - diffusion.target(schedule, x0, eps, t)).square().flatten(1).mean(1)
    error_x0 = (diffusion.x0_from(schedule, guess, x_t, t) - x0).square().flatten(1).mean(1)
    abar = schedule.alphas_cumprod[t]
    expected = (abar / (1 - abar) + 1).clamp(max=5.0) * error_x0
    torch.testing.assert_close(diffusion.snr_weight(schedule, t, 5.0) * error, expected, rtol=1e-3, atol=1e-6)
    assert (diffusion.snr_weight(schedule, t, None) == 1).all()


def gaussian_predictor(schedule, mean: float, spread: float):
    """The exact network for data N(mean, spread^2): E[x_0 | x_t], in the schedule's prediction type."""

    def predict(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        signal, noise = diffusion.signal_and_noise(schedule, t, x_t)
        gain = signal * spread**2 / (signal**2 * spread**2 + noise**2)
        return diffusion.prediction_from_x0(schedule, mean + gain * (x_t - signal * mean), x_t, t)

    return predict


@pytest.mark.parametrize(("name", "steps"), [("ddim", 200), ("dpm++", 40)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_samplers_reach_a_known_distribution(name: str, steps: int, prediction: str):
    schedule = diffusion.noise_schedule(prediction)
    noise = torch.randn(4000, 1, 1, 1, generator=generator())
    x = diffusion.sample(schedule, gaussian_predictor(schedule, 0.7, 0.3), noise, steps, name)
    assert x.mean().item() == pytest.approx(0.7, abs=0.03)
    assert x.std().item() == pytest.approx(0.3, abs=0.03)


def test_few_steps_of_the_solver_match_many_of_ddim():
    """The exact ODE maps noise n to mean + spread n; 20 solver steps are as close as 200 DDIM steps."""
    schedule = diffusion.noise_schedule("epsilon")
    predict = gaussian_predictor(schedule, 0.0, 0.4)
    noise = torch.randn(500, 1, 1, 1, generator=generator())
    fine = diffusion.sample(schedule, predict, noise, 1000, "ddim")

    def error(steps: int, name: str) -> float:
        return ((diffusion.sample(schedule, predict, noise, steps, name) - fine).norm() / fine.norm()).item()

    assert error(20, "dpm++") <= 2 * error(200, "ddim")
    assert error(20, "dpm++") < 0.5 * error(20, "ddim")


def test_clipping_leaves_a_possible_sample_alone():
    schedule = diffusion.noise_schedule("v_prediction")
    predict = gaussian_predictor(schedule, 0.0, 0.2)
    noise = torch.randn(64, 1, 1, 1, generator=generator())
    free = diffusion.sample(schedule, predict, noise, 12)
    clipped = diffusion.sample(schedule, predict, noise, 12, clip_x0=lambda x: x.clamp(-10, 10))
    torch.testing.assert_close(free, clipped, rtol=0, atol=1e-4)


def test_zero_terminal_snr_needs_a_prediction_that_has_signal():
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        diffusion.noise_schedule("epsilon", zero_terminal_snr=True)
    schedule = diffusion.noise_schedule("sample", zero_terminal_snr=True)
    assert schedule.alphas_cumprod[-1] < 1e-6
    with pytest.raises(ValueError, match="unknown sampler"):
        diffusion.sampler(schedule, "euler")
