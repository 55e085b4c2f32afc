"""Fits the directions that data/synthetic_people.py moves people along, and writes data/synthetic_directions.npz.

    python data/synthetic_directions.py            # 700 samples: about four minutes on two cores

Faces of random styles are rendered and measured. With u the style in whitened coordinates, beta_j the ridge regression
of factor j on u and B that of both recognisers' embeddings, direction j is the shortest move, counting what it does to
the embeddings, that changes factor j by one standard deviation and every other factor by nothing:

    minimise d' (I + c B B') d   subject to   beta' d = e_j,   c = 512 / trace(B B')
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np
from synthetic_studio import DIRECTIONS, LAYERS, Studio

from anonfw.align import similarity, template, warp
from anonfw.attributes import FACTORS

SEED = 12345
TRUNCATION = 0.8
STYLES = 5000  # for mean and covariance of the style
PENALTIES = (10, 30, 100, 300, 1000)
EMBEDDING_PENALTY = 300
LIGHT = ("side", "warm", "contrast", "top")  # controls: measured so that the directions leave them alone


def light(crop: np.ndarray) -> list[float]:
    """`LIGHT` of a (112,112,3) uint8 arcface crop: right minus left, red minus blue, deviation, upper minus lower."""
    face = crop[40:95, 25:87].astype(np.float64) / 255
    luma = face @ [0.299, 0.587, 0.114]
    warm = (face[..., 0] - face[..., 2]).mean()
    return [luma[:, 31:].mean() - luma[:, :31].mean(), warm, luma.std(), luma[:27].mean() - luma[27:].mean()]


def measure(studio: Studio, style: np.ndarray) -> tuple[list[float], np.ndarray] | None:
    """(factors and light, (1024,) embeddings) of a (512,) style; None where there is no face."""
    image = studio.generator.render(np.repeat(style[None], LAYERS, axis=0))
    faces = studio.detector.detect(image)
    if not len(faces):
        return None
    points = faces.landmarks[0]
    crop = warp(image, similarity(points, template("arcface", 112)), 112)
    blob = ((crop.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]
    vectors = [session.run(None, {session.get_inputs()[0].name: blob})[0][0] for session in studio.recognisers]
    factors = studio.attributes.measure(image, points)
    unit = [vector / np.linalg.norm(vector) for vector in vectors]
    return [*(factors[name] for name in FACTORS), *light(crop)], np.concatenate(unit)


def ridge(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """(n,p), (n,q) -> (p,q)."""
    return np.linalg.solve(inputs.T @ inputs + penalty * np.eye(inputs.shape[1]), inputs.T @ targets)


def explained(inputs: np.ndarray, targets: np.ndarray, penalty: float) -> np.ndarray:
    """(q,) share of the variance of standardised targets that 5-fold cross-validated ridge explains."""
    fold = np.arange(len(inputs)) % 5
    errors = np.empty_like(targets)
    for k in range(5):
        fitted = ridge(inputs[fold != k], targets[fold != k], penalty)
        errors[fold == k] = inputs[fold == k] @ fitted - targets[fold == k]
    return 1 - (errors**2).mean(0)


def fit(all_styles: np.ndarray, styles: np.ndarray, factors: np.ndarray, embeddings: np.ndarray) -> dict:
    """Arrays of the file: `directions` and `predictors` (F,512), `mean` (512,), `factor_mean`/`_deviation` (F,).

    `predictors @ (style - mean)` predicts the factors in standard deviations.
    """
    mean = all_styles.mean(0)
    values, axes = np.linalg.eigh(np.cov((all_styles - mean).T))
    values = values[::-1] + 1e-3 * values[-1]
    axes = axes[:, ::-1]
    whiten = axes / np.sqrt(values)  # style - mean -> u
    colour = (axes * np.sqrt(values)).T  # u -> style - mean
    u = (styles - mean) @ whiten
    factor_mean, deviation = factors.mean(0), factors.std(0)
    targets = (factors - factor_mean) / deviation
    penalty = max(PENALTIES, key=lambda value: explained(u, targets, value).mean())
    for name, share in zip([*FACTORS, *LIGHT], explained(u, targets, penalty), strict=True):
        print(f"{name:12s} {share:5.2f} of the variance is linear in the style (cross-validated)")
    beta = ridge(u, targets, penalty)
    identity = ridge(u, embeddings - embeddings.mean(0), EMBEDDING_PENALTY)
    cost = identity @ identity.T
    metric = np.eye(512) + 512 / np.trace(cost) * cost
    shortest = np.linalg.solve(metric, beta)
    return {
        "directions": ((shortest @ np.linalg.inv(beta.T @ shortest)).T @ colour).astype(np.float32),
        "predictors": (whiten @ beta).T.astype(np.float32),
        "mean": mean.astype(np.float32),
        "names": np.array([*FACTORS, *LIGHT]),
        "factor_mean": factor_mean,
        "factor_deviation": deviation,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit the directions of data/synthetic_people.py.")
    parser.add_argument("--samples", type=int, default=700, help="rendered faces (default 700)")
    parser.add_argument("--out", type=Path, default=DIRECTIONS, help="default: beside this script")
    args = parser.parse_args()
    studio = Studio(threads=os.cpu_count() or 1)
    rng = np.random.default_rng(SEED)
    all_styles = np.stack([studio.generator.style(rng) for _ in range(STYLES)])
    mean = all_styles.mean(0)
    styles, rows = [], []
    for i, style in enumerate(all_styles[: args.samples]):
        near = mean + TRUNCATION * (style - mean)
        if (row := measure(studio, near)) is not None:
            styles.append(near)
            rows.append(row)
        print(f"\r{i + 1}/{args.samples} faces ", end="", flush=True)
    print()
    factors, embeddings = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    partial = args.out.with_name(args.out.name + ".partial.npz")
    np.savez_compressed(partial, **fit(all_styles, np.array(styles), factors, embeddings))
    os.replace(partial, args.out)


if __name__ == "__main__":
    main()
