"""`Evaluation`: an anonymizer, a loader of people it has never seen, and out comes the result table."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.data.files import atomic
from anonfw.data.open import open_loader
from anonfw.errors import AnonfwError
from anonfw.evaluate import protocols
from anonfw.evaluate.references import NAMES, build_references
from anonfw.evaluate.report import Report, Table
from anonfw.evaluate.rows import distance_outside, identity_measures, utility_measures
from anonfw.evaluate.scorers import EXPRESSION, Measured, Scorers, open_judge, refuse_own_judge

Anonymize = Callable[[FaceBatch, int], Tensor]


class EvaluationError(AnonfwError):
    """The set cannot be evaluated: too few people or photos."""


class Evaluation:
    """The measurement that ends a run. Build it once, `run` it on any anonymizer.

    Args:
        judge: recogniser that measures identity, by its name in the weights table, or a `Recognizer`. It must have had
            no part in the system.
        draws: anonymizations of each photo; identity measures use all of them, diversity needs two.
        limit: photos to anonymize at most, spread over as many people as there are; None takes them all. Gallery and
            thresholds use every original all the same.
        photos_per_person: photos of one person at most, so that nobody dominates the rates.
        references: rows to compare with, out of `original`, `blur`, `pixelate`, `box`, `random_other`.
        fpr: false positive rates of the verification columns.
        detection_threshold: detector score from which a face counts as detected.
        attribute_draws: of how many draws pose and expression are measured (the slowest measurement).
        alignment: crop of the loader's images, as in its card.
        batch_size: photos per call of the anonymizer.
        seed: of the random other faces and of the bootstrap.
        detector, attributes: None for SCRFD-500M and the project's estimators.
    """

    def __init__(
        self,
        judge: str | Any = "edgeface_s",
        draws: int = 3,
        limit: int | None = None,
        photos_per_person: int = 6,
        references: list[str] | tuple[str, ...] = NAMES,
        fpr: list[float] | tuple[float, ...] = (1e-2, 1e-3),
        detection_threshold: float = 0.5,
        attribute_draws: int = 1,
        alignment: str = "portrait",
        batch_size: int = 64,
        seed: int = 0,
        detector: Any | None = None,
        attributes: Any | None = None,
    ) -> None:
        if min(draws, attribute_draws, photos_per_person, 1 if limit is None else limit) < 1:
            raise ValueError("draws, attribute_draws, photos_per_person and limit must be at least 1")
        unknown = [name for name in references if name not in NAMES]
        if unknown:
            raise ValueError(f"unknown reference {', '.join(map(repr, unknown))}; there are {', '.join(NAMES)}")
        self.judge, self.detector, self.attributes = judge, detector, attributes
        self.draws, self.limit, self.photos_per_person = draws, limit, photos_per_person
        self.references, self.fpr = tuple(references), sorted(fpr, reverse=True)
        self.detection_threshold, self.attribute_draws = detection_threshold, min(attribute_draws, draws)
        self.alignment, self.batch_size, self.seed = alignment, batch_size, seed

    def run(
        self,
        anonymize: Anonymize,
        loader: Iterable[FaceBatch],
        system_identity_names: Collection[str],
        device: str | torch.device = "cpu",
        progress: bool = True,
    ) -> Report:
        """Anonymize, measure, compare.

        Args:
            anonymize: `(batch on device, draw) -> (B,3,H,W) in [-1,1]`.
            loader: batches of people that were not trained on.
            system_identity_names: names or sha256 of the recognisers that conditioned or trained the system.
            device: of the batches given to `anonymize`, and of the judge.
            progress: a bar on a terminal.
        Raises:
            JudgeError: the judge is one of the system's recognisers (before anything is computed).
            EvaluationError: fewer than two people.
        """
        scorers = self._scorers(device)
        refuse_own_judge(scorers.judge.name, scorers.judge.sha256, system_identity_names)
        gallery = self.collect(loader)
        people = gallery.identity.numpy()
        chosen = self.choose(gallery)
        photos = gallery.select(chosen)
        methods: dict[str, tuple[Anonymize, int]] = {"anonymized": (anonymize, self.draws)}
        for name, reference in build_references(self.references, gallery, self.alignment, self.seed).items():
            methods[name] = (reference, reference.draws or self.draws)

        embeddings = scorers.embed(gallery.image)
        originals = scorers.measure(photos.image)
        impostors = protocols.impostor_scores(embeddings, people)
        thresholds = [protocols.threshold_at(impostors, fpr) for fpr in self.fpr]
        spread = np.nanstd(originals.table(EXPRESSION), axis=0)
        rows, seconds = {}, 0.0
        for name, draws, images, spent in self._outputs(methods, photos, device, progress):
            seconds += spent if name == "anonymized" else 0.0
            measured = [scorers.measure(images[k], attributes=k < self.attribute_draws) for k in range(draws)]
            row = identity_measures(measured, chosen, embeddings, people, thresholds, self.seed)
            row |= utility_measures(measured, originals, people[chosen], spread, self.seed)
            row["outside_distance"] = distance_outside(images, photos, self.alignment, self.seed)
            rows[name] = row
        counts = Counter(people.tolist())
        asked = people[chosen].tolist()
        report = Report(
            rows=rows,
            thresholds=thresholds,
            judge={key: str(getattr(scorers.judge, key)) for key in ("name", "sha256", "licence")},
            people=len(set(asked)),
            photos=len(photos),
            draws=self.draws,
            gallery=len(gallery),
            gallery_people=len(counts),
            chance_top1=float(np.mean([counts[person] for person in asked]) / len(gallery)),
            spread=dict(zip(EXPRESSION, spread.tolist(), strict=True)),
            settings={
                "detection_threshold": self.detection_threshold,
                "alignment": self.alignment,
                "photos_per_person": self.photos_per_person,
                "attribute_draws": self.attribute_draws,
                "seed": self.seed,
            },
            cost_ms={"anonymizer": 1000 * seconds / (self.draws * len(photos)), **scorers.cost()},
        )
        report.notes = self._notes(report, originals, sum(counts[person] == 1 for person in set(asked)))
        return report

    def measure(self, system: Any, recipe: Mapping[str, Any], folder: Path, grid_rows: int = 6) -> Report:
        """Collect the whole of `data.test` in a fixed order, run, and write grid.png with `grid_rows` people.

        Raises:
            EvaluationError: the recipe states another crop than the data set's card.
        """
        from anonfw.evaluate.grid import sample_grid

        loader = open_loader(
            recipe, "test", rank=0, world=1, shuffle=False, bad_samples_file=folder / "bad_samples.jsonl"
        )
        if (alignment := loader.table.card.alignment) != self.alignment:
            raise EvaluationError(
                f"the photos are {alignment} crops: evaluate them with evaluate.alignment={alignment}"
            )
        try:
            gallery = self.collect(loader)
        finally:
            loader.close()
        report = self.run(system.anonymize, [gallery], system.recognizer_names(), device=system.device)
        with atomic(folder / "grid.png") as stream:
            stream.write(sample_grid(system, gallery.select(first_of_each_person(gallery, grid_rows))))
        return report

    def collect(self, loader: Iterable[FaceBatch]) -> FaceBatch:
        """The originals of gallery and thresholds, on the CPU, in the loader's order: within `photos_per_person`.

        Raises:
            EvaluationError: fewer than two people.
        """
        taken: Counter[int] = Counter()
        parts = []
        for batch in loader:
            rows = []
            for row, person in enumerate(batch.identity.tolist()):
                taken[person] += 1
                if taken[person] <= self.photos_per_person:
                    rows.append(row)
            if rows:
                parts.append(batch.to("cpu").select(rows))
        if len(taken) < 2:
            raise EvaluationError(
                f"{len(taken)} people to evaluate: verification needs at least two; use a larger split"
            )
        return FaceBatch.concatenate(parts)

    def choose(self, gallery: FaceBatch) -> np.ndarray:
        """Rows of the gallery to anonymize: the first photo of each person, then the second, ... up to `limit`.

        People, not photos, are what intervals are made of, so a limit spreads over people first.
        """
        taken: Counter[int] = Counter()
        turn = []
        for person in gallery.identity.tolist():
            turn.append(taken[person])
            taken[person] += 1
        return np.sort(np.argsort(turn, kind="stable")[: self.limit])

    def _scorers(self, device: str | torch.device) -> Scorers:
        from anonfw.attributes import Attributes
        from anonfw.detect import Detector

        return Scorers(
            open_judge(self.judge, device),
            self.detector or Detector(),
            self.attributes or Attributes(),
            self.alignment,
            self.detection_threshold,
            self.batch_size,
            device,
        )

    @torch.inference_mode()
    def _outputs(self, methods: dict, photos: FaceBatch, device: str | torch.device, progress: bool):
        """Yields name, draws, (K,N,3,H,W) uint8 images, seconds that the method took."""
        from tqdm import tqdm

        steps = sum(draws for _, draws in methods.values()) * len(photos)
        with tqdm(total=steps, desc="evaluate", unit="image", disable=None if progress else True) as bar:
            for name, (method, draws) in methods.items():
                bar.set_postfix_str(name)
                images = torch.empty((draws, *photos.image.shape), dtype=torch.uint8)
                spent = 0.0
                for draw in range(draws):
                    for start in range(0, len(photos), self.batch_size):
                        batch = photos.select(slice(start, start + self.batch_size)).to(device)
                        begin = time.perf_counter()
                        out = to_uint8(method(batch, draw)).cpu()
                        spent += time.perf_counter() - begin
                        images[draw, start : start + len(batch)] = out
                        bar.update(len(batch))
                yield name, draws, images, spent

    def _notes(self, report: Report, originals: Measured, alone: int) -> list[str]:
        with_face = ", ".join(f"{name} {row['pose_error'].n}" for name, row in report.rows.items())
        spread = ", ".join(f"{name} {value:.3f}" for name, value in report.spread.items())
        notes = [
            "identity is measured in the fixed aligned crop, whether or not a face is detected",
            f"pose and expression: outputs with a face, {self.attribute_draws} draw(s): {with_face}",
            f"1 sd of expression: {spread}",
        ]
        unseen = int((~originals.detected).sum())
        if unseen:
            notes.append(f"no face is detected in {unseen} originals; they have no pose and expression to compare")
        if alone:
            notes.append(f"{alone} people have one photo only and are not in the 'other photo' columns")
        return notes


def to_uint8(images: Tensor) -> Tensor:
    """(…) floats in [-1,1] to uint8 as they would be written to a file; what lies outside is clamped.

    Raises:
        ValueError: a value is not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError("the anonymizer returned values that are not finite")
    return images.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)


