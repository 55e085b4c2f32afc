"""IDDiffuse's identity mapper: E_I, an MLP over several recognisers' embeddings, trained with triplets (Eq. 3-4).

It is trained from sidecars alone: no image is decoded. What it is for: one person's photographs must land on the same
synthetic identity (`anonfw.identity.bank`), more reliably than a single recogniser would put them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from anonfw.batch import FaceBatch, StepOut
from anonfw.nets.mapper import Ensemble, Mapper
from anonfw.system import System


class IdentityMapper(System):
    """z = E_I([F_1(x), F_2(x), ...]). It makes no pictures: `anonymize` is not for it, `embed` is.

    Args:
        recognizers: the ensemble; one, two or three of them are the ablation of the paper's Table 3. The input's width
            is the sum of theirs.
        losses, optimizer, schedule, seed: as in `System`.
        hidden, dim: widths of the MLP; the paper's are 2048, 1024 and 512.
        skip: a linear path beside the MLP (`Mapper`); better where training people are few.
        alignment: crop of the images, where there is no sidecar of a recogniser.
    """

    def __init__(
        self,
        recognizers: Sequence[nn.Module],
        losses: Mapping[str, nn.Module],
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[[int], float] | None = None,
        seed: int = 0,
        hidden: Sequence[int] = (2048, 1024),
        dim: int = 512,
        skip: bool = False,
        alignment: str = "portrait",
    ) -> None:
        super().__init__(losses, optimizer, schedule, seed)
        self.ensemble = Ensemble(recognizers, alignment)
        self.mapper = Mapper(self.ensemble.dim, hidden, dim, skip)

    def step(self, batch: FaceBatch, rng: torch.Generator) -> StepOut:  # noqa: ARG002 the losses draw
        return StepOut(prediction=self.embed(batch))

    def embed(self, batch: FaceBatch) -> Tensor:
        """(B,dim) unit norm."""
        return self.mapper(self.ensemble(batch))

    def spaces(self, batch: FaceBatch) -> dict[str, Tensor]:
        """Name -> (B,D) unit norm: E_I and what it is to be compared with, the joined embeddings and each alone."""
        parts = self.ensemble.parts(batch)
        joined = self.ensemble.join(parts)
        beside = {"joined": joined} if len(parts) > 1 else {}
        return {"mapper": self.mapper(joined), **beside, **parts}

    def embedding_name(self) -> str:
        """Of what `embed` gives: the recognisers, and a hash of the MLP. Two mappers' embeddings do not compare."""
        digest = hashlib.sha256()
        for name, value in self.mapper.state_dict().items():
            digest.update(name.encode() + value.detach().cpu().numpy().tobytes())
        return f"{'+'.join(self.ensemble.names)} > E_I {digest.hexdigest()[:16]}"

    def recognizer_names(self) -> set[str]:
        return super().recognizer_names() | set(self.ensemble.names)
