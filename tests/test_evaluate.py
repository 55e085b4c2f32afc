"""Evaluation: protocols against hand-computed cases and brute force, reference rows, refusal, table, grid."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from anonfw.batch import FaceBatch
from anonfw.detect import Faces
from anonfw.evaluate import protocols
from anonfw.evaluate.evaluation import Evaluation, EvaluationError, evaluate_system, first_of_each_person, to_uint8
from anonfw.evaluate.grid import contact_sheet, sample_grid
from anonfw.evaluate.intervals import FEW_PEOPLE, Estimate, clopper_pearson, mean_interval, rate_interval
from anonfw.evaluate.references import NAMES, RandomOtherFace, build_references
from anonfw.evaluate.report import WIDTH
from anonfw.evaluate.scorers import EXPRESSION, JudgeError, Scorers, SessionRecognizer
from anonfw.identity import Recognizer

SIZE = 112


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def photos(people: int = 6, each: int = 3, seed: int = 0, size: int = SIZE) -> FaceBatch:
    """Smooth colour fields: a person is a base pattern, a photo a variation of it."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(30, 225, (people, 1, 3, 7, 7)) + rng.normal(0, 8, (people, each, 3, 7, 7))
    small = torch.from_numpy(base.reshape(people * each, 3, 7, 7)).float()
    image = torch.nn.functional.interpolate(small, (size, size), mode="bilinear").clamp(0, 255).to(torch.uint8)
    count = people * each
    return FaceBatch(
        image=image,
        identity=torch.arange(people).repeat_interleave(each) + 100,
        index=torch.arange(count) + 1000,
        key=[f"k{i}" for i in range(count)],
        landmarks=torch.zeros(count, 5, 2),
    )


class PatternJudge(Recognizer):
    """A recogniser of those colour fields: a random projection of the centred, coarse face."""

    name, dim, size, licence, sha256 = "pattern_judge", 64, 112, "none", "ab" * 32

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.register_buffer("matrix", torch.randn(3 * 49, self.dim, generator=generator))

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        coarse = torch.nn.functional.adaptive_avg_pool2d(images, 7).flatten(1)
        return coarse @ self.matrix


class WholeImageDetector:
    """Finds one centred face wherever the middle of the image is not black."""

    def detect(self, image: np.ndarray, threshold: float = 0.5) -> Faces:
        found = int(image[50:60, 50:60].mean() > 20 and threshold <= 0.9)
        box = np.array([[20, 20, 92, 92]], np.float32)
        return Faces(box[:found], np.zeros((1, 5, 2), np.float32)[:found], np.full(found, 0.9, np.float32))


class MeanAttributes:
    """Pose and expression read off mean colours."""

    calls = 0

    def measure(self, image: np.ndarray, landmarks: np.ndarray) -> dict[str, float]:
        type(self).calls += 1
        red, green, blue = (float(v) for v in image.reshape(-1, 3).mean(0))
        return {
            "yaw": red - 128, "pitch": green - 128, "roll": 0.0,
            "mouth_open": red, "smile": green, "eye_open": blue, "brow_raise": red + blue, "brightness": 0.5,
        }  # fmt: skip


def evaluation(**changes: object) -> Evaluation:
    settings = {"judge": PatternJudge(), "detector": WholeImageDetector(), "attributes": MeanAttributes()}
    return Evaluation(**{**settings, **changes})


def inverted(batch: FaceBatch, draw: int) -> torch.Tensor:
    """An anonymizer: the negative inside the face, shifted by the draw."""
    images = batch.pixels()
    mask = torch.from_numpy(protocols.face_ellipse(images.shape[-1], "portrait"))
    return torch.where(mask, (-images + 0.2 * draw).clamp(-1, 1), images)


# Verification.


def test_threshold_by_hand():
    scores = np.array([0.9, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3])
    one = protocols.threshold_at(scores, 0.1)
    assert (one.value, one.accepted, one.pairs, one.resolved) == (0.5, 1, 10, True)
    none = protocols.threshold_at(scores, 0.01)
    assert (none.value, none.accepted, none.resolved) == (0.9, 0, False)


