"""Edit-friendly inversion: the noise with which a stochastic sampler arrives at exactly this image.

`invert` draws a noisy version of the image for each time, independently (Huberman-Spiegelglas et al. 2024), and solves
each step of the sampler for the noise that leads from one to the next. `replay` walks the same steps with that noise:
under the same conditions it ends at the image, under others (another identity, another guidance) at an edit of it.

Symbols: abar_t the schedule's `alphas_cumprod`, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), D the clean sample
that a prediction implies, w_t the noise map of one step. One step is x_next = mu(x_t, D) + s w_t with

    sde-dpm++   lambda = log(alpha / sigma), h = lambda_next - lambda_t, r = h_before / h     (Lu et al. 2022, order 2)
                mu = sigma_next/sigma_t e^-h x_t + alpha_next (1 - e^-2h) (D + (D - D_before) / 2r)
                s  = sigma_next sqrt(1 - e^-2h);   the first step has no D_before and is of order 1
    ddpm        var = (1 - abar_next) / (1 - abar_t) (1 - abar_t / abar_next)                (Song et al. 2021, eta = 1)
                mu = alpha_next D + sqrt(1 - abar_next - var) eps,   s = sqrt(var)

Shape legend: N images, S steps, (c,h,w) the space that is diffused.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from anonfw import diffusion

Solver = Literal["sde-dpm++", "ddpm"]
Predict = Callable[[Tensor, Tensor], Tensor]
SOLVERS = ("sde-dpm++", "ddpm")


@dataclass(frozen=True)
class Trajectory:
    """N images as a start and the noise of each step.

    Attributes:
        x_start: (N,c,h,w) noisy sample at `times[0]`.
        noise: (N,S,c,h,w) w_t of each step.
        times: S + 1 times, falling; the last is 0, where the clean sample stands.
        solver: whose steps these are.
    """

    x_start: Tensor
    noise: Tensor
    times: tuple[int, ...]
    solver: Solver


def inversion_times(schedule, steps: int, skip: float) -> tuple[int, ...]:
    """S + 1 times: linspace(T - T skip - 1, 1, S), rounded, and 0: skip 0.7 and S = 100 of T = 1000 give 299 .. 1, 0.

    Args:
        skip: share of the noise range, from its noisy end, that is left out; in [0,1).
    Raises:
        ValueError: more steps than times are left.
    """
    top = round(schedule.config.num_train_timesteps * (1 - skip)) - 1
    if not 0 <= skip < 1 or not 1 <= steps <= top:
        raise ValueError(
            f"{steps} steps do not fit into the {max(top, 0)} times that skip={skip} leaves of "
            f"{schedule.config.num_train_timesteps}: lower `steps` or `skip` (0 <= skip < 1)"
        )
    return (*torch.linspace(top, 1, steps, dtype=torch.float64).round().long().tolist(), 0)


def step(
    schedule,
    solver: Solver,
    x_t: Tensor,
    x0_hat: Tensor,
    t: int,
    t_next: int,
    before: tuple[Tensor, int] | None = None,
) -> tuple[Tensor, float]:
    """One step without its noise: mu (N,c,h,w) and s, as the module's head defines them.

    Args:
        x0_hat: D, (N,c,h,w). before: D and t of the step before; None at the first step.
    Raises:
        ValueError: unknown solver.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver {solver!r}; there are {', '.join(SOLVERS)}")
    alpha, sigma, lam = _levels(schedule, t)
    alpha_next, sigma_next, lam_next = _levels(schedule, t_next)
    if solver == "ddpm":
        variance = (sigma_next / sigma) ** 2 * (1 - (alpha / alpha_next) ** 2)
        eps = (x_t - alpha * x0_hat) / sigma
        # Rounding may leave a hair below zero where t_next is nearly clean.
        return alpha_next * x0_hat + math.sqrt(max(sigma_next**2 - variance, 0.0)) * eps, math.sqrt(variance)
    h = lam_next - lam
    gain = -math.expm1(-2 * h)
    direction = x0_hat
    if before is not None:
        x0_before, t_before = before
        r = (lam - _levels(schedule, t_before)[2]) / h
        direction = x0_hat + (x0_hat - x0_before) / (2 * r)
    mu = sigma_next / sigma * math.exp(-h) * x_t + alpha_next * gain * direction
    return mu, sigma_next * math.sqrt(gain)


