"""Noise, targets and samplers: pure functions over diffusers' schedulers.

Symbols: x_0 clean sample, x_t noisy sample, eps noise, abar_t the scheduler's `alphas_cumprod`, T its number of times.
    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps                                       (Ho et al. 2020, Eq. 4)
    v   = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0                                       (Salimans & Ho 2022, App. D)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]
Sampler = Literal["ddim", "dpm++"]


def noise_schedule(
    prediction: Prediction = "epsilon",
    times: int = 1000,
    shape: str = "linear",
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
):
    """The training schedule as a diffusers `DDPMScheduler` (its `alphas_cumprod` is all that training reads).

    Args:
        prediction: what the network outputs; recorded so that every sampler built from it agrees.
        shape: diffusers' `beta_schedule` (`linear`, `scaled_linear`, `squaredcos_cap_v2`).
        zero_terminal_snr: rescale so that abar_T = 0 (Lin et al. 2024); needs `v_prediction` or `sample`.
    """
    from diffusers import DDPMScheduler

    if zero_terminal_snr and prediction == "epsilon":
        raise ValueError("zero_terminal_snr leaves no signal at t = T: use prediction v_prediction or sample")
    return DDPMScheduler(
        num_train_timesteps=times,
        beta_schedule=shape,
        beta_start=beta_start,
        beta_end=beta_end,
        prediction_type=prediction,
        rescale_betas_zero_snr=zero_terminal_snr,
        clip_sample=False,
    )


def signal_and_noise(schedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(sqrt(abar_t), sqrt(1 - abar_t)), each (N,1,...,1) in float32 on `like`'s device."""
    abar = schedule.alphas_cumprod.to(device=like.device, dtype=torch.float32)[t]
    shape = (-1,) + (1,) * (like.ndim - 1)
    return abar.sqrt().reshape(shape), (1 - abar).sqrt().reshape(shape)


def random_times(schedule, n: int, rng: torch.Generator) -> Tensor:
    """(N,) int64 uniform on [0, T), stratified: one draw in each N-th of the range, in random order.

    Stratification keeps the marginal uniform and lowers the variance of the loss (Kingma et al. 2021, App. I.1).
    """
    u = (torch.arange(n, device=rng.device) + torch.rand(n, generator=rng, device=rng.device)) / n
    u = u[torch.randperm(n, generator=rng, device=rng.device)]
    return (u * schedule.config.num_train_timesteps).long().clamp_(max=schedule.config.num_train_timesteps - 1)


def corrupt(schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """x_t, (N,...) float32."""
    signal, noise = signal_and_noise(schedule, t, x0)
    return signal * x0 + noise * eps


def target(schedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """What the network is regressed on under the schedule's prediction type."""
    kind = schedule.config.prediction_type
    if kind == "epsilon":
        return eps
    if kind == "sample":
        return x0
    signal, noise = signal_and_noise(schedule, t, x0)
    return signal * eps - noise * x0


def x0_from(schedule, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The clean sample that a prediction implies; the inverse of `target`."""
    kind = schedule.config.prediction_type
    if kind == "sample":
        return prediction
    signal, noise = signal_and_noise(schedule, t, x_t)
    if kind == "epsilon":
        return (x_t - noise * prediction) / signal
    return signal * x_t - noise * prediction


def snr_weight(schedule, t: Tensor, gamma: float | None, added: float = 1.0) -> Tensor:
    """(N,) loss weight in the form of the prediction type, such that the error of x_0 weighs min(SNR + added, gamma).

    SNR + 1 is the plain loss on v (Salimans & Ho 2022, Sec. 4); the cut keeps nearly clean samples from drowning the
    rest. With `added` 0 it is min-SNR (Hang et al. 2023): the plain loss on eps with that cut. None: 1 everywhere.
    """
    if gamma is None:
        return torch.ones(t.shape, device=t.device)
    abar = schedule.alphas_cumprod.to(t.device, torch.float32)[t]
    snr = abar / (1 - abar).clamp_min(1e-12)
    weight = (snr + added).clamp(max=gamma)
    kind = schedule.config.prediction_type
    if kind == "sample":
        return weight
    return weight / (snr.clamp_min(1e-12) if kind == "epsilon" else snr + 1)


def sampler(schedule, name: Sampler):
    """A diffusers sampling scheduler on the same noise schedule: DDIM (trailing) or DPM-Solver++ 2M.

    DPM-Solver++ spaces its times uniformly in log-SNR: 20 such steps are as close to the ODE as 200 of DDIM.
    Raises:
        ValueError: unknown name.
    """
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

    if name == "ddim":
        return DDIMScheduler.from_config(
            schedule.config, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=True
        )
    if name == "dpm++":
        return DPMSolverMultistepScheduler.from_config(
            schedule.config,
            algorithm_type="dpmsolver++",
            solver_order=2,
            timestep_spacing="trailing",
            use_lu_lambdas=not schedule.config.rescale_betas_zero_snr,
            final_sigmas_type="zero",
            lower_order_final=True,
        )
    raise ValueError(f"unknown sampler {name!r}; there are ddim and dpm++")


@torch.no_grad()
def sample(
    schedule,
    predict: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    steps: int,
    name: Sampler = "dpm++",
    clip_x0: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Integrates from `noise` (N,...) to a clean sample of the same shape.

    Args:
        predict: (x_t, t (N,)) -> the network's output, in the schedule's prediction type.
        steps: number of network evaluations.
        clip_x0: applied to the implied x_0 at each step (for pixels: clamp to [-1,1]).
    """
    solver = sampler(schedule, name)
    solver.set_timesteps(steps, device=noise.device)
    x_t = noise * solver.init_noise_sigma
    for time in solver.timesteps:
        t = time.reshape(1).expand(x_t.shape[0]).to(x_t.device).long()
        prediction = predict(x_t, t).to(x_t.dtype)
        if clip_x0 is not None:
            x0_hat = clip_x0(x0_from(schedule, prediction, x_t, t))
            prediction = prediction_from_x0(schedule, x0_hat, x_t, t)
        x_t = solver.step(prediction, time, x_t, return_dict=False)[0]
    return x_t


def prediction_from_x0(schedule, x0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The network output that implies `x0`: the inverse of `x0_from`."""
    if schedule.config.prediction_type == "sample":
        return x0
    signal, noise = signal_and_noise(schedule, t, x_t)
    eps = (x_t - signal * x0) / noise.clamp_min(1e-12)
    return eps if schedule.config.prediction_type == "epsilon" else signal * eps - noise * x0
