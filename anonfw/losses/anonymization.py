"""IDDiffuse's time-dependent anonymization loss (Eq. 7): what the predicted image should look like to a recogniser.

Symbols: X the real image, X_hat the synthetic identity's, x_0 the clean image that the prediction implies, F a frozen
recogniser, t the diffusion time of T.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anonfw.batch import FaceBatch, StepOut
from anonfw.identity.base import Recognizer, embed_aligned
from anonfw.losses.base import Loss


class Anonymization(Loss):
    """gamma_t d(X) + (1 - gamma_t) d(X_hat) + real_weight d(X) with d(Y) = 1 - cos(F(Y), F(x_0)).

    Eq. 7 is printed without the sign that its text asks for (similarity is maximised): the 1 - cos form has it. Its
    gamma is said to change with t: `time` is gamma_t = t / T, close to the real identity where all is noise and to the
    synthetic one where the image is nearly clean (IDDiffuse); `reversed` is 1 - t / T (DCFace's direction); `constant`
    is 0, only the synthetic identity counts.

    Args:
        recognizer: F. gamma: see above. real_weight: the lambda of Eq. 7; it pulls towards the real identity where F
            is an identity space, so it stays small. times: T. alignment: crop of the batch's images.
    """

    def __init__(
        self,
        recognizer: Recognizer,
        weight: float = 0.05,
        gamma: Literal["time", "reversed", "constant"] = "time",
        real_weight: float = 0.0,
        times: int = 1000,
        alignment: str = "portrait",
    ) -> None:
        super().__init__(weight)
        if gamma not in ("time", "reversed", "constant"):
            raise ValueError(f"gamma is time, reversed or constant, not {gamma!r}")
        self.recognizer, self.gamma, self.real_weight = recognizer, gamma, real_weight
        self.times, self.alignment = times, alignment

    def forward(self, out: StepOut, batch: FaceBatch) -> Tensor:
        """(R,), for the rows of `out.x0_hat`. It needs a cross batch: `partner` is the synthetic identity's."""
        if batch.partner is None or out.x0_hat is None:
            raise ValueError("the anonymization loss needs a cross batch and a system that predicts an image")
        rows = len(out.x0_hat)
        ours = embed_aligned(self.recognizer, out.x0_hat.clamp(-1, 1).float(), self.alignment)
        to_real = 1 - (ours * self.embed(batch)[:rows]).sum(-1)
        to_synthetic = 1 - (ours * self.embed(batch.partner)[:rows]).sum(-1)
        gamma = self.gamma_of(out.t[:rows])
        return gamma * to_real + (1 - gamma) * to_synthetic + self.real_weight * to_real

    def gamma_of(self, t: Tensor) -> Tensor:
        """(N,) in [0,1]."""
        share = t.float() / self.times
        return {"time": share, "reversed": 1 - share, "constant": torch.zeros_like(share)}[self.gamma]

    def embed(self, batch: FaceBatch) -> Tensor:
        if self.recognizer.name in batch.embeddings:
            return batch.embeddings[self.recognizer.name].float()
        with torch.no_grad():
            return embed_aligned(self.recognizer, batch.pixels(), self.alignment)
