"""A bank of synthetic identities and the map onto it: whose face a person gets (IDDiffuse, Sec. 3.2).

Shape legend: M synthetic identities, D width of their embeddings, N photographs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anonfw.data.files import atomic, sha256_of, write_json
from anonfw.errors import AnonfwError


class BankError(AnonfwError):
    """A bank that cannot be read, or that does not fit the embeddings."""


class IdentityBank:
    """Centres of synthetic identities in the space of one embedding.

    Attributes:
        centres: (M,D) unit norm, the mean direction of a synthetic person's embeddings.
        names: of the M identities.
        embedding: name of the embedding that made the centres, as `IdentityMapper.embedding_name` gives it.
        about: where the identities come from; plain values, kept in the card.
    """

    def __init__(
        self, centres: Tensor, names: Sequence[str], embedding: str, about: Mapping[str, Any] | None = None
    ) -> None:
        if centres.ndim != 2 or len(centres) != len(names) or not len(names):
            raise BankError(f"a bank needs one centre a name, got {tuple(centres.shape)} for {len(names)} names")
        if not torch.isfinite(centres).all():
            raise BankError("a centre is not finite: the embeddings hold NaN, embed the data set again")
        self.centres = F.normalize(centres.float(), dim=-1)
        self.names, self.embedding, self.about = list(names), embedding, dict(about or {})

    @staticmethod
    def from_embeddings(
        embeddings: Tensor,
        identity: Tensor,
        names: Sequence[str],
        embedding: str,
        about: Mapping[str, Any] | None = None,
    ) -> IdentityBank:
        """Centres of (N,D) embeddings whose person is `identity` (N,) in [0, M).

        Raises:
            BankError: a label out of range, or an identity without a photograph.
        """
        return IdentityBank(centres_of(embeddings, identity, names), names, embedding, about)

    @property
    def dim(self) -> int:
        return self.centres.shape[1]

    def __len__(self) -> int:
        return len(self.names)

    def nearest(self, e: Tensor) -> Tensor:
        """f: (N,D) unit-norm embeddings -> (N,) numbers of the nearest centres by cosine.

        Raises:
            BankError: embeddings of another width.
        """
        self._check(e)
        centres = self.centres.to(e.device)
        # In parts: a large set against a large bank would be a matrix of gigabytes.
        parts = [(part.float() @ centres.T).argmax(-1) for part in e.split(4096)]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)

    def assign(self, e: Tensor) -> Tensor:
        """One-to-one: (N,D) embeddings, one a person, -> (N,) different centres with the largest sum of cosines.

        Raises:
            BankError: more people than identities, or embeddings of another width.
        """
        from scipy.optimize import linear_sum_assignment

        self._check(e)
        if len(e) > len(self):
            raise BankError(f"{len(e)} people cannot have {len(self)} identities one each: use a larger bank")
        similarity = (e.float() @ self.centres.to(e.device).T).cpu().numpy()
        _, chosen = linear_sum_assignment(similarity, maximize=True)  # the rows come back in order
        return torch.from_numpy(chosen).to(e.device)

    def of_people(self, e: Tensor, person: Tensor, one_to_one: bool = False) -> Tensor:
        """(N,) the identity of each photograph, the same for all photographs of a person: that of the person's centre.

        Args:
            e: (N,D) unit-norm embeddings. person: (N,) who is on the photograph, any numbers.
            one_to_one: no two people get the same identity.
        Raises:
            BankError: as `assign`.
        """
        self._check(e)
        people, code = torch.unique(person, return_inverse=True)
        centres = centres_of(e, code, [str(number) for number in people.tolist()])
        return (self.assign(centres) if one_to_one else self.nearest(centres))[code]

    def require(self, embedding: str) -> None:
        """Raises BankError: the centres were made in the space of another embedding."""
        if embedding != self.embedding:
            raise BankError(
                f"the bank was made with {self.embedding}, the system embeds with {embedding}: make the bank again "
                "(python -m anonfw validate RUN, of the mapper's run)"
            )

    def save(self, path: Path) -> None:
        """`path` (.safetensors) and its card, the same name with .json: names, widths, hash of the weights."""
        from safetensors.torch import save

        with atomic(path) as file:
            file.write(save({"centres": self.centres.cpu().contiguous()}))
        card = {
            "embedding": self.embedding,
            "identities": len(self),
            "dim": self.dim,
            "sha256": sha256_of(path),
            "about": self.about,
            "names": self.names,
        }
        write_json(path.with_suffix(".json"), card)

    @staticmethod
    def load(path: str | Path) -> IdentityBank:
        """Raises BankError: a file is missing or damaged, or the weights are not those of the card."""
        from safetensors.torch import load_file

        path = Path(path)
        beside = path.with_suffix(".json")
        if not path.is_file() or not beside.is_file():
            raise BankError(
                f"no bank at {path} with its card {beside.name}: `python -m anonfw fit recipes/identity_mapper.yaml` "
                "ends with one in its run folder"
            )
        try:
            card = json.loads(beside.read_text(encoding="utf-8"))
            sha256, names, embedding = card["sha256"], card["names"], card["embedding"]
        except (ValueError, KeyError, TypeError) as error:
            raise BankError(f"{beside} is no card of a bank ({error!r})") from error
        if sha256_of(path) != sha256:
            raise BankError(f"{path} is not the file that {beside.name} describes: copy both again")
        bank = IdentityBank(load_file(path)["centres"], names, embedding, card.get("about"))
        bank.centres = load_file(path)["centres"]  # to the bit: normalising again moves the last one
        return bank

    def _check(self, e: Tensor) -> None:
        if e.ndim != 2 or e.shape[1] != self.dim:
            raise BankError(
                f"the bank holds embeddings of width {self.dim} ({self.embedding}), got {tuple(e.shape)}: use the "
                "mapper that made the bank, or make the bank again with this one"
            )


def centres_of(embeddings: Tensor, identity: Tensor, names: Sequence[str]) -> Tensor:
    """(M,D) unit-norm mean directions of (N,D) embeddings by `identity` (N,) in [0, M).

    Raises:
        BankError: a label out of range, or an identity without a photograph.
    """
    if embeddings.ndim != 2 or identity.shape != embeddings.shape[:1]:
        raise BankError(f"{tuple(embeddings.shape)} embeddings do not fit {tuple(identity.shape)} labels")
    if len(identity) and not 0 <= int(identity.min()) <= int(identity.max()) < len(names):
        raise BankError(f"labels go from {int(identity.min())} to {int(identity.max())}, there are {len(names)} names")
    count = torch.bincount(identity, minlength=len(names))
    if (count == 0).any():
        missing = ", ".join(names[row] for row in (count == 0).nonzero().flatten()[:5].tolist())
        raise BankError(f"{int((count == 0).sum())} of {len(names)} identities have no photograph ({missing})")
    sums = embeddings.new_zeros(len(names), embeddings.shape[1], dtype=torch.float32)
    return F.normalize(sums.index_add_(0, identity, embeddings.float()), dim=-1)
