"""Clips of people who do not exist: one shot each, in which head and face move. A data set of data/SCHEMA.md.

    python data/synthetic_clips.py CLIPS --clips 20 --frames 16 --workers 2

A clip is an identity of the data set, its frames lie in order, all in the split `test`. The people come from another
seed than the embedded ones and resemble none of them (the same bounds as between those). Pose, mouth, smile and eyes
swing smoothly along the directions of data/synthetic_directions.npz; light and background stay. A clip with a frame in
which a recogniser loses the person is thrown away. Needs `pip install anonfw[faces]`.
"""

from __future__ import annotations

import numpy as np
from synthetic_people import SOURCE, Series, ended, parser, write
from synthetic_studio import RECOGNISERS

SEED = 2


def embedded_people() -> list[np.ndarray]:
    """(2,512) unit vectors of everybody in the data set that comes with the package."""
    import torch

    from anonfw.data.card import Card
    from anonfw.data.embeddings import load_embeddings
    from anonfw.data.table import local_folder
    from anonfw.identity.bank import centres_of

    people = []
    for split in Card.load(local_folder("embedded")).splits():
        parts = []
        for name in RECOGNISERS:
            vectors, person = load_embeddings("embedded", split, name)
            names = [str(number) for number in range(person.max() + 1)]
            parts.append(centres_of(torch.from_numpy(vectors), torch.from_numpy(person), names).numpy())
        people += list(np.stack(parts, axis=1))
    return people


CLIPS = Series(
    "clips",
    take="clip",
    missing=0,
    split=lambda _: "test",
    source=SOURCE.replace("synthetic_people", "synthetic_clips"),
    known=embedded_people,
)


def main() -> int:
    made = parser(
        "Make clips of people who do not exist, as a data set of data/SCHEMA.md.",
        ("--clips", 20, "a larger number later adds clips"),
        ("--frames", 16, "of each clip"),
    )
    made.set_defaults(seed=SEED)
    args = made.parse_args()
    return ended("synthetic_clips", lambda: write(args, CLIPS))


if __name__ == "__main__":
    raise SystemExit(main())