def test_threshold_with_ties_never_exceeds_the_rate():
    threshold = protocols.threshold_at([0.7] * 5 + [0.1] * 5, 0.3)
    assert threshold.value == 0.7 and threshold.accepted == 0


def test_threshold_refuses_what_cannot_be_set():
    with pytest.raises(ValueError, match="two people"):
        protocols.threshold_at([], 0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        protocols.threshold_at([0.1], 1.0)


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=80), st.floats(0.001, 0.999), st.floats(0.001, 0.999))
def test_threshold_properties(scores, first, second):
    scores = np.array(scores) / 20
    low, high = sorted((first, second))
    strict, lax = protocols.threshold_at(scores, low), protocols.threshold_at(scores, high)
    assert strict.accepted / strict.pairs <= low + 1e-9
    assert strict.value >= lax.value, "a lower rate never accepts more"
    # The lowest such threshold: the next lower score would accept too many.
    below = scores[scores < strict.value]
    if len(below):
        assert (scores > below.max()).mean() > low * (1 - 1e-6)


def test_scores_against_brute_force(monkeypatch):
    monkeypatch.setattr(protocols, "BLOCK", 5)
    rng = np.random.default_rng(0)
    identity = np.array([3, 3, 3, 1, 1, 7, 2, 2, 2, 2, 9])
    gallery, source = unit(rng, 11, 8), rng.integers(0, 11, 13)
    queries = unit(rng, 13, 8)
    pairs = [gallery[i] @ gallery[j] for i in range(11) for j in range(i + 1, 11) if identity[i] != identity[j]]
    np.testing.assert_allclose(np.sort(protocols.impostor_scores(gallery, identity)), np.sort(pairs), atol=1e-6)
    own = [queries[q] @ gallery[source[q]] for q in range(13)]
    np.testing.assert_allclose(protocols.source_scores(queries, source, gallery), own, atol=1e-6)
    expected = {
        (q, round(float(queries[q] @ gallery[a]), 5))
        for q in range(13)
        for a in range(11)
        if identity[a] == identity[source[q]] and a != source[q]
    }
    scores, rows = protocols.other_scores(queries, source, gallery, identity)
    assert {(int(q), round(float(s), 5)) for s, q in zip(scores, rows, strict=True)} == expected


def test_retrieval_by_hand():
    # Two photos of person 0, one of person 1; the query is nearest to the other photo of person 0, then to person 1.
    gallery = np.array([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0], [0.8, 0.6, 0.0]])
    query, source, identity = np.array([[0.9, np.sqrt(1 - 0.81), 0.0]]), [0], [0, 0, 1]
    assert protocols.retrieval_hits(query, source, gallery, identity, with_source=True) == [0.0]
    gallery[1], gallery[2] = gallery[2].copy(), gallery[1].copy()
    assert protocols.retrieval_hits(query, source, gallery, identity, with_source=False) == [1.0]
    assert protocols.retrieval_hits(query, source, gallery, [5, 0, 1], with_source=True) == [0.0]
    assert np.isnan(protocols.retrieval_hits(query, source, gallery, [5, 0, 1], with_source=False)).all()


def test_retrieval_ties_go_to_the_attacker():
    gallery = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert protocols.retrieval_hits(gallery[:1], [2], gallery, [0, 1, 2], with_source=True) == [1.0]


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from([1, 5]))
def test_retrieval_does_not_depend_on_the_gallery_order(seed, with_source, rank):
    rng = np.random.default_rng(seed)
    identity = rng.integers(0, 4, 12)
    gallery, queries, source = unit(rng, 12, 4), unit(rng, 7, 4), rng.integers(0, 12, 7)
    order = rng.permutation(12)
    place = np.argsort(order)
    before = protocols.retrieval_hits(queries, source, gallery, identity, with_source, rank)
    after = protocols.retrieval_hits(queries, place[source], gallery[order], identity[order], with_source, rank)
    np.testing.assert_array_equal(before, after)
    wider = protocols.retrieval_hits(queries, source, gallery, identity, with_source, rank + 1)
    known = np.isfinite(before)
    assert (wider[known] >= before[known]).all()


