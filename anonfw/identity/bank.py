"""A bank of synthetic identities and the map onto it: whose face a person gets (IDDiffuse, Sec. 3.2).

The paper takes the identity that is as close as possible. The closest may be so close that the map itself gives the
person away, so a `ceiling` on the cosine can be set; and `like` keeps to identities of the person's sex and age group.

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

ATTRIBUTES = ("female", "age")
AGE_GROUPS = (13.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0)  # years at which a group begins; the first begins at 0
# What a difference costs against the cosine, so that sex comes first, then age, then the cosine: a cosine differs by 2
# at most, an age by seven groups.
OTHER_AGE_GROUP = 4.0
OTHER_SEX = OTHER_AGE_GROUP * (len(AGE_GROUPS) + 2)


class BankError(AnonfwError):
    """A bank that cannot be read, or that does not fit the embeddings or what is asked of it."""


class IdentityBank:
    """Centres of synthetic identities in the space of one embedding.

    `nearest`, `assign` and `of_people` choose among the identities whose cosine to the person is not above `ceiling`
    (None: no bound). With `like`, attributes of the people in the form of `attributes`, they take among these the same
    sex first, then the nearest age group, then the largest cosine. Where nobody of the same sex is left, the nearest
    age group of the other is taken; an attribute that is not known (NaN) on one side counts as another sex, or as one
    group farther than all; one that is not known of the person makes no difference.

    Attributes:
        centres: (M,D) unit norm, the mean direction of a synthetic person's embeddings.
        names: of the M identities.
        embedding: name of the embedding that made the centres, as `IdentityMapper.embedding_name` gives it.
        about: where the identities come from; plain values, kept in the card.
        attributes: optional, name -> (M,) float: `female`, probability in [0,1]; `age` in years; NaN is not known.
            `anonfw.demographics` estimates both.
    """

    def __init__(
        self,
        centres: Tensor,
        names: Sequence[str],
        embedding: str,
        about: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Tensor] | None = None,
    ) -> None:
        if centres.ndim != 2 or len(centres) != len(names) or not len(names):
            raise BankError(f"a bank needs one centre a name, got {tuple(centres.shape)} for {len(names)} names")
        if not torch.isfinite(centres).all():
            raise BankError("a centre is not finite: the embeddings hold NaN, embed the data set again")
        self.centres = F.normalize(centres.float(), dim=-1)
        self.names, self.embedding, self.about = list(names), embedding, dict(about or {})
        self.attributes = check_attributes(attributes or {}, len(names))

    @staticmethod
    def from_embeddings(
        embeddings: Tensor,
        identity: Tensor,
        names: Sequence[str],
        embedding: str,
        about: Mapping[str, Any] | None = None,
        attributes: Mapping[str, Tensor] | None = None,
    ) -> IdentityBank:
        """Centres of (N,D) embeddings whose person is `identity` (N,) in [0, M).

        Raises:
            BankError: a label out of range, or an identity without a photograph.
        """
        return IdentityBank(centres_of(embeddings, identity, names), names, embedding, about, attributes)

    @property
    def dim(self) -> int:
        return self.centres.shape[1]

    def __len__(self) -> int:
        return len(self.names)

    def nearest(self, e: Tensor, ceiling: float | None = None, like: Mapping[str, Tensor] | None = None) -> Tensor:
        """f: (N,D) unit-norm embeddings -> (N,) numbers of the best identities.

        Args:
            ceiling: largest cosine that is allowed. like: name -> (N,) attributes of the people.
        Raises:
            BankError: embeddings of another width, attributes that do not fit or that the bank has not, or nobody
                below the ceiling.
        """
        like = self._check(e, ceiling, like)
        chosen = []
        for rows in torch.arange(len(e)).split(4096):  # a large set against a large bank would be gigabytes
            score, best = self._scores(e[rows], ceiling, {name: values[rows] for name, values in like.items()}).max(-1)
            if not torch.isfinite(score).all():
                near = (e[rows].float() @ self.centres.to(e.device).T).min(-1).values.max()
                raise BankError(
                    f"no identity has a cosine of {ceiling} or less to every person (the lowest bound that leaves "
                    f"somebody for everyone here is {near:.3f}): raise the ceiling, or use a larger bank"
                )
            chosen.append(best)
        return torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.long, device=e.device)

    def assign(self, e: Tensor, ceiling: float | None = None, like: Mapping[str, Tensor] | None = None) -> Tensor:
        """One-to-one: (N,D) embeddings, one a person, -> (N,) different identities, the best choice in sum.

        Summed is the cosine, minus `OTHER_AGE_GROUP` for each group of difference and `OTHER_SEX`; arguments as in
        `nearest`.

        Raises:
            BankError: as `nearest`; more people than identities, or than the ceiling leaves identities for.
        """
        from scipy.optimize import linear_sum_assignment

        like = self._check(e, ceiling, like)
        if len(e) > len(self):
            raise BankError(f"{len(e)} people cannot have {len(self)} identities one each: use a larger bank")
        try:
            _, chosen = linear_sum_assignment(self._scores(e, ceiling, like).cpu().numpy(), maximize=True)
        except ValueError as error:  # scipy's word for: every assignment has a forbidden pair
            raise BankError(
                f"{len(e)} people cannot have one of {len(self)} identities each with a cosine of {ceiling} or less: "
                "raise the ceiling, or use a larger bank"
            ) from error
        return torch.from_numpy(chosen).to(e.device)  # the rows come back in order

    def of_people(
        self,
        e: Tensor,
        person: Tensor,
        one_to_one: bool = False,
        ceiling: float | None = None,
        like: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """(N,) the identity of each photograph, the same for all photographs of a person: that of the person's centre.

        Args:
            e: (N,D) unit-norm embeddings. person: (N,) who is on the photograph, any numbers.
            one_to_one: no two people get the same identity.
            ceiling: largest cosine of an identity to a person's centre.
            like: name -> (N,) attributes of the photographs; a person has the mean of what is known.
        Raises:
            BankError: as `nearest` and `assign`.
        """
        like = self._check(e, ceiling, like)
        people, code = torch.unique(person, return_inverse=True)
        centres = centres_of(e, code, [str(number) for number in people.tolist()])
        means = {name: mean_of(values, code, len(people)) for name, values in like.items()}
        return (self.assign if one_to_one else self.nearest)(centres, ceiling, means)[code]

    def _scores(self, e: Tensor, ceiling: float | None, like: Mapping[str, Tensor]) -> Tensor:
        """(N,M): the cosine, minus what differs; -inf above the ceiling."""
        cosine = e.float() @ self.centres.to(e.device).T
        score = cosine.double()  # what differs is subtracted: floats would lose digits of the cosine
        if "female" in like:
            wanted, had = like["female"][:, None], self.attributes["female"].to(e.device)
            same = (had.isfinite() & ((had >= 0.5) == (wanted >= 0.5))) | wanted.isnan()
            score = score - OTHER_SEX * ~same
        if "age" in like:
            wanted, had = like["age"][:, None], self.attributes["age"].to(e.device)
            groups = (age_group(wanted) - age_group(had)).abs()
            groups = torch.where(had.isnan(), len(AGE_GROUPS) + 1, groups).masked_fill(wanted.isnan(), 0)
            score = score - OTHER_AGE_GROUP * groups
        return score if ceiling is None else score.masked_fill(cosine > ceiling, -torch.inf)

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

        arrays = {"centres": self.centres, **self.attributes}
        with atomic(path) as file:
            file.write(save({name: values.cpu().contiguous() for name, values in arrays.items()}))
        card = {
            "embedding": self.embedding,
            "identities": len(self),
            "dim": self.dim,
            "sha256": sha256_of(path),
            "attributes": {
                name: {"known": int(values.isfinite().sum()), "mean": round(float(values.nanmean()), 3)}
                for name, values in self.attributes.items()
                if values.isfinite().any()
            },
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
        arrays = load_file(path)
        if "centres" not in arrays:
            raise BankError(f"{path} holds no centres: it is not a bank")
        centres = arrays.pop("centres")
        bank = IdentityBank(centres, names, embedding, card.get("about"), arrays)
        bank.centres = centres  # to the bit: normalising again moves the last one
        return bank

    def _check(self, e: Tensor, ceiling: float | None, like: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """`like` as floats beside the embeddings."""
        if ceiling is not None and not -1 <= ceiling <= 1:
            raise BankError(f"the ceiling is a cosine from -1 to 1, not {ceiling}")
        missing = [name for name in like or {} if name in ATTRIBUTES and name not in self.attributes]
        if missing:
            raise BankError(
                f"the bank does not know {' and '.join(missing)} of its identities: make it again with attributes "
                "(anonfw.demographics), or choose without `like`"
            )
        if e.ndim != 2 or e.shape[1] != self.dim:
            raise BankError(
                f"the bank holds embeddings of width {self.dim} ({self.embedding}), got {tuple(e.shape)}: use the "
                "mapper that made the bank, or make the bank again with this one"
            )
        return {name: values.to(e.device) for name, values in check_attributes(like or {}, len(e)).items()}


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


def check_attributes(attributes: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Attributes as (count,) floats.

    Raises:
        BankError: another name or shape, or a value that no person has.
    """
    checked = {}
    for name, values in attributes.items():
        if name not in ATTRIBUTES:
            raise BankError(f"people have no attribute {name!r} here, only {' and '.join(ATTRIBUTES)}")
        values = torch.as_tensor(values).float()
        if values.shape != (count,):
            raise BankError(f"{name} has the shape {tuple(values.shape)} for {count} people: one number each")
        highest = 1 if name == "female" else 150
        if ((values < 0) | (values > highest)).any():
            raise BankError(
                f"{name} goes from {values.nan_to_num(0).min():g} to {values.nan_to_num(0).max():g}, "
                f"it must lie in [0, {highest}] (NaN: not known)"
            )
        checked[name] = values
    return checked


def age_group(age: Tensor) -> Tensor:
    """Years -> the number of the group of `AGE_GROUPS`, 0 below the first."""
    return torch.bucketize(age, torch.tensor(AGE_GROUPS, device=age.device), right=True)


def mean_of(values: Tensor, code: Tensor, count: int) -> Tensor:
    """(N,) values and their person `code` in [0, count) -> (count,) means of those that are not NaN, else NaN."""
    known = values.isfinite()
    sums = values.new_zeros(count).index_add_(0, code[known], values[known])
    return sums / torch.bincount(code[known], minlength=count)
