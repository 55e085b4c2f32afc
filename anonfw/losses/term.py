"""A loss term that the step computed on its way (`StepOut.terms`), given a weight by the recipe."""

from __future__ import annotations

from torch import Tensor

from anonfw.batch import FaceBatch, StepOut
from anonfw.losses.base import Loss


class Term(Loss):
    """Args:
    name: key of `StepOut.terms`.
    weight: factor in the total.
    """

    def __init__(self, name: str, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.name = name

    def forward(self, out: StepOut, batch: FaceBatch) -> Tensor:  # noqa: ARG002
        """Raises KeyError if the step makes no such term, naming those that it makes."""
        if self.name not in out.terms:
            raise KeyError(f"the step makes no term {self.name!r}; it makes {', '.join(sorted(out.terms)) or 'none'}")
        return out.terms[self.name]