# Diversity, pose, expression, pixels.


def test_diversity_is_the_mean_over_pairs():
    draws = unit(np.random.default_rng(2), 4, 5, 8)
    pairs = [1 - (draws[i] * draws[j]).sum(-1) for i in range(4) for j in range(i + 1, 4)]
    np.testing.assert_allclose(protocols.pairwise_diversity(draws), np.mean(pairs, 0), atol=1e-6)
    np.testing.assert_allclose(protocols.pairwise_diversity(draws[[0, 0]]), 0, atol=1e-6)
    assert np.isnan(protocols.pairwise_diversity(draws[:1])).all()


def matrix(yaw: float, pitch: float, roll: float) -> np.ndarray:
    y, p, r = np.deg2rad([yaw, pitch, roll])
    rz = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    ry = np.array([[np.cos(y), 0, np.sin(y)], [0, 1, 0], [-np.sin(y), 0, np.cos(y)]])
    rx = np.array([[1, 0, 0], [0, np.cos(p), -np.sin(p)], [0, np.sin(p), np.cos(p)]])
    return rz @ ry @ rx


angles = st.tuples(st.floats(-90, 90), st.floats(-60, 60), st.floats(-60, 60))


@given(angles, angles)
def test_pose_error_is_the_angle_of_the_relative_rotation(first, second):
    relative = matrix(*first).T @ matrix(*second)
    skew = np.array([relative[2, 1] - relative[1, 2], relative[0, 2] - relative[2, 0], relative[1, 0] - relative[0, 1]])
    expected = np.rad2deg(np.arctan2(np.linalg.norm(skew) / 2, (np.trace(relative) - 1) / 2))
    assert protocols.rotation_angle(np.array(first), np.array(second)) == pytest.approx(expected, abs=1e-5)


def test_pose_error_by_hand():
    turned = protocols.rotation_angle(np.array([[10.0, 0, 0], [0, 0, -30], [1e-4, 0, 0]]), np.zeros((3, 3)))
    np.testing.assert_allclose(turned, [10, 30, 1e-4], rtol=1e-6)


def test_expression_error_counts_in_standard_deviations():
    error = protocols.expression_error([[1.0, 2.0, 3.0, 4.0]], [[1.5, 2.0, 3.0, 4.0]], [0.25, 1, 1, 1])
    np.testing.assert_allclose(error, [np.sqrt(4 / 4)])
    assert np.isnan(protocols.expression_error([[np.nan, 0]], [[0, 0]], [1, 1])).all()