def evaluate_system(system: Any, recipe: Mapping[str, Any], folder: str | Path) -> Table:
    """Evaluate a trained system as its recipe says, and write what comes out into `folder`. One process does it.

    Args:
        system: a `System` on its device, with its averaged weights; in eval mode while this runs.
        recipe: its section `evaluate` has `measure(system, recipe, folder) -> Table`.
        folder: gets table.{txt,md,csv,json}, and what `measure` writes.
    Raises:
        EvaluationError: the recipe lacks that section or `data.test`.
    """
    from anonfw.recipe import build

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not recipe.get("evaluate") or not recipe.get("data", {}).get("test"):
        raise EvaluationError("the recipe has no `evaluate` section or no `data.test`: there is nothing to measure on")
    evaluation = build(recipe["evaluate"])
    was_training = system.training
    system.eval()
    try:
        table = evaluation.measure(system, recipe, folder)
    finally:
        system.train(was_training)
    table.save(folder)
    return table


def first_of_each_person(photos: FaceBatch, count: int) -> list[int]:
    """Rows of the first photo of `count` people; of further photos where there are fewer people."""
    _, first = np.unique(photos.identity.numpy(), return_index=True)
    rows = sorted(first.tolist())
    return (rows + [row for row in range(len(photos)) if row not in set(rows)])[:count]
