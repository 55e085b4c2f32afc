"""`MappingEvaluation`: is one person always mapped to the same synthetic identity? By E_I, and by what it is made of.

Legend: N photos of P people that were never trained on, M synthetic identities of the bank, D embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.data.open import open_loader
from anonfw.demographics import of_people
from anonfw.errors import AnonfwError
from anonfw.evaluate import protocols, verification
from anonfw.evaluate.intervals import LEVEL, Estimate, mean_interval, rate_interval
from anonfw.evaluate.report import Column, Table, rate_label
from anonfw.identity.bank import IdentityBank

BANK = "bank.safetensors"


@dataclass
class MappingReport(Table):
    """One row an embedding, the mapper's first.

    Attributes:
        thresholds: row name -> its operating points, one a false positive rate.
        people, photos: evaluated. bank: synthetic identities. folds: of the accuracy.
        differences: "one minus other" -> difference in consistency (centre), paired over people: the first two rows
            against those below them.
        settings: where bank and people come from, seed, limits.
    """

    thresholds: dict[str, list[protocols.Threshold]]
    people: int
    photos: int
    bank: int
    folds: int
    differences: dict[str, Estimate]
    settings: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> list[tuple[str, list[Column]]]:
        fprs = [threshold.fpr for threshold in next(iter(self.thresholds.values()))]
        return [
            (
                "Recognition of people never trained on: higher is better",
                [
                    Column("recall1", ("recall@1", "%"), percent=True),
                    Column("accuracy", ("verification", f"{self.folds}-fold %"), percent=True),
                    *(Column(f"tpr@{rate_label(f)}", ("TPR %", f"@{rate_label(f)}"), percent=True) for f in fprs),
                ],
            ),
            (
                f"A person's photos on {self.bank} synthetic identities: higher is better, but for two people's photos",
                [
                    Column("centre", ("as their", "other photos %"), percent=True),
                    Column("majority", ("as their", "majority %"), percent=True),
                    Column("pairs", ("pairs that", "agree %"), percent=True),
                    Column("strangers", ("two people's", "agree %"), 2, 2, percent=True),
                    Column("distinct", ("identities", "per 100 people"), percent=True),
                ],
            ),
        ]

    def facts(self) -> list[str]:
        by_chance = self.bank * (1 - (1 - 1 / self.bank) ** self.people) / self.people
        lines = [
            f"{self.people} people, {self.photos} photos; [..] = {LEVEL:.0%} interval over people; each row has "
            "thresholds and a bank of its own",
            "as their other photos: the photo's identity is that of the mean of the person's other photos",
            "majority: no person with two photos is below 50 % there; pairs has no such floor",
            f"two people's: pairs of different people's photos with one identity, by chance {100 / self.bank:.2f}; an "
            "embedding that maps more people to one identity is more consistent for nothing",
            f"identities per 100 people: of the people's centres; thrown at random it would be {100 * by_chance:.1f}",
        ]
        for name, e in self.differences.items():
            verdict = "better" if e.low > 0 else "worse" if e.high < 0 else "cannot be told apart"
            lines.append(
                f"{name}, as their other photos: {100 * e.value:+.1f} points "
                f"[{100 * e.low:+.1f}, {100 * e.high:+.1f}]: {verdict}"
            )
        return lines

    def closing(self, folder: Path) -> list[str]:
        return [*super().closing(folder), f"bank   {folder / BANK}"]


class MappingEvaluation:
    """The measurement that ends a run of the identity mapper. It also writes the bank.

    Args:
        bank: which of the recipe's loaders has the synthetic people of the bank: train, validate or test.
        min_photos: people with fewer photos are left out.
        photos_per_person: photos of one person at most, so that nobody dominates.
        fpr: false positive rates of the verification columns.
        folds: of the verification accuracy.
        seed: of folds, impostor pairs and bootstrap.
        attributes: estimate sex and age of the bank's identities from their photos and keep them in the bank; with a
            mapper that reads sidecars this is the only part that decodes pictures.
    """

    def __init__(
        self,
        bank: str = "train",
        min_photos: int = 2,
        photos_per_person: int = 10,
        fpr: list[float] | tuple[float, ...] = (1e-2, 1e-3),
        folds: int = verification.FOLDS,
        seed: int = 0,
        attributes: bool = False,
    ) -> None:
        if not 2 <= min_photos <= photos_per_person:
            raise ValueError(f"2 <= min_photos <= photos_per_person, not {min_photos} and {photos_per_person}")
        self.bank, self.min_photos, self.photos_per_person = bank, min_photos, photos_per_person
        self.fpr, self.folds, self.seed = sorted(fpr, reverse=True), folds, seed
        self.attributes = attributes

    def measure(self, system: Any, recipe: Mapping[str, Any], folder: Path) -> MappingReport:
        """Embed the people of the bank and of `data.test`, compare, write `bank.safetensors` with its card.

        Args:
            system: has `spaces(batch)` (name -> embeddings, its own first) and `embedding_name()`.
        Raises:
            AnonfwError: fewer than two people with enough photos.
        """
        sources, sets = {}, {}
        single = {"rank": 0, "world": 1, "shuffle": False, "mode": "images"}
        single["bad_samples_file"] = folder / "bad_samples.jsonl"
        for part, name in (("bank", self.bank), ("people", "test")):
            with closing(open_loader(recipe, name, **single)) as loader:
                sets[part] = collect(system, loader)
            card = loader.table.card
            sources[part] = {"data": card.name, "split": loader.table.split, "licence": card.licence}
            sources[part]["names"] = loader.table.people
        names = sources["bank"].pop("names")
        sources["people"].pop("names")
        bank_spaces, bank_identity = sets["bank"]
        shown = torch.unique(bank_identity)  # a person whose photos are all broken is in no bank
        names, bank_identity = [names[row] for row in shown.tolist()], torch.searchsorted(shown, bank_identity)
        banks = {
            space: IdentityBank.from_embeddings(e, bank_identity, names, space) for space, e in bank_spaces.items()
        }
        own = next(iter(banks))
        attributes = {}
        if self.attributes:
            with closing(open_loader(recipe, self.bank, **single, flip=0.0, decode=True)) as loader:
                attributes = {name: values[shown] for name, values in of_people(loader).items()}
        kept = IdentityBank(banks[own].centres, names, system.embedding_name(), sources["bank"], attributes)
        kept.save(folder / BANK)
        report = self.run(*sets["people"], banks)
        report.settings |= sources
        return report

    def run(self, spaces: Mapping[str, Tensor], identity: Tensor, banks: Mapping[str, IdentityBank]) -> MappingReport:
        """Compare embeddings of the same photos.

        Args:
            spaces: name -> (N,D) unit norm, D as in the bank of that name; the one that the others are compared with
                first. identity: (N,) who is on the photos.
        """
        rows = self.choose(identity.numpy())
        person = identity.numpy()[rows]
        people = len(np.unique(person))
        if people < 2:
            raise AnonfwError(
                f"{people} people with {self.min_photos} photos or more: mapping consistency needs at least two; "
                "evaluate a larger split, or lower evaluate.min_photos"
            )
        table, thresholds, hits, folds = {}, {}, {}, 0
        for name, e in spaces.items():
            e = e[torch.from_numpy(rows)]
            recognition, thresholds[name], folds = self._recognition(e.numpy(), person)
            mapping, hits[name] = self._mapping(e, person, banks[name])
            table[name] = recognition | mapping
        names = list(hits)
        differences = {
            f"{one} minus {name}": mean_interval(hits[one] - hits[name], person, self.seed)
            for place, one in enumerate(names[:2])
            for name in names[place + 1 :]
        }
        settings = {"min_photos": self.min_photos, "photos_per_person": self.photos_per_person, "seed": self.seed}
        return MappingReport(
            table, thresholds, people, len(rows), len(banks[names[0]]), folds, differences, settings=settings
        )

    def choose(self, identity: np.ndarray) -> np.ndarray:
        """Rows of the first `photos_per_person` photos of people who have `min_photos`."""
        order = np.argsort(identity, kind="stable")
        _, start, count = np.unique(identity[order], return_index=True, return_counts=True)
        turn = np.arange(len(order)) - np.repeat(start, count)
        kept = (turn < self.photos_per_person) & (np.repeat(count, count) >= self.min_photos)
        return np.sort(order[kept])

    def _recognition(
        self, e: np.ndarray, person: np.ndarray
    ) -> tuple[dict[str, Estimate], list[protocols.Threshold], int]:
        recall = protocols.retrieval_hits(e, np.arange(len(e)), e, person, with_source=False)
        right, who, folds = verification.fold_accuracy(e, person, self.seed, self.folds)
        row = {"recall1": rate_interval(recall, person, self.seed), "accuracy": rate_interval(right, who, self.seed)}
        first, second = verification.genuine_pairs(person)
        genuine = verification.cosines(e, first, second)
        impostors = protocols.impostor_scores(e, person)
        thresholds = [protocols.threshold_at(impostors, fpr) for fpr in self.fpr]
        for threshold in thresholds:
            accepted = rate_interval(genuine > threshold.value, person[first], self.seed)
            row[f"tpr@{rate_label(threshold.fpr)}"] = accepted
        return row, thresholds, folds

    def _mapping(self, e: Tensor, person: np.ndarray, bank: IdentityBank) -> tuple[dict[str, Estimate], np.ndarray]:
        """Measures, and the (N,) hits of `centre`."""
        mapped = bank.nearest(e).numpy()
        centre = (bank.nearest(other_photos(e, person)).numpy() == mapped).astype(np.float64)
        first, second = verification.genuine_pairs(person)
        whole = bank.of_people(e, torch.from_numpy(person)).numpy()
        distinct, people = len(np.unique(whole)), len(np.unique(person))
        alike = (mapped[first] == mapped[second]).sum()
        count = np.bincount(mapped)
        others = len(e) * (len(e) - 1) // 2 - len(first)
        strangers = float((count * (count - 1) // 2).sum() - alike) / others
        row = {
            "centre": rate_interval(centre, person, self.seed),
            "majority": rate_interval(mapped == majority(mapped, person), person, self.seed),
            "pairs": rate_interval(mapped[first] == mapped[second], person[first], self.seed),
            "strangers": Estimate(strangers, float("nan"), float("nan"), others, people, "constant"),
            "distinct": Estimate(distinct / people, float("nan"), float("nan"), people, people, "constant"),
        }
        return row, centre


@torch.inference_mode()
def collect(system: Any, loader: Iterable[FaceBatch]) -> tuple[dict[str, Tensor], Tensor]:
    """(name -> (N,D) float32 on the CPU, (N,) identity) of all photos of a loader, in every space of the system."""
    spaces: dict[str, list[Tensor]] = {}
    identity = []
    for batch in loader:
        identity.append(batch.identity.cpu())
        for name, e in system.spaces(batch.to(system.device)).items():
            spaces.setdefault(name, []).append(e.float().cpu())
    if not identity:
        raise AnonfwError("no photo of this split can be used: there is nothing to measure")
    return {name: torch.cat(parts) for name, parts in spaces.items()}, torch.cat(identity)


def other_photos(e: Tensor, person: np.ndarray) -> Tensor:
    """(N,D) unit norm: for each photo the mean direction of the same person's other photos."""
    _, code = np.unique(person, return_inverse=True)
    rows = torch.from_numpy(code)
    sums = torch.zeros(int(code.max()) + 1, e.shape[1]).index_add_(0, rows, e)
    return F.normalize(sums[rows] - e, dim=-1)


def majority(mapped: np.ndarray, person: np.ndarray) -> np.ndarray:
    """(N,) the identity that most photos of the photo's person are mapped to; the lowest number where two tie."""
    pairs, count = np.unique(np.stack([person, mapped]), axis=1, return_counts=True)
    order = np.lexsort((pairs[1], -count, pairs[0]))
    people, first = np.unique(pairs[0][order], return_index=True)
    return pairs[1][order][first][np.searchsorted(people, person)]