def _levels(schedule, t: int) -> tuple[float, float, float]:
    """alpha_t, sigma_t, lambda_t. Zero terminal SNR is cut at 2^-24, as diffusers' solver does."""
    abar = max(float(schedule.alphas_cumprod[t]), 2.0**-24)
    return math.sqrt(abar), math.sqrt(1 - abar), 0.5 * math.log(abar / (1 - abar))


def _walk(schedule, solver: Solver, predict: Predict, x_t: Tensor, times: tuple[int, ...], arrive) -> Tensor:
    """All steps; `arrive(i, mu, s)` is the sample that step i ends in."""
    before = None
    for i, (t, t_next) in enumerate(pairwise(times)):
        ts = torch.full((x_t.shape[0],), t, dtype=torch.int64, device=x_t.device)
        x0_hat = diffusion.x0_from(schedule, predict(x_t, ts).to(x_t.dtype), x_t, ts)
        mu, s = step(schedule, solver, x_t, x0_hat, t, t_next, before)
        before = x0_hat, t
        x_t = arrive(i, mu, s)
    return x_t


@torch.no_grad()
def invert(
    schedule,
    predict: Predict,
    x_0: Tensor,
    draws: Tensor,
    times: tuple[int, ...],
    solver: Solver = "sde-dpm++",
    last_noise: bool = True,
) -> Trajectory:
    """The trajectory that ends at `x_0`.

    Each step sets out from where the one before it really arrived (mu + s w_t in the arithmetic of `replay`), so that
    rounding does not add up.

    Args:
        predict: (x_t, t (N,)) -> the network's output in the schedule's prediction type.
        x_0: (N,c,h,w), floating point; what is computed is computed in its precision.
        draws: (N,S,c,h,w) standard normal noise, each row from the sample's own seed.
        times: of `inversion_times`.
        last_noise: False sets the last noise map to zero, as NullFace's release does: the replayed image then misses
            `x_0` by what the network gets wrong at the last step.
    Raises:
        ValueError: `draws` do not fit the images and the steps.
    """
    steps = len(times) - 1
    if draws.shape != (x_0.shape[0], steps, *x_0.shape[1:]):
        raise ValueError(
            f"{steps} steps on images {tuple(x_0.shape)} need draws {(x_0.shape[0], steps, *x_0.shape[1:])}, "
            f"not {tuple(draws.shape)}"
        )

    def noisy(i: int) -> Tensor:
        alpha, sigma, _ = _levels(schedule, times[i])
        return alpha * x_0 + sigma * draws[:, i]

    maps = []

    def arrive(i: int, mu: Tensor, s: float) -> Tensor:
        x_next = x_0 if i == steps - 1 else noisy(i + 1)
        maps.append((x_next - mu) / s)
        return mu + s * maps[-1]

    x_start = noisy(0)
    _walk(schedule, solver, predict, x_start, times, arrive)
    if not last_noise:
        maps[-1] = torch.zeros_like(maps[-1])
    return Trajectory(x_start, torch.stack(maps, 1), tuple(times), solver)


@torch.no_grad()
def replay(schedule, predict: Predict, trajectory: Trajectory) -> Tensor:
    """Where the trajectory's noise leads under `predict`, (N,c,h,w)."""
    return _walk(
        schedule,
        trajectory.solver,
        predict,
        trajectory.x_start,
        trajectory.times,
        lambda i, mu, s: mu + s * trajectory.noise[:, i],
    )
