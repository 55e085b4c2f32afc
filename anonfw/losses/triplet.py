"""Triplet loss on unit-norm embeddings (IDDiffuse, Eq. 4; Schroff et al. 2015), mined inside the batch.

Shape legend: B anchors, D width, M pairs of an anchor with one of its positives.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from anonfw.batch import FaceBatch, StepOut
from anonfw.errors import AnonfwError
from anonfw.losses.base import Loss

Mining = Literal["hard", "semi-hard", "random"]


class Triplet(Loss):
    """max(|z_a - z_p|^2 - |z_a - z_n|^2 + margin, 0), where every row of the batch is an anchor.

    Args:
        margin: alpha, in squared Euclidean distance between unit vectors (0 to 4).
        mining: the paper does not say which triplets.
            `hard` (batch-hard, Hermans et al. 2017): the farthest positive and the nearest negative.
            `semi-hard` (Schroff et al. 2015): each positive with the nearest negative that is farther than it, or the
            farthest of all where none is; the mean over the anchor's positives.
            `random`: any positive, any negative.
    """

    def __init__(self, margin: float = 0.3, mining: Mining = "semi-hard", weight: float = 1.0) -> None:
        super().__init__(weight)
        if mining not in ("hard", "semi-hard", "random"):
            raise ValueError(f"mining is hard, semi-hard or random, not {mining!r}")
        if not 0 <= margin <= 4:
            raise ValueError(f"the margin is a squared distance between unit vectors, 0 to 4, not {margin}")
        self.margin, self.mining = margin, mining

    def forward(self, out: StepOut, batch: FaceBatch) -> Tensor:
        """(B,), zero for an anchor that has no positive or no negative (its person's other photos were broken).

        `out.prediction` is z (B,D) unit norm; `random` draws from `out.rng`.

        Raises:
            AnonfwError: no anchor has a positive, or all rows are one person's.
        """
        with torch.autocast(out.prediction.device.type, enabled=False):  # bf16 distances have two digits
            z, who = out.prediction.float(), batch.identity
            distance = (2 - 2 * z @ z.T).clamp_min(0)
            same = who[:, None] == who[None, :]
            positive = same & ~torch.eye(len(who), dtype=torch.bool, device=who.device)
            self._check(positive, same)
            if self.mining == "semi-hard":
                cost = self._semi_hard(distance, positive, same)
            else:
                cost = self._one_each(distance, positive, same, out.rng)
        return torch.where(positive.any(1) & ~same.all(1), cost, 0)

    def _one_each(self, distance: Tensor, positive: Tensor, same: Tensor, rng: torch.Generator | None) -> Tensor:
        if self.mining == "hard":
            d_p = distance.masked_fill(~positive, -torch.inf).amax(1)
            d_n = distance.masked_fill(same, torch.inf).amin(1)
        else:
            choice = torch.rand(distance.shape, generator=rng, device=distance.device)
            d_p = distance.gather(1, choice.masked_fill(~positive, -1).argmax(1, keepdim=True))[:, 0]
            d_n = distance.gather(1, choice.masked_fill(same, -1).argmax(1, keepdim=True))[:, 0]
        return (d_p - d_n + self.margin).clamp_min(0)

    def _semi_hard(self, distance: Tensor, positive: Tensor, same: Tensor) -> Tensor:
        anchor, other = positive.nonzero(as_tuple=True)  # (M,)
        d_p = distance[anchor, other]
        negatives = distance.detach()[anchor].masked_fill(same[anchor], -torch.inf)  # (M,B)
        least, nearest_farther = negatives.masked_fill(negatives <= d_p.detach()[:, None], torch.inf).min(1)
        chosen = torch.where(least.isfinite(), nearest_farther, negatives.argmax(1))
        cost = (d_p - distance[anchor, chosen] + self.margin).clamp_min(0)
        # Not index_add: on a GPU its sums come out in any order.
        return torch.zeros_like(distance).index_put((anchor, other), cost).sum(1) / positive.sum(1)

    def _check(self, positive: Tensor, same: Tensor) -> None:
        if not positive.any():
            raise AnonfwError(
                "no person has two photographs in this batch, so there are no triplets: give the loader mode: groups, "
                "and a data set with several photographs a person"
            )
        if self.training and same.all():
            raise AnonfwError(
                "all photographs of this batch are one person's, so there are no triplets: batch_size must be a "
                "multiple of per_identity, and larger"
            )
