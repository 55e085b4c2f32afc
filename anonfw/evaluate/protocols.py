"""What is measured, as functions of arrays: verification, retrieval, cosine, diversity, pose, expression, pixels.

Legend: N original photos (the gallery, one row each), Q anonymized outputs (the queries), D embedding width; `source`
is (Q,) int, the gallery row that an output was made from; `identity` is (N,) int, the person of a gallery row.
Embeddings have unit norm, so a dot product is the cosine. Every rate and mean is given with an interval over *people*
(see `intervals`), because a person's photos and draws are not independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.floating]
BLOCK = 1024  # rows of a similarity matrix held at once


@dataclass(frozen=True)
class Threshold:
    """An operating point fixed on pairs of original photos of different people.

    Attributes:
        fpr: the false positive rate that was asked for.
        value: a pair is accepted when its cosine is greater than this.
        pairs: impostor pairs that it was set on.
        accepted: how many of them are accepted; `accepted / pairs <= fpr`.
    """

    fpr: float
    value: float
    pairs: int
    accepted: int

    @property
    def resolved(self) -> bool:
        """Whether the set has enough impostor pairs for this rate (at least one accepted pair is allowed)."""
        return self.fpr * self.pairs >= 1.0


def impostor_scores(embeddings: Array, identity: ArrayLike) -> Array:
    """(M,) cosines of all pairs of photos of different people, each pair once: M <= N(N-1)/2."""
    embeddings, identity = np.asarray(embeddings, np.float32), np.asarray(identity)
    parts = []
    for start in range(0, len(embeddings), BLOCK):
        rows = np.arange(start, min(start + BLOCK, len(embeddings)))
        wanted = (identity[rows, None] != identity[None]) & (rows[:, None] < np.arange(len(embeddings))[None])
        parts.append((embeddings[rows] @ embeddings.T)[wanted])
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def threshold_at(impostors: ArrayLike, fpr: float) -> Threshold:
    """The lowest threshold whose false positive rate is at most `fpr`.

    t = the (k+1)-th largest impostor score with k = floor(fpr M); accept when score > t. So at most k of M are accepted
    (fewer where scores tie). The usual definition of TAR at FAR, e.g. NIST IR 8280; with fewer than 1/fpr pairs k = 0
    and t is the largest impostor score: `Threshold.resolved` is then False.

    Raises:
        ValueError: no impostor scores, or a rate outside (0,1).
    """
    scores = np.sort(np.asarray(impostors))[::-1]
    if not 0 < fpr < 1:
        raise ValueError(f"a false positive rate lies between 0 and 1, not {fpr}")
    if not len(scores):
        raise ValueError("no impostor pairs: the evaluated photos are all of one person; evaluate at least two people")
    # A relative slack: 1e-3 * 3000 must be 3, not 2.
    allowed = min(int(np.floor(fpr * len(scores) * (1 + 1e-9))), len(scores) - 1)
    value = float(scores[allowed])
    return Threshold(fpr, value, len(scores), int((scores > value).sum()))


def source_scores(queries: Array, source: ArrayLike, gallery: Array) -> Array:
    """(Q,) cosine of each output to the very photo it was made from."""
    return np.einsum("qd,qd->q", np.asarray(queries), np.asarray(gallery)[np.asarray(source)])


def other_scores(
    queries: Array, source: ArrayLike, gallery: Array, identity: ArrayLike
) -> tuple[Array, NDArray[np.int64]]:
    """Cosines of each output to all *other* original photos of the same person.

    Returns:
        scores (M,) and the query row (M,) of each. A query whose person has one photo only has no row.
    """
    scores, rows = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    for start, similar, mine, own in _similarity_blocks(queries, source, gallery, identity):
        row, column = np.nonzero(mine & ~own)
        scores.append(similar[row, column])
        rows.append(row + start)
    return np.concatenate(scores), np.concatenate(rows)


def retrieval_hits(
    queries: Array, source: ArrayLike, gallery: Array, identity: ArrayLike, with_source: bool, rank: int = 1
) -> Array:
    """(Q,) 1.0 where a photo of the right person is among the `rank` most similar of the gallery, else 0.0.

    The rank of the best right photo is the number of photos of other people that score strictly higher; ties go to the
    attacker, so the result does not depend on the gallery's order. `with_source=True` keeps the output's own original
    in the gallery (the "identity retrieval rate" of NullFace, made stricter: any photo of the person is a hit);
    `with_source=False` removes it, and a query whose person has no other photo is NaN.
    """
    hits = np.full(len(np.asarray(queries)), np.nan)
    for start, similar, mine, own in _similarity_blocks(queries, source, gallery, identity):
        right = mine if with_source else mine & ~own
        best = np.where(right, similar, -np.inf).max(1)
        better = (~mine & (similar > best[:, None])).sum(1)
        hits[start : start + len(similar)] = np.where(right.any(1), better < rank, np.nan)
    return hits


def _similarity_blocks(queries: Array, source: ArrayLike, gallery: Array, identity: ArrayLike) -> Iterator[tuple]:
    """(first row, similarities, same person, the very source) for blocks of queries; each array is (rows, N)."""
    queries, gallery = np.asarray(queries, np.float32), np.asarray(gallery, np.float32)
    source, identity = np.asarray(source), np.asarray(identity)
    for start in range(0, len(queries), BLOCK):
        origin = source[start : start + BLOCK]
        mine = identity[origin][:, None] == identity[None]
        own = origin[:, None] == np.arange(len(gallery))[None]
        yield start, queries[start : start + BLOCK] @ gallery.T, mine, own


def pairwise_diversity(draws: Array) -> Array:
    """(N,) mean over pairs of draws of 1 - cosine. `draws` is (K,N,D): K anonymizations of each source, K >= 2.

    With s the sum of the K unit vectors, the sum over i<j of e_i.e_j is (|s|^2 - K) / 2. NaN when K < 2.
    """
    draws = np.asarray(draws, np.float64)
    k = len(draws)
    if k < 2:
        return np.full(draws.shape[1], np.nan)
    squares = (draws**2).sum(-1).sum(0)
    total = (draws.sum(0) ** 2).sum(-1)
    return 1 - (total - squares) / (k * (k - 1))


def quaternion(yaw: ArrayLike, pitch: ArrayLike, roll: ArrayLike) -> Array:
    """(...,4) unit quaternion (w,x,y,z) of R = Rz(roll) Ry(yaw) Rx(pitch), angles in degrees."""
    y, p, r = (np.deg2rad(np.asarray(a, np.float64)) / 2 for a in (yaw, pitch, roll))
    cy, sy, cp, sp, cr, sr = np.cos(y), np.sin(y), np.cos(p), np.sin(p), np.cos(r), np.sin(r)
    return np.stack(
        [
            cr * cy * cp + sr * sy * sp,
            cr * cy * sp - sr * sy * cp,
            cr * sy * cp + sr * cy * sp,
            sr * cy * cp - cr * sy * sp,
        ],
        -1,
    )


def rotation_angle(first: Array, second: Array) -> Array:
    """(...) degrees between two head poses, each (...,3) yaw, pitch, roll in degrees: the geodesic 2 acos |q1.q2|.

    NullFace's pose distance (there in radians). |q1 - q2| and |q1 + q2| replace the arc cosine, which is inexact
    for small angles.
    """
    a, b = (quaternion(*np.moveaxis(np.asarray(p, np.float64), -1, 0)) for p in (first, second))
    near, far = np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1)
    return np.rad2deg(4 * np.arctan2(np.minimum(near, far), np.maximum(near, far)))


def expression_error(first: Array, second: Array, spread: ArrayLike) -> Array:
    """(B,) root mean square over the expression measurements of (difference / spread).

    Args:
        first, second: (B,F) measurements, the same order of names.
        spread: (F,) standard deviation of each measurement over the original photos. 1.0 is thus "as far off as one
            standard deviation of the population", and two unrelated photos are about sqrt(2) apart.
    """
    scaled = (np.asarray(first, np.float64) - np.asarray(second, np.float64)) / np.asarray(spread, np.float64)
    return np.sqrt((scaled**2).mean(-1))


def masked_distance(first: NDArray, second: NDArray, mask: NDArray[np.bool_]) -> Array:
    """(B,) mean absolute difference of (B,3,H,W) uint8 images where the (H,W) mask is True; 0..255."""
    difference = np.abs(np.asarray(first)[..., mask].astype(np.int16) - np.asarray(second)[..., mask])
    return difference.mean((1, 2))


def face_ellipse(size: int, alignment: str) -> NDArray[np.bool_]:
    """(H,W) True inside the fixed ellipse that covers a face, forehead to chin, in an aligned crop of `size` px.

    In units of the distance between the eyes of the template: half width 1.2, half height 1.5, its centre 0.45 below
    the eyes.
    """
    from anonfw.align import template

    points = template(alignment, size)
    eyes = points[:2].mean(0)
    unit = float(np.linalg.norm(points[1] - points[0]))
    y, x = np.mgrid[:size, :size].astype(np.float64)
    return ((x - eyes[0]) / (1.2 * unit)) ** 2 + ((y - eyes[1] - 0.45 * unit) / (1.5 * unit)) ** 2 <= 1.0
