"""What a loss is: a module with a weight that maps a step's output to one number a sample."""

from __future__ import annotations

from torch import Tensor, nn

from anonfw.batch import FaceBatch, StepOut


class Loss(nn.Module):
    """`forward(out, batch) -> (N,)`, unweighted. A loss owns the frozen nets that it needs, and knows no system.

    Args:
        weight: factor in the total.
    """

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, out: StepOut, batch: FaceBatch) -> Tensor:
        raise NotImplementedError
