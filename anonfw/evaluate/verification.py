"""Verification within one set of photographs: genuine pairs, and accuracy as on LFW (threshold from the other folds).

Legend: N photos, D embedding width, M pairs. Embeddings have unit norm.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anonfw.evaluate.protocols import Array

FOLDS = 10


def genuine_pairs(identity: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(M,) and (M,): the rows of all pairs of photos of one person, each pair once, person by person."""
    identity = np.asarray(identity)
    order = np.argsort(identity, kind="stable")
    first, second = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for rows in np.split(order, np.flatnonzero(np.diff(identity[order])) + 1):
        i, j = np.triu_indices(len(rows), 1)
        first.append(rows[i])
        second.append(rows[j])
    return np.concatenate(first), np.concatenate(second)


def cosines(embeddings: Array, first: NDArray, second: NDArray) -> Array:
    """(M,) of the pairs."""
    return np.einsum("md,md->m", embeddings[first], embeddings[second])


def fold_accuracy(
    embeddings: Array, identity: ArrayLike, seed: int = 0, folds: int = FOLDS
) -> tuple[Array, NDArray, int]:
    """Accuracy of "same person?" with a threshold that is chosen on the other folds.

    The folds share no person. Each has all its genuine pairs and as many pairs of different people of the fold, drawn
    at random from `seed`, so that chance is 50 %. A pair is accepted when its cosine is greater than the threshold.

    Returns:
        (M,) 1.0 where the decision is right, the (M,) person of each pair (the first photo's), and the folds used:
        fewer where there are fewer than two people with two photos a fold. No pairs where not even two folds are full.
    """
    embeddings, identity = np.asarray(embeddings, np.float32), np.asarray(identity)
    rng = np.random.default_rng(seed)
    people, count = np.unique(identity, return_counts=True)
    several = people[count >= 2]
    folds = min(folds, len(several) // 2)
    if folds < 2:
        return np.zeros(0), np.zeros(0, identity.dtype), 0
    fold_of = np.empty(len(several), np.int64)
    fold_of[rng.permutation(len(several))] = np.arange(len(several)) % folds
    scores, truth, person, fold = [], [], [], []
    for number in range(folds):
        rows = np.flatnonzero(np.isin(identity, several[fold_of == number]))
        first, second = (rows[pair] for pair in genuine_pairs(identity[rows]))
        other_first, other_second = _impostor_pairs(identity[rows], len(first), rng)
        first, second = np.append(first, rows[other_first]), np.append(second, rows[other_second])
        scores.append(cosines(embeddings, first, second))
        truth.append(identity[first] == identity[second])
        person.append(identity[first])
        fold.append(np.full(len(first), number))
    score, same, fold_number = map(np.concatenate, (scores, truth, fold))
    right = np.empty(len(score))
    for number in range(folds):
        here = fold_number == number
        threshold = best_threshold(score[~here], same[~here])
        right[here] = (score[here] > threshold) == same[here]
    return right, np.concatenate(person), folds


def best_threshold(scores: Array, same: NDArray[np.bool_]) -> float:
    """The threshold with the most right decisions `score > threshold`: amid the lowest gap between scores that has."""
    order = np.argsort(scores, kind="stable")
    scores, same = scores[order], same[order]
    # Rejecting the first k pairs: right are the impostors among them and the genuine ones behind them.
    right = np.append(0, np.cumsum(~same)) + np.append(np.cumsum(same[::-1])[::-1], 0)
    possible = np.append(True, np.append(scores[1:] > scores[:-1], True))  # equal scores fall together
    k = int(np.argmax(np.where(possible, right, -1)))
    if k in (0, len(scores)):
        return np.inf if k else -np.inf
    return (float(scores[k - 1]) + float(scores[k])) / 2


def _impostor_pairs(identity: NDArray, count: int, rng: np.random.Generator) -> tuple[NDArray, NDArray]:
    """`count` random pairs of rows of different people, of which there are at least two."""
    first, second = [], []
    missing = count
    while missing > 0:
        pair = rng.integers(0, len(identity), (2, 2 * missing + 8))
        pair = pair[:, identity[pair[0]] != identity[pair[1]]][:, :missing]
        first.append(pair[0])
        second.append(pair[1])
        missing -= pair.shape[1]
    return np.concatenate(first), np.concatenate(second)
