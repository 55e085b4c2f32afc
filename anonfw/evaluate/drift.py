"""`DriftEvaluation`: does a person who moves stay one person, in the output as much as in the input?

Legend: C clips (identities of the data set, frames in order), F frames of a clip, D width of the judge's embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.data.files import atomic
from anonfw.data.open import open_loader
from anonfw.evaluate.evaluation import EvaluationError, to_uint8
from anonfw.evaluate.grid import contact_sheet
from anonfw.evaluate.intervals import LEVEL, Estimate, mean_interval
from anonfw.evaluate.report import Column, Table
from anonfw.evaluate.scorers import open_judge, refuse_own_judge
from anonfw.identity import embed_aligned

PICTURE = "clips.png"
INPUT, ONCE, STILL, FRAMES = "input", "as one person", "one person and noise", "frame by frame"


@dataclass
class DriftReport(Table):
    """One row a way of treating the frames, the input first.

    Attributes:
        clips, frames: C, and frames of all of them. judge: name, sha256, licence.
        strangers: mean 1 - cosine between frames of different clips of the input: what losing the person would be.
        differences: "one minus other" -> difference in drift, paired over the pairs of frames.
        settings: data, split.
    """

    clips: int
    frames: int
    judge: dict[str, str]
    strangers: float
    differences: dict[str, Estimate]
    settings: dict[str, Any] = field(default_factory=dict)

    def blocks(self) -> list[tuple[str, list[Column]]]:
        return [
            (
                "Identity of the frames of a clip, 1 - cosine: lower is steadier; to the input: higher is more private",
                [
                    Column("drift", ("drift: any two", "frames"), 3, 3),
                    Column("step", ("frames that", "follow"), 3, 3),
                    Column("to_input", ("to the same", "input frame"), 3, 3),
                ],
            )
        ]

    def facts(self) -> list[str]:
        lines = [
            f"{self.clips} clips, {self.frames} frames; [..] = {LEVEL:.0%} interval over clips",
            f"judge: {self.judge['name']}",
            f"1 - cosine of two different people's input frames: {self.strangers:.3f}",
            f"{ONCE}: the frames are one batch with one identity",
            f"{STILL}: they also share one key, so that the noise is drawn once",
            f"{FRAMES}: each frame is another identity, as if nobody knew that they belong together",
        ]
        for name, e in self.differences.items():
            verdict = "more" if e.low > 0 else "less" if e.high < 0 else "cannot be told apart"
            lines.append(f"{name}, drift: {e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}]: {verdict}")
        return lines

    def closing(self, folder: Path) -> list[str]:
        return [*super().closing(folder), f"frames {folder / PICTURE}"]


class DriftEvaluation:
    """Anonymize clips in three ways and measure how far the identity wanders. An `evaluate` of a recipe.

    `data.test` reads clips: a data set whose identities are clips, frames in order (data/synthetic_clips.py).

    Args:
        judge: recogniser that measures identity, by its name in the weights table, or a `Recognizer`.
        limit: clips at most; None takes all.
        shown: clips in the picture. columns: frames of each in the picture.
        alignment: crop of the frames, as in the data set's card. seed: of the bootstrap.
    """

    def __init__(
        self,
        judge: str | Any = "facenet_vggface2",
        limit: int | None = None,
        shown: int = 3,
        columns: int = 8,
        alignment: str = "portrait",
        seed: int = 0,
    ) -> None:
        if min(shown, columns, 1 if limit is None else limit) < 1:
            raise ValueError("limit, shown and columns must be at least 1")
        self.judge, self.limit, self.shown, self.columns = judge, limit, shown, columns
        self.alignment, self.seed = alignment, seed

    def measure(self, system: Any, recipe: Mapping[str, Any], folder: Path) -> DriftReport:
        """Run on `data.test` and write clips.png.

        Raises:
            EvaluationError: a clip of one frame, fewer than two clips, or another crop than in the card.
        """
        given = {"rank": 0, "world": 1, "shuffle": False, "mode": "images"}
        given["bad_samples_file"] = folder / "bad_samples.jsonl"
        with closing(open_loader(recipe, "test", **given)) as loader:
            card, split = loader.table.card, loader.table.split
            if card.alignment != self.alignment:
                raise EvaluationError(
                    f"the frames are {card.alignment} crops: measure them with evaluate.alignment={card.alignment}"
                )
            frames = FaceBatch.concatenate([batch.to("cpu") for batch in loader])
        report, images = self.run(system.anonymize, frames, system.recognizer_names(), system.device)
        report.settings = {"data": card.name, "split": split, "licence": card.licence}
        with atomic(folder / PICTURE) as stream:
            stream.write(self.picture(images, frames.identity.numpy()))
        return report

    def run(
        self,
        anonymize: Callable[[FaceBatch, int], Tensor],
        frames: FaceBatch,
        system_identity_names: Collection[str],
        device: str | torch.device = "cpu",
    ) -> tuple[DriftReport, dict[str, Tensor]]:
        """The report, and row name -> (N,3,H,W) uint8 images of the frames that were used.

        Args:
            anonymize: `(batch on device, draw) -> (B,3,H,W) in [-1,1]`. frames: of all clips, in order.
        Raises:
            JudgeError: the judge had a part in the system. EvaluationError: as `measure`.
        """
        judge = open_judge(self.judge, device)
        refuse_own_judge(judge.name, judge.sha256, system_identity_names)
        clips, count = np.unique(frames.identity.numpy(), return_counts=True)
        clips, count = clips[: self.limit], count[: self.limit]
        if len(clips) < 2 or count.min() < 2:
            raise EvaluationError(
                f"{len(clips)} clips of {count.min() if len(count) else 0} frames or more: drift needs two of two "
                "frames; data/synthetic_clips.py makes some"
            )
        images: dict[str, list[Tensor]] = {INPUT: [], ONCE: [], STILL: [], FRAMES: []}
        for clip in clips:
            shot = frames.select(np.flatnonzero(frames.identity.numpy() == clip).tolist()).to(device)
            images[INPUT].append(shot.image.cpu())
            for name, batch in ways(shot).items():
                with torch.inference_mode():
                    images[name].append(to_uint8(anonymize(batch, 0)).cpu())
        joined = {name: torch.cat(parts) for name, parts in images.items()}
        owner = np.repeat(clips, count)
        e = {name: self._embed(judge, pictures, device) for name, pictures in joined.items()}
        return self._report(e, owner, {key: str(getattr(judge, key)) for key in ("name", "sha256", "licence")}), joined

    def _embed(self, judge: Any, images: Tensor, device: str | torch.device) -> np.ndarray:
        with torch.inference_mode():
            parts = [
                embed_aligned(judge, part.to(device).float().div(127.5).sub(1), self.alignment).float().cpu()
                for part in images.split(64)
            ]
        return torch.cat(parts).numpy()

    def _report(self, e: Mapping[str, np.ndarray], owner: np.ndarray, judge: dict[str, str]) -> DriftReport:
        first, second = np.triu_indices(len(owner), 1)
        same = owner[first] == owner[second]
        apart = {name: 1 - (x @ x.T)[first, second] for name, x in e.items()}
        clip, follows = owner[first[same]], (second - first)[same] == 1
        rows = {}
        for name, distance in apart.items():
            rows[name] = {
                "drift": mean_interval(distance[same], clip, self.seed),
                "step": mean_interval(distance[same][follows], clip[follows], self.seed),
            }
            if name != INPUT:
                rows[name]["to_input"] = mean_interval(1 - (e[name] * e[INPUT]).sum(1), owner, self.seed)
        differences = {
            f"{one} minus {other}": mean_interval((apart[one] - apart[other])[same], clip, self.seed)
            for one, other in ((ONCE, INPUT), (STILL, INPUT), (FRAMES, INPUT), (FRAMES, ONCE))
        }
        strangers = float(apart[INPUT][~same].mean())
        return DriftReport(rows, len(np.unique(owner)), len(owner), judge, strangers, differences)

    def picture(self, images: Mapping[str, Tensor], identity: np.ndarray) -> bytes:
        """A PNG: a row a clip and way, `columns` frames from left to right."""
        rows, labels = [], []
        for clip in np.unique(identity)[: self.shown]:
            own = np.flatnonzero(identity == clip)
            taken = own[np.linspace(0, len(own) - 1, min(self.columns, len(own))).round().astype(int)]
            for name in (INPUT, ONCE, FRAMES):
                rows.append(images[name][taken.tolist()])
                labels.append(name)
        width = min(len(row) for row in rows)
        sheet = torch.stack([row[:width] for row in rows], 1)
        return contact_sheet({str(number + 1): column for number, column in enumerate(sheet)}, 1, labels)


def ways(shot: FaceBatch) -> dict[str, FaceBatch]:
    """The frames of one clip as a system may be given them."""
    return {
        ONCE: shot,
        STILL: replace(shot, key=[shot.key[0]] * len(shot)),
        FRAMES: replace(shot, identity=torch.arange(len(shot), device=shot.device)),
    }