def test_masked_distance_counts_only_the_mask():
    first, second = np.zeros((2, 3, 4, 4), np.uint8), np.zeros((2, 3, 4, 4), np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    second[0, :, 0] = 255
    second[1, :, 1:] = 200
    np.testing.assert_allclose(protocols.masked_distance(first, second, mask), [255, 0])


@pytest.mark.parametrize("alignment", ["portrait", "arcface"])
def test_the_face_ellipse_holds_the_landmarks(alignment):
    from anonfw.align import template

    mask = protocols.face_ellipse(SIZE, alignment)
    assert all(mask[round(y), round(x)] for x, y in template(alignment, SIZE))
    assert not mask[0, 0] and not mask[-1, -1]
    if alignment == "portrait":
        assert 0.25 < mask.mean() < 0.5


# Intervals.


def test_clopper_pearson_against_published_values():
    # 0 of 10 and 5 of 10 at 95 %: the exact tables give [0, .3085] and [.1871, .8129].
    assert clopper_pearson(0, 10) == pytest.approx((0, 0.30850), abs=1e-5)
    assert clopper_pearson(5, 10) == pytest.approx((0.18709, 0.81291), abs=1e-5)
    assert clopper_pearson(10, 10)[1] == 1.0
    with pytest.raises(ValueError, match="no proportion"):
        clopper_pearson(3, 2)


def test_no_hit_gives_an_upper_bound_by_people():
    few = rate_interval(np.zeros(600), np.repeat(np.arange(120), 5))
    assert (few.value, few.low, few.n, few.people, few.method) == (0, 0, 600, 120, "clopper-pearson")
    assert few.high == pytest.approx(1 - 0.025 ** (1 / 120))
    # More photos of the same people say nothing about further people.
    assert rate_interval(np.zeros(6000), np.repeat(np.arange(120), 50)).high == few.high


def test_interval_widens_when_a_person_hits_as_one():
    person = np.repeat(np.arange(60), 10)
    rng = np.random.default_rng(0)
    alone = rate_interval((rng.random(600) < 0.3).astype(float), person)
    together = rate_interval(np.repeat((rng.random(60) < 0.3).astype(float), 10), person)
    assert alone.method == together.method == "bootstrap"
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_the_interval_covers_the_true_rate():
    """95 % intervals of clustered hits hold the true rate in about 95 of 100 sets."""
    rng = np.random.default_rng(3)
    person, covered = np.repeat(np.arange(100), 6), 0
    for _ in range(200):
        chance = rng.beta(2, 6, 100)  # a person's own rate; mean .25
        hits = rng.random(600) < np.repeat(chance, 6)
        estimate = rate_interval(hits.astype(float), person, replicates=400)
        covered += estimate.low <= 0.25 <= estimate.high
    assert 0.90 <= covered / 200 <= 0.99


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=60))
def test_an_interval_holds_its_estimate(rows):
    person, hits = np.array([r[0] for r in rows]), np.array([float(r[1]) for r in rows])
    estimate = rate_interval(hits, person, replicates=50)
    assert estimate.value == pytest.approx(hits.mean())
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high > estimate.low


def test_what_was_not_measured_is_left_out_and_counted():
    values = np.array([1.0, np.nan] * 20)
    estimate = mean_interval(values, np.repeat(np.arange(20), 2))
    assert (estimate.value, estimate.n, estimate.people) == (1.0, 20, 20)
    missing = mean_interval([np.nan], [0])
    assert math.isnan(missing.value) and missing.n == 0
    two = mean_interval([1.0, 2.0], [0, 1])
    assert two.value == 1.5 and math.isnan(two.low), f"fewer than {FEW_PEOPLE} people give no interval"
    with pytest.raises(ValueError, match="hold its estimate"):
        Estimate(0.5, 0.6, 0.7, 3, 3, "bootstrap")


# Reference rows.


def test_references_have_the_shape_and_range_of_an_anonymizer():
    batch = photos()
    inside = torch.from_numpy(protocols.face_ellipse(SIZE, "portrait"))
    for name, reference in build_references(NAMES, batch, "portrait", seed=0).items():
        out = reference(batch, 0)
        assert out.shape == (18, 3, SIZE, SIZE) and out.dtype == torch.float32
        assert out.min() >= -1 and out.max() <= 1
        if name == "original":
            assert torch.equal(out, batch.pixels())
        elif name != "random_other":
            changed = (out != batch.pixels()).any(1).any(0)
            assert changed[inside].any()
            if name != "box":  # the box covers the ellipse's corners too
                assert not changed[~inside].any()
    assert torch.equal(batch.image, photos().image), "a reference must not write into its batch"


def test_blur_and_mosaic_do_what_they_say():
    batch = photos(2, 1)
    batch.image[:] = 0
    batch.image[:, :, 64, 56] = 255
    made = build_references(["blur", "pixelate"], batch, "portrait", 0)
    blurred = (made["blur"](batch, 0)[0, 0] + 1) / 2
    sigma = 0.05 * SIZE
    assert blurred[64, 56].item() == pytest.approx(1 / (2 * np.pi * sigma**2), rel=0.02)
    mosaic = (made["pixelate"](batch, 0)[0, 0] + 1) / 2
    assert mosaic[64, 56].item() == pytest.approx(1 / 49, rel=1e-4)
    assert (mosaic > 0).sum() == 49


