"""Identity drift over clips, on made clips with a judge that can be worked out by hand."""

from __future__ import annotations

import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.data.writer import DatasetWriter, Sample
from anonfw.evaluate.drift import FRAMES, INPUT, ONCE, STILL, DriftEvaluation, ways
from anonfw.evaluate.evaluation import EvaluationError
from anonfw.evaluate.scorers import JudgeError
from anonfw.identity import Recognizer

SIZE = 16


class MeanColour(Recognizer):
    """The direction of a face's mean colour."""

    name, dim, size, sha256, licence = "mean_colour", 3, 16, "c" * 64, "none"

    def embed(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def painted(colours: Tensor) -> Tensor:
    """(N,3) -> (N,3,H,W) in [-1,1]."""
    return colours[:, :, None, None].expand(-1, -1, SIZE, SIZE)


def frames_of(colours: Tensor, clips: list[int]) -> FaceBatch:
    image = painted(colours).add(1).mul(127.5).round().to(torch.uint8)
    count = len(clips)
    return FaceBatch(
        image, torch.tensor(clips), torch.arange(count), [f"f{n}" for n in range(count)], torch.zeros(count, 5, 2)
    )


def drawn(clips: int, frames: int, seed: int = 0) -> FaceBatch:
    colours = torch.rand(clips * frames, 3, generator=torch.Generator().manual_seed(seed)) * 1.6 - 0.8
    return frames_of(colours, [clip for clip in range(clips) for _ in range(frames)])


def by(what: str):
    """An anonymizer whose colour depends on one thing alone."""

    def anonymize(batch: FaceBatch, draw: int) -> Tensor:
        assert draw == 0
        values = batch.identity.tolist() if what == "identity" else [zlib.crc32(key.encode()) for key in batch.key]
        rows = [torch.randn(3, generator=torch.Generator().manual_seed(value % 2**31)) for value in values]
        return painted(0.8 * torch.nn.functional.normalize(torch.stack(rows), dim=1))

    return anonymize


def evaluate(anonymize, frames: FaceBatch, **arguments):
    return DriftEvaluation(MeanColour(), alignment="arcface", **arguments).run(anonymize, frames, set())


@settings(max_examples=8)
@given(st.integers(0, 1000), st.integers(5, 7), st.integers(2, 5))
def test_drift_is_the_mean_over_the_pairs_of_a_clip(seed: int, clips: int, frames: int):
    batch = drawn(clips, frames, seed)
    report, images = evaluate(lambda batch, _: batch.pixels(), batch)
    e = torch.nn.functional.normalize(batch.pixels().mean((2, 3)), dim=1).numpy()
    same, follows, strangers = [], [], []
    for i in range(len(e)):
        for j in range(i + 1, len(e)):
            distance = 1 - float(e[i] @ e[j])
            if batch.identity[i] != batch.identity[j]:
                strangers.append(distance)
                continue
            same.append(distance)
            if j == i + 1:
                follows.append(distance)
    for name in (INPUT, ONCE, STILL, FRAMES):  # nothing was changed: all as the input
        drift = report.value(name, "drift")
        assert drift.value == pytest.approx(np.mean(same), abs=1e-5) and drift.low <= drift.value <= drift.high
        assert (drift.n, drift.people) == (len(same), clips)
        assert report.value(name, "step").value == pytest.approx(np.mean(follows), abs=1e-5)
        assert torch.equal(images[name], batch.image)
    assert report.strangers == pytest.approx(np.mean(strangers), abs=1e-5)
    assert report.value(ONCE, "to_input").value == pytest.approx(0, abs=1e-5)
    assert all(abs(e.value) < 1e-6 for e in report.differences.values())


def test_one_identity_a_clip_against_one_a_frame():
    report, _ = evaluate(by("identity"), drawn(6, 4))
    assert report.value(ONCE, "drift").value == pytest.approx(0, abs=1e-3)
    assert report.value(FRAMES, "drift").value > 0.3
    difference = report.differences[f"{FRAMES} minus {ONCE}"]
    assert difference.low > 0
    assert f"{FRAMES} minus {ONCE}, drift: +" in report.text() and ": more" in report.text()
    assert f"{ONCE} minus {INPUT}, drift: -" in report.text()


def test_noise_of_the_frames_is_told_apart_from_their_identity():
    report, _ = evaluate(by("key"), drawn(6, 4))
    assert report.value(STILL, "drift").value == pytest.approx(0, abs=1e-3)
    assert report.value(ONCE, "drift").value > 0.3


def test_the_three_ways_differ_in_what_they_say_only():
    shot = drawn(1, 5)
    made = ways(shot)
    assert made[ONCE] is shot
    assert made[STILL].key == ["f0"] * 5 and torch.equal(made[STILL].identity, shot.identity)
    assert made[FRAMES].key == shot.key and made[FRAMES].identity.tolist() == [0, 1, 2, 3, 4]
    assert all(torch.equal(batch.image, shot.image) for batch in made.values())


def test_limit_and_picture():
    batch = drawn(7, 4)
    evaluation = DriftEvaluation(MeanColour(), limit=5, shown=2, columns=3, alignment="arcface")
    report, images = evaluation.run(by("identity"), batch, set())
    assert (report.clips, report.frames) == (5, 20)
    sheet = cv2.imdecode(np.frombuffer(evaluation.picture(images, batch.identity.numpy()[:20]), np.uint8), 1)
    assert sheet.shape[0] > 2 * 3 * SIZE and sheet.shape[1] > 3 * SIZE


def test_what_cannot_be_measured():
    for frames, complaint in (
        (drawn(1, 4), "1 clips of 4 frames"),
        (frames_of(torch.rand(3, 3), [0, 0, 1]), "2 clips of 1"),
    ):
        with pytest.raises(EvaluationError, match=complaint):
            evaluate(by("identity"), frames)
    with pytest.raises(JudgeError, match="mean_colour"):
        DriftEvaluation(MeanColour()).run(by("identity"), drawn(3, 3), {"mean_colour"})
    for wrong in ({"limit": 0}, {"shown": 0}, {"columns": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            DriftEvaluation(**wrong)


def write_clips(folder: Path, clips: int, frames: int) -> Path:
    batch = drawn(clips, frames)
    with DatasetWriter(
        folder, name="clips", image_size=SIZE, alignment="arcface", source="paint", licence="none"
    ) as writer:
        for clip in range(clips):
            rows = range(clip * frames, (clip + 1) * frames)
            jpegs = [
                simplejpeg.encode_jpeg(batch.image[r].permute(1, 2, 0).contiguous().numpy(), 95, colorspace="RGB")
                for r in rows
            ]
            writer.add_identity("test", f"c{clip}", [Sample(f"c{clip}_{n}", jpeg) for n, jpeg in enumerate(jpegs)])
    return folder


def test_an_evaluation_of_a_recipe(tmp_path: Path):
    loader = {"_target_": "anonfw.data.FaceLoader", "_partial_": True, "split": "test", "batch_size": 5, "workers": 0}
    recipe = {"dataset": str(write_clips(tmp_path / "clips", 6, 4)), "data": {"test": loader}}
    system = SimpleNamespace(anonymize=by("identity"), recognizer_names=lambda: {"other"}, device=torch.device("cpu"))
    evaluation = DriftEvaluation(MeanColour(), alignment="arcface", columns=4)
    report = evaluation.measure(system, recipe, tmp_path)
    assert (report.clips, report.frames, report.settings["data"]) == (6, 24, "clips")
    assert cv2.imread(str(tmp_path / "clips.png")) is not None and "clips.png" in "".join(report.closing(tmp_path))
    assert {path.name for path in report.save(tmp_path).values()} >= {"table.json", "table.txt"}
    with pytest.raises(EvaluationError, match="arcface crops: measure them with evaluate.alignment=arcface"):
        DriftEvaluation(MeanColour()).measure(system, recipe, tmp_path)
