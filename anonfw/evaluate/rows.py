"""One row of the table: the measures of one method, from what the scorers found in its outputs.

Legend: N originals (the gallery), P of them anonymized (the photos), K draws of each.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from anonfw.batch import FaceBatch
from anonfw.evaluate import protocols
from anonfw.evaluate.intervals import Estimate, mean_interval, rate_interval
from anonfw.evaluate.protocols import Threshold
from anonfw.evaluate.report import rate_label
from anonfw.evaluate.scorers import EXPRESSION, POSE, Measured


def identity_measures(
    measured: list[Measured],
    chosen: np.ndarray,
    gallery: np.ndarray,
    people: np.ndarray,
    thresholds: list[Threshold],
    seed: int,
) -> dict[str, Estimate]:
    """Verification, retrieval, cosine and diversity.

    Args:
        measured: of the P outputs of each of the K draws.
        chosen: (P,) the gallery row that each output was made from.
        gallery: (N,D) embeddings of the originals. people: (N,) who is on them.
        thresholds: operating points of the verification columns.
        seed: of the bootstrap.
    """
    embeddings = np.stack([m.embedding for m in measured])
    queries, source = np.concatenate(embeddings), np.tile(chosen, len(measured))
    person = people[source]
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
    row["diversity"] = mean_interval(protocols.pairwise_diversity(embeddings), people[chosen], seed)
    return row


def utility_measures(
    measured: list[Measured], originals: Measured, person: np.ndarray, spread: np.ndarray, seed: int
) -> dict[str, Estimate]:
    """Share of outputs with a face, and errors of pose and expression.

    Args:
        measured: of the P outputs of each draw; NaN pose and expression were not measured and do not count.
        originals: of the P sources. person: (P,) who is on them.
        spread: (F,) unit of the expression error (`protocols.expression_error`).
    """
    everyone = np.tile(person, len(measured))
    turned, moved = originals.table(POSE), originals.table(EXPRESSION)
    pose = [protocols.rotation_angle(m.table(POSE), turned) for m in measured]
    expression = [protocols.expression_error(m.table(EXPRESSION), moved, spread) for m in measured]
    return {
        "detected": rate_interval(np.concatenate([m.detected for m in measured]), everyone, seed),
        "pose_error": mean_interval(np.concatenate(pose), everyone, seed),
        "expression_error": mean_interval(np.concatenate(expression), everyone, seed),
    }


def distance_outside(images: Tensor, photos: FaceBatch, alignment: str, seed: int) -> Estimate:
    """Change outside the face ellipse: (K,P,3,H,W) uint8 outputs against their sources."""
    outside = ~protocols.face_ellipse(images.shape[-1], alignment)
    distance = [protocols.masked_distance(draw.numpy(), photos.image.numpy(), outside) for draw in images]
    return mean_interval(np.concatenate(distance), np.tile(photos.identity.numpy(), len(images)), seed)