def test_random_other_is_somebody_else_and_reproducible():
    batch = photos(5, 4)
    other = RandomOtherFace(batch, seed=3)
    rows = other.choose(batch, 0)
    assert (batch.identity[rows] != batch.identity).all()
    assert len(set(rows.tolist())) > 8, "photos of one person get different others"
    assert torch.equal(other(batch, 0), batch.select(rows).pixels())
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(other.choose(batch.select(order), 0), rows[order]), "it follows the sample, not the batch"
    assert not torch.equal(other.choose(batch, 1), rows)
    assert not torch.equal(RandomOtherFace(batch, seed=4).choose(batch, 0), rows)
    with pytest.raises(ValueError, match="two people"):
        RandomOtherFace(photos(1, 4))


def test_unknown_reference_is_named():
    with pytest.raises(ValueError, match=r"'blurr'.*blur"):
        Evaluation(references=["blurr"])


# Scorers.


@pytest.mark.parametrize("names", [{"pattern_judge"}, {"arcface_mbf", "AB" * 32}])
def test_the_judge_must_not_have_trained_the_system(names):
    def never(batch, draw):
        raise AssertionError("refuse before anything is computed")

    with pytest.raises(JudgeError, match=r"pattern_judge.*must not judge"):
        evaluation().run(never, [photos()], names)


def test_every_image_is_measured_once():
    MeanAttributes.calls = 0
    scorers = Scorers(PatternJudge(), WholeImageDetector(), MeanAttributes())
    batch = photos(3, 2)
    first = scorers.measure(batch.image)
    again = scorers.measure(torch.cat([batch.image, batch.image]))
    assert MeanAttributes.calls == scorers.images["judge"] == scorers.images["detector"] == 6
    np.testing.assert_array_equal(np.tile(first.embedding, (2, 1)), again.embedding)
    np.testing.assert_array_equal(np.tile(first.table(EXPRESSION), (2, 1)), again.table(EXPRESSION))


def test_no_face_means_no_pose():
    batch = photos(3, 2)
    batch.image[1] = 0
    measured = Scorers(PatternJudge(), WholeImageDetector(), MeanAttributes()).measure(batch.image)
    assert measured.detected.tolist() == [True, False, True, True, True, True]
    assert np.isnan(measured.factors["yaw"]).tolist() == [False, True, False, False, False, False]
    assert measured.score[1] == 0 and np.isfinite(measured.embedding).all()


def test_a_face_elsewhere_is_not_the_face():
    class Corner:
        def detect(self, image, threshold=0.5):
            box = np.array([[0, 0, 12, 12]], np.float32)
            return Faces(box, np.zeros((1, 5, 2), np.float32), np.ones(1, np.float32))

    measured = Scorers(PatternJudge(), Corner(), MeanAttributes()).measure(photos(2, 1).image)
    assert not measured.detected.any()


def test_rounding_is_that_of_a_file():
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, 1.2, -3.0])).tolist() == [0, 128, 255, 255, 0]
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(every.float().div(127.5).sub(1)), every)
    with pytest.raises(ValueError, match="not finite"):
        to_uint8(torch.tensor([float("nan")]))


# The whole run.


@pytest.fixture(scope="module")
def report():
    return evaluation(draws=3, batch_size=5).run(inverted, [photos(8, 3)], {"arcface_mbf"}, progress=False)


