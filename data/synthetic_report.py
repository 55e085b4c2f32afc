"""How good a data set of synthetic people is: `python data/synthetic_people.py OUT --report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from anonfw.data.card import Card
from anonfw.data.embeddings import sidecar_path
from anonfw.data.index import open_index

FACTORS = ("yaw", "pitch", "roll", "mouth_open", "smile", "eye_open", "brow_raise", "brightness")
RECOGNISERS = ("arcface_mbf", "edgeface_s")


@dataclass
class Rows:
    """A data set as columns: person and split (n,), factors (n,F), unit vectors (n,D), JPEGs' places."""

    person: np.ndarray
    split: np.ndarray
    factors: np.ndarray
    vectors: dict[str, np.ndarray]
    places: list[tuple[Path, int, int]]


def read(folder: Path) -> Rows:
    """All columns of a data set with both sidecars.

    Raises:
        DataError: no finished data set there.
    """
    card = Card.load(folder)
    person, split, factors, places = [], [], [], []
    vectors: dict[str, list[np.ndarray]] = {name: [] for name in RECOGNISERS}
    people = 0
    for shard in card.shards:
        tar = folder / shard.file
        index = open_index(tar, shard)
        names = [name.decode() for name in index.factor_names.tolist()]
        person.append(index.person + people)
        people += len(index.names)
        split += [shard.split] * len(index)
        factors.append(index.factors[:, [names.index(name) for name in FACTORS]])
        places += [(tar, int(offset), int(size)) for offset, size in zip(index.offset, index.size, strict=True)]
        for name in RECOGNISERS:
            rows = np.load(sidecar_path(tar, name)).astype(np.float32)
            vectors[name].append(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    stacked = {name: np.concatenate(rows) for name, rows in vectors.items()}
    return Rows(np.concatenate(person), np.array(split), np.concatenate(factors), stacked, places)


def pair_cosines(vectors: np.ndarray, person: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines of all pairs of one person and of all pairs of two people: (n,D), (n,) -> (g,), (i,)."""
    genuine, impostor = [], []
    for i in range(len(vectors) - 1):
        cosine = vectors[i + 1 :] @ vectors[i]
        same = person[i + 1 :] == person[i]
        genuine.append(cosine[same])
        impostor.append(cosine[~same])
    return np.concatenate(genuine), np.concatenate(impostor)


def verification(genuine: np.ndarray, impostor: np.ndarray, rate: float) -> tuple[float, float]:
    """(share of genuine pairs accepted, threshold) where `rate` of the impostor pairs are accepted."""
    threshold = float(np.quantile(impostor, 1 - rate))
    return float((genuine > threshold).mean()), threshold


def report(folder: Path) -> str:
    """The set's quality as text."""
    rows = read(folder)
    lines = [f"{folder.name}: {len(rows.person)} photos of {rows.person.max() + 1} people"]
    for split in sorted(set(rows.split.tolist())):
        inside = rows.split == split
        lines.append(f"  {split:5s} {inside.sum():5d} photos, {len(np.unique(rows.person[inside])):4d} people")
    lines += ["", "cosines, all pairs          pairs      mean    5 %   95 %    min    max"]
    for name, vectors in rows.vectors.items():
        genuine, impostor = pair_cosines(vectors, rows.person)
        for kind, cosine in (("genuine", genuine), ("impostor", impostor)):
            low, high = np.percentile(cosine, [5, 95])
            numbers = f"{cosine.mean():6.3f} {low:6.3f} {high:6.3f} {cosine.min():6.3f} {cosine.max():6.3f}"
            lines.append(f"  {name:12s} {kind:9s} {len(cosine):9d}    {numbers}")
        for rate in (1e-2, 1e-3):
            accepted, threshold = verification(genuine, impostor, rate)
            lines.append(f"  {name:12s} TPR {accepted:.4f} at FPR {rate:g} (threshold {threshold:.3f})")
    spread = np.array([rows.factors[rows.person == p].std(0) for p in np.unique(rows.person)])
    span = np.array([np.ptp(rows.factors[rows.person == p], axis=0) for p in np.unique(rows.person)])
    lines += ["", "factor        mean   deviation   within a person: deviation   range (median)"]
    for j, name in enumerate(FACTORS):
        values = rows.factors[:, j]
        within = f"{spread[:, j].mean():20.3f} {np.median(span[:, j]):18.3f}"
        lines.append(f"  {name:12s} {values.mean():7.3f} {values.std():7.3f} {within}")
    return "\n".join(lines)


def contact_sheet(folder: Path, picture: Path, people: int = 6, photos: int = 6) -> None:
    """Write a picture with a row of photos for each of the first test people."""
    import cv2

    rows = read(folder)
    chosen = [p for p in np.unique(rows.person[rows.split == "test"]) if (rows.person == p).sum() >= photos]
    sheet = []
    for p in chosen[:people]:
        images = []
        for row in np.flatnonzero(rows.person == p)[:photos]:
            tar, offset, size = rows.places[row]
            with open(tar, "rb") as file:
                file.seek(offset)
                images.append(cv2.imdecode(np.frombuffer(file.read(size), np.uint8), cv2.IMREAD_COLOR))
        sheet.append(np.concatenate(images, axis=1))
    half = (len(sheet) + 1) // 2
    columns = [np.concatenate(sheet[:half]), np.concatenate(sheet[half : 2 * half])] if len(sheet) > 1 else sheet
    height = min(len(column) for column in columns)
    joined = np.concatenate([column[:height] for column in columns], axis=1)
    encoded = cv2.imencode(picture.suffix, joined)[1].tobytes()
    partial = picture.with_name(picture.name + ".partial")
    partial.write_bytes(encoded)
    partial.replace(picture)
