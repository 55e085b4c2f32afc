"""E_I with its bank, frozen: what IDDiffuse knows about a person, and whom it turns the person into (Sec. 3.2).

Shape legend: B photographs, D width of E_I, M synthetic identities.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anonfw.batch import FaceBatch
from anonfw.errors import AnonfwError
from anonfw.identity.bank import IdentityBank


class MappedIdentity(nn.Module):
    """A trained identity mapper and the bank that was made with it.

    Args:
        source: a run folder of `recipes/identity_mapper.yaml` (or its export) with the bank in it, or the name of one
            that comes with the package (`identity_mapper`).
        bank: another bank of the same mapper; None takes `bank.safetensors` in that folder.
        alignment: crop of the images, where there is no sidecar of a recogniser; None is the mapper's own.
        ceiling: largest cosine, in the space of E_I, between a person and the identity that replaces them; None for
            the paper's "as close as possible". The nearest identity that is allowed is taken.
        demographics: estimates sex and age of the photographs: identities that look alike in these come first, where
            the bank has such attributes (`IdentityBank`). None takes the nearest, whoever it is.
    Raises:
        AnonfwError: no such run, a bank that was made with another mapper, or a damaged file.
    """

    def __init__(
        self,
        source: str = "identity_mapper",
        bank: str | None = None,
        alignment: str | None = None,
        ceiling: float | None = None,
        demographics: Callable[[Tensor, str], Mapping[str, Tensor]] | None = None,
    ) -> None:
        super().__init__()
        from anonfw.training.load import BASES, load_system

        folder = BASES / source if (BASES / source).is_dir() else Path(source)
        system, _ = load_system(folder)
        if not hasattr(system, "ensemble") or not hasattr(system, "mapper"):
            raise AnonfwError(f"{folder} holds a {type(system).__name__}: name a run of recipes/identity_mapper.yaml")
        self.ensemble, self.mapper = system.ensemble, system.mapper
        self.bank = IdentityBank.load(bank or folder / "bank.safetensors")
        self.bank.require(system.embedding_name())
        if self.bank.dim != self.mapper.dim:
            raise AnonfwError(
                f"the mapper gives {self.mapper.dim} numbers, its bank holds {self.bank.dim}: make it again"
            )
        self.ensemble.alignment = alignment or self.ensemble.alignment
        self.ceiling, self.demographics = ceiling, demographics
        if demographics is not None and not self.bank.attributes:
            raise AnonfwError("the bank does not know the sex and age of its identities: make it with them")
        self.dim = self.mapper.dim
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> MappedIdentity:  # noqa: ARG002 a frozen net stays in eval mode
        return super().train(False)

    @property
    def names(self) -> list[str]:
        """Of the recognisers inside."""
        return self.ensemble.names

    def recognizer(self, name: str) -> nn.Module:
        """One of the ensemble's recognisers. Raises AnonfwError: it has none of that name."""
        if name not in self.names:
            raise AnonfwError(f"the mapper has no recogniser {name!r}; it has {', '.join(self.names)}")
        return self.ensemble.recognizers[self.names.index(name)]

    @torch.no_grad()
    def forward(self, batch: FaceBatch) -> Tensor:
        """E_I: (B,D) unit norm, from sidecars where the loader joined them."""
        return self.mapper(self.ensemble(batch))

    def choose(self, z: Tensor, batch: FaceBatch) -> Tensor:
        """f: (B,) numbers in the bank. Rows with one `batch.identity` are one person: they get one identity, that of
        the mean of their embeddings.

        Args:
            z: (B,D), what `forward` gave for the batch.
        Raises:
            BankError: nobody in the bank is below the ceiling.
        """
        like = None
        if self.demographics is not None:
            estimated = self.demographics(batch.image, self.ensemble.alignment)
            like = {name: estimated[name].to(z.device) for name in self.bank.attributes}
        return self.bank.of_people(z, batch.identity, ceiling=self.ceiling, like=like)

    def centres(self, identities: Tensor) -> Tensor:
        """(B,) numbers in the bank -> (B,D) unit norm."""
        return self.bank.centres.to(identities.device)[identities]


def between(one: Tensor, other: Tensor, share: float) -> Tensor:
    """(B,D) unit norm: `share` of the way from `other` to `one`, along the chord, (B,D) each."""
    return F.normalize(share * one + (1 - share) * other, dim=-1)