def test_the_table_says_what_happened(report):
    assert list(report.rows) == ["anonymized", *NAMES]
    assert (report.people, report.photos, report.draws, report.gallery) == (8, 24, 3, 24)
    assert report.chance_top1 == pytest.approx(3 / 24)
    threshold = report.thresholds[0]
    assert threshold.fpr == 1e-2 and threshold.pairs == 24 * 21 // 2
    assert report.value("original", "tpr_other@1e-2").value > 0.9
    assert report.value("original", "tpr_other@1e-2").n == 24 * 2
    assert report.value("anonymized", "top1_source").n == 72
    assert report.value("random_other", "tpr_source@1e-2").value < 0.1
    assert report.value("original", "pose_error").value == 0
    assert report.value("original", "outside_distance").value == 0
    assert report.value("anonymized", "outside_distance").value == 0
    assert report.value("random_other", "outside_distance").value > 10
    assert report.value("box", "detected").value == 0 and report.value("box", "detected").high < 0.4
    assert report.value("box", "pose_error").n == 0
    assert report.value("anonymized", "diversity").value > 0
    assert report.value("blur", "diversity").n == 0
    assert report.value("anonymized", "cosine_source").value < report.value("blur", "cosine_source").value
    assert report.cost_ms.keys() == {"anonymizer", "judge", "detector", "attributes"}
    with pytest.raises(KeyError, match="tpr_source"):
        report.value("anonymized", "tpr")


def test_pose_and_expression_compare_an_output_with_its_source(report):
    batch = photos(8, 3)
    before = batch.image.float().mean((2, 3)).double().numpy()
    after = to_uint8(inverted(batch, 0)).float().mean((2, 3)).double().numpy()
    pose = protocols.rotation_angle(
        *(np.stack([v[:, 0] - 128, v[:, 1] - 128, np.zeros(24)], -1) for v in (before, after))
    )
    assert report.value("anonymized", "pose_error").value == pytest.approx(pose.mean(), rel=1e-4)
    assert report.value("anonymized", "pose_error").n == 24, "measured on the first draw"
    faces = [np.stack([v[:, 0], v[:, 1], v[:, 2], v[:, 0] + v[:, 2]], -1) for v in (before, after)]
    expected = np.sqrt((((faces[0] - faces[1]) / faces[0].std(0)) ** 2).mean(-1)).mean()
    assert report.value("anonymized", "expression_error").value == pytest.approx(expected, rel=1e-4)


def test_tpr_grows_with_fpr(report):
    for name in report.rows:
        for attack in ("source", "other"):
            lax, strict = (report.value(name, f"tpr_{attack}@{rate}").value for rate in ("1e-2", "1e-3"))
            assert strict <= lax


def test_batch_size_changes_nothing(report):
    again = evaluation(draws=3, batch_size=24).run(inverted, [photos(8, 3)], set(), progress=False)
    for name, row in report.rows.items():
        for measure, estimate in row.items():
            other = again.value(name, measure)
            assert estimate.value == pytest.approx(other.value, abs=1e-6, nan_ok=True), (name, measure)


def test_text_fits_a_terminal(report):
    lines = report.text().splitlines()
    assert max(map(len, lines)) <= WIDTH
    body = "\n".join(lines)
    headings = ["TPR % @1e-2", "TPR % @1e-3", "own photo", "other photo", "top-1 %", "diversity", "detected %"]
    facts = ["judge pattern_judge", "8 people, 24 photos, 3 anonymizations", "too few pairs"]
    for expected in [*headings, *facts, f"> {report.thresholds[0].value:.4f}"]:
        assert expected in body
    original = next(line for line in lines if line.startswith("original"))
    assert original.count("same") == 3
    assert sum(line.startswith("original") and "  100 [63,100]" in line for line in lines) == 2, "rates in per cent"


def test_wide_numbers_still_fit(report):
    wide = Estimate(-0.1234, -0.4321, -0.0123, 10_000, 500, "bootstrap")
    rate = Estimate(0.99876, 0.99543, 1.0, 10_000, 500, "bootstrap")
    spread = Estimate(1.23, 1.01, 1.45, 10_000, 500, "bootstrap")
    angle = Estimate(23.45, 11.2, 70.9, 10_000, 500, "bootstrap")
    row = {key: rate for key in report.rows["anonymized"]}
    row |= {"cosine_source": wide, "diversity": spread, "pose_error": angle, "expression_error": spread}
    row |= {"outside_distance": angle}
    changed = type(report)(**{**vars(report), "rows": {name: row for name in report.rows}})
    assert max(map(len, changed.text().splitlines())) <= WIDTH


