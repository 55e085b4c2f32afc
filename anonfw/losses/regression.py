"""Squared error of the network's output against its target: the diffusion loss."""

from __future__ import annotations

from torch import Tensor

from anonfw.batch import FaceBatch, StepOut
from anonfw.losses.base import Loss


class Regression(Loss):
    """w_t |prediction - target|^2, averaged over a sample's elements (Ho et al. 2020, Eq. 14, with the step's w_t)."""

    def forward(self, out: StepOut, batch: FaceBatch) -> Tensor:  # noqa: ARG002
        error = (out.prediction.float() - out.target.float()).square().flatten(1).mean(1)
        return error if out.weight is None else out.weight * error
