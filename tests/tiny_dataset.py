"""Small data sets for the tests of shards and loader: pictures that differ from each other, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from anonfw.data.writer import DatasetWriter, Sample

SIZE = 32
WEIGHTS = "a" * 64  # sha256 of an encoder that never was
ENCODER = "tiny_encoder"


def picture(seed: int, size: int = SIZE) -> np.ndarray:
    """(size,size,3) uint8: smooth, and another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return cv2.resize(noise, (size, size), interpolation=cv2.INTER_LINEAR)


def jpeg(seed: int, size: int = SIZE) -> bytes:
    return simplejpeg.encode_jpeg(picture(seed, size), 95, colorspace="RGB")


def embedding(seed: int, dim: int = 8) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(dim)
    return vector / np.linalg.norm(vector)


def people(count: int, photos: int | list[int] = 3, first: int = 0) -> list[tuple[str, list[Sample]]]:
    """`photos` samples each, or as many as the list says in turn. Number s of the data set has yaw s and pitch -s."""
    made, seed = [], 1000 * first
    for number in range(first, first + count):
        samples = []
        for photo in range(photos if isinstance(photos, int) else photos[number % len(photos)]):
            landmarks = np.array([[8, 10], [22, 11], [15, 17], [9, 25], [21, 26]]) + 0.01 * seed
            factors = {"yaw": seed + 1, "pitch": -seed - 1, "smile": 0.5}
            sample = Sample(f"p{number:03d}_{photo}", jpeg(seed), landmarks, factors, {ENCODER: embedding(seed)})
            samples.append(sample)
            seed += 1
        made.append((f"person {number}", samples))
    return made


def write(
    folder: Path,
    train: int = 10,
    val: int = 4,
    photos: int | list[int] = 3,
    shard_samples: int = 8,
    name: str = "tiny",
    first: int = 0,
) -> Path:
    """A data set with `train` and `val` people and sidecars of ENCODER."""
    with DatasetWriter(
        folder,
        name=name,
        image_size=SIZE,
        alignment="arcface",
        source="noise",
        licence="none",
        shard_samples=shard_samples,
        sidecars={ENCODER: WEIGHTS},
    ) as writer:
        for number, (identity, samples) in enumerate(people(train + val, photos, first)):
            writer.add_identity("train" if number < train else "val", identity, samples)
    return folder