def test_save_writes_every_form(report, tmp_path):
    paths = report.save(tmp_path / "table")
    assert sorted(path.name for path in (tmp_path / "table").iterdir()) == [
        "table.csv", "table.json", "table.md", "table.txt",
    ]  # fmt: skip
    loaded = json.loads(paths["json"].read_text())
    measured = report.value("anonymized", "tpr_source@1e-2")
    assert loaded["rows"]["anonymized"]["tpr_source@1e-2"]["value"] == measured.value
    assert loaded["rows"]["box"]["pose_error"]["value"] is None
    assert loaded["judge"]["sha256"] == "ab" * 32
    with paths["csv"].open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == sum(len(row) for row in report.rows.values())
    assert {row["interval"] for row in rows} <= {"bootstrap", "clopper-pearson"}
    table = [line for line in paths["md"].read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert paths["txt"].read_text() == report.text()


def test_a_limit_spreads_over_people_and_keeps_the_gallery():
    loaded = [photos(8, 3).select(slice(start, start + 5)) for start in range(0, 24, 5)]
    gallery = evaluation(photos_per_person=2).collect(loaded)
    assert gallery.identity.tolist() == [100 + i // 2 for i in range(16)]
    assert evaluation(limit=9).choose(gallery).tolist() == [0, 1, 2, 4, 6, 8, 10, 12, 14]
    assert evaluation().choose(gallery).tolist() == list(range(16))
    shuffled = gallery.select([3, 0, 2, 1, 4])
    assert shuffled.identity[evaluation(limit=3).choose(shuffled)].tolist() == [101, 100, 102]
    with pytest.raises(EvaluationError, match="at least two"):
        evaluation().collect([photos(1, 3)])
    with pytest.raises(ValueError, match="at least 1"):
        Evaluation(limit=0)
    assert first_of_each_person(gallery, 10) == [0, 2, 4, 6, 8, 10, 12, 14, 1, 3]


def test_a_limit_leaves_the_thresholds_alone(report):
    limited = evaluation(draws=3, limit=10).run(inverted, [photos(8, 3)], set(), progress=False)
    assert [t.value for t in limited.thresholds] == [t.value for t in report.thresholds]
    assert (limited.people, limited.photos, limited.gallery, limited.gallery_people) == (8, 10, 24, 8)
    assert limited.value("anonymized", "tpr_source@1e-2").n == 30
    assert limited.value("anonymized", "tpr_other@1e-2").n == 60
    assert limited.value("original", "top1_other").value > 0.9


def test_single_photos_are_named_not_dropped():
    report = evaluation(references=["original"]).run(inverted, [photos(8, 1)], set(), progress=False)
    assert report.value("anonymized", "tpr_other@1e-2").n == 0
    assert report.value("anonymized", "tpr_source@1e-2").n == 24
    assert "8 people have one photo only" in report.text()


class InvertingSystem(SimpleNamespace):
    """As much of a system as an evaluation needs."""

    device, training = torch.device("cpu"), True

    def anonymize(self, batch, draw=0):
        assert not self.training, "an evaluation runs in eval mode"
        return inverted(batch, draw)

    def reconstruct(self, batch):
        return batch.pixels()

    def recognizer_names(self):
        return {"arcface_mbf"}

    def to(self, device):
        assert torch.device(device) == self.device
        return self

    def train(self, mode=True):
        self.training = mode

    def eval(self):
        self.train(False)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Shards of the colour fields."""
    from anonfw.data import DatasetWriter, Sample

    folder, batch = tmp_path_factory.mktemp("fields"), photos(8, 3)
    settings = {"name": "fields", "image_size": SIZE, "alignment": "portrait", "source": "a test", "licence": "none"}
    with DatasetWriter(folder, **settings) as writer:
        for person in batch.identity.unique().tolist():
            samples = []
            for row in torch.nonzero(batch.identity == person).flatten().tolist():
                stream = io.BytesIO()
                Image.fromarray(batch.image[row].permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=95)
                samples.append(Sample(batch.key[row], stream.getvalue(), np.zeros((5, 2)).tolist(), {}))
            writer.add_identity("test", str(person), samples)
    return folder


def recipe_for(dataset, **changes):
    parts = {"judge": "PatternJudge", "detector": "WholeImageDetector", "attributes": "MeanAttributes"}
    nodes = {name: {"_target_": f"{__name__}.{part}"} for name, part in parts.items()}
    loader = {"dataset": str(dataset), "split": "test", "batch_size": 5, "workers": 0}
    return {
        "evaluate": {"_target_": "anonfw.evaluate.Evaluation", "draws": 2, **nodes, **changes},
        "data": {"test": {"_target_": "anonfw.data.FaceLoader", "_partial_": True, **loader}},
    }


def test_evaluate_a_system_from_its_recipe(dataset, tmp_path):
    system = InvertingSystem()
    report = evaluate_system(system, recipe_for(dataset), tmp_path / "out")
    assert (report.people, report.photos, report.draws) == (8, 24, 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "grid.png", "table.csv", "table.json", "table.md", "table.txt",
    ]  # fmt: skip
    assert system.training, "put back as it was"
    with pytest.raises(EvaluationError, match=r"evaluate\.alignment=portrait"):
        evaluate_system(system, recipe_for(dataset, alignment="arcface"), tmp_path)
    with pytest.raises(EvaluationError, match="nothing to measure"):
        evaluate_system(system, {"system": {}}, tmp_path)


def test_validate_prints_the_table(dataset, tmp_path, monkeypatch, capsys):
    import anonfw.training
    from anonfw.evaluate import validate

    def load_system(place, overrides):
        assert (place, overrides) == (str(tmp_path), ["evaluate.limit=6"])
        return InvertingSystem(), recipe_for(dataset, limit=6)

    monkeypatch.setattr(anonfw.training, "load_system", load_system, raising=False)
    parser = argparse.ArgumentParser()
    validate.add_arguments(parser)
    assert validate.run(parser.parse_args(["--device", "cpu", str(tmp_path), "evaluate.limit=6"])) == 0
    printed = capsys.readouterr().out
    assert "6 people, 6 photos, 2 anonymizations of each; judge pattern_judge" in printed
    assert (tmp_path / "validate" / "grid.png").is_file()


# Pictures.


def test_contact_sheet(tmp_path):
    batch = photos(3, 1, size=32)
    png = contact_sheet({"a": batch.image, "b": batch.pixels()}, zoom=2, rows=["x", "y", "z"])
    path = tmp_path / "sheet.png"
    path.write_bytes(png)
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet)
    assert pixels.shape[0] == 22 + 3 * (64 + 4)
    last_two = pixels[-68:-4, -68 * 2 :]
    np.testing.assert_array_equal(last_two[:, :64], last_two[:, 68:132])  # the same photo, as bytes and as floats
    with pytest.raises(ValueError, match="one shape"):
        contact_sheet({"a": batch.image, "b": batch.image[:2]})
    with pytest.raises(ValueError, match="row labels"):
        contact_sheet({"a": batch.image}, rows=["x"])


def test_sample_grid_has_the_five_columns():
    batch = photos(3, 1)
    asked = []

    def anonymize(given, draw):
        asked.append(draw)
        return inverted(given, draw)

    system = SimpleNamespace(device=torch.device("cpu"), anonymize=anonymize, reconstruct=lambda given: given.pixels())
    with Image.open(io.BytesIO(sample_grid(system, batch))) as sheet:
        assert sheet.size == (4 + 5 * (224 + 4), 22 + 3 * (224 + 4))
    assert asked == [0, 1, 2]


# Real networks.


@pytest.mark.slow
def test_the_fast_judge_is_the_same_recogniser():
    from anonfw.identity import EdgeFace

    slow, fast = EdgeFace(), SessionRecognizer("edgeface_s")
    assert (slow.name, slow.sha256, slow.dim, slow.size) == (fast.name, fast.sha256, fast.dim, fast.size)
    images = photos(2, 2).pixels()
    with torch.inference_mode():
        torch.testing.assert_close(slow(images), fast(images), atol=1e-4, rtol=0)
