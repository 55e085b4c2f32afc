"""One row of the table: all measures of one method from what the scorers found."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.evaluate import protocols
from anonfw.evaluate.intervals import Estimate, mean_interval, rate_interval
from anonfw.evaluate.protocols import Threshold
from anonfw.evaluate.report import rate_label
from anonfw.evaluate.scorers import EXPRESSION, POSE, Measured


def row_of(
    photos: FaceBatch,
    images: Tensor,
    measured: list[Measured],
    originals: Measured,
    thresholds: list[Threshold],
    spread: np.ndarray,
    alignment: str,
    seed: int,
) -> dict[str, Estimate]:
    """Every measure of one method.

    Args:
        photos: the N originals.
        images: (K,N,3,H,W) uint8, what the method made of them in K draws.
        measured: one Measured a draw; where its pose and expression are all NaN they were not measured.
        originals: measurements of the originals, the gallery.
        thresholds: operating points of the verification columns.
        spread: (F,) unit of the expression error (`protocols.expression_error`).
        alignment, seed: crop of the images, and seed of the bootstrap.
    """
    people, gallery = photos.identity.numpy(), originals.embedding
    source = np.tile(np.arange(len(people)), len(measured))
    person = people[source]
    embeddings = np.stack([m.embedding for m in measured])
    queries = embeddings.reshape(len(source), -1)
    own = protocols.source_scores(queries, source, gallery)
    other, other_row = protocols.other_scores(queries, source, gallery, people)
    row = {}
    for threshold in thresholds:
        label = rate_label(threshold.fpr)
        row[f"tpr_source@{label}"] = rate_interval(own > threshold.value, person, seed)
        row[f"tpr_other@{label}"] = rate_interval(other > threshold.value, person[other_row], seed)
    for rank in (1, 5):
        for name, with_source in (("source", True), ("other", False)):
            hits = protocols.retrieval_hits(queries, source, gallery, people, with_source, rank)
            row[f"top{rank}_{name}"] = rate_interval(hits, person, seed)
    row["cosine_source"] = mean_interval(own, person, seed)
    row["cosine_other"] = mean_interval(other, person[other_row], seed)
    row["diversity"] = mean_interval(protocols.pairwise_diversity(embeddings), people, seed)
    row["detected"] = rate_interval(np.concatenate([m.detected for m in measured]), person, seed)
    turned, moved = originals.table(POSE), originals.table(EXPRESSION)
    pose = [protocols.rotation_angle(m.table(POSE), turned) for m in measured]
    expression = [protocols.expression_error(m.table(EXPRESSION), moved, spread) for m in measured]
    row["pose_error"] = mean_interval(np.concatenate(pose), person, seed)
    row["expression_error"] = mean_interval(np.concatenate(expression), person, seed)
    outside = ~protocols.face_ellipse(images.shape[-1], alignment)
    distance = [protocols.masked_distance(draw.numpy(), photos.image.numpy(), outside) for draw in images]
    row["outside_distance"] = mean_interval(np.concatenate(distance), person, seed)
    return row
