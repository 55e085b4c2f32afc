"""Captions from measurements: what a sentence can say of a face whose pose, expression, age and sex were estimated.

The wording of age and sex is that of reverse personalization's attribute prompts, so that a model trained on such
captions understands them: "30-year-old woman, smiling, looking left". A clause is there only where the measurement is
clear; a mirrored picture has a caption of its own.

`SHARD.captions.json` beside a shard, written by `embed --captions`, holds the distinct sentences once:
    {"tar_sha256": ..., "captions": [sentences], "rows": [[number of the sentence, of the mirrored picture's], ...]}
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from anonfw.data.card import Card, DataError, Shard
from anonfw.data.files import write_json

# factor: (below this, the clause), (above that, the clause); `anonfw.attributes` has the units. About a fifth to two
# fifths of the synthetic people get each of them.
CLAUSES: dict[str, tuple[tuple[float, str], tuple[float, str]]] = {
    "smile": ((0.9, "neutral"), (1.08, "smiling")),
    "mouth_open": ((-math.inf, ""), (0.2, "mouth open")),
    "eye_open": ((0.2, "eyes closed"), (math.inf, "")),
    "yaw": ((-7.0, "looking left"), (7.0, "looking right")),
    "pitch": ((-11.0, "looking down"), (-1.0, "looking up")),
    "brightness": ((0.42, "dark"), (0.63, "light")),
}
SURE = 0.8  # probability from which a sex is named


def describe(factors: Mapping[str, float], age: float | None = None, female: float | None = None) -> str:
    """The caption of one picture.

    Args:
        factors: as `anonfw.attributes` measures them; absent or NaN says nothing.
        age: years. female: probability in [0,1]. None where not estimated.
    """
    from anonfw.reverse_personalization import attribute_prompt

    sex = None if female is None or 1 - SURE < female < SURE else ("female" if female >= SURE else "male")
    years = None if age is None or not math.isfinite(age) else round(age)
    clauses = [attribute_prompt(years, sex) or "person"]
    for name, ((low, below), (high, above)) in CLAUSES.items():
        value = factors.get(name, math.nan)
        clauses += [below] if value < low else [above] if value > high else []
    return ", ".join(clauses)


def mirrored(factors: Mapping[str, float]) -> dict[str, float]:
    """The factors of the mirrored picture."""
    from anonfw.data.side import MIRRORED_FACTORS

    return {name: -value if name in MIRRORED_FACTORS else value for name, value in factors.items()}


def captions_path(tar: Path) -> Path:
    return tar.with_name(f"{tar.name.removesuffix('.tar')}.captions.json")


def save_captions(folder: Path, shard: Shard, captions: Sequence[tuple[str, str]]) -> None:
    """Write a shard's captions: for each sample the picture's and the mirrored picture's."""
    distinct = sorted({caption for both in captions for caption in both})
    number = {caption: place for place, caption in enumerate(distinct)}
    rows = [[number[one], number[other]] for one, other in captions]
    value = {"tar_sha256": shard.sha256, "captions": distinct, "rows": rows}
    write_json(captions_path(folder / shard.file), value, indent=None)


def write_captions(
    folder: Path, card: Card, shards: Sequence[Shard], batch_size: int, advance: Callable[[int], object]
) -> int:
    """Describe the pictures of the shards that have no valid captions yet, and say how many shards these were.

    Pose and expression come from the shards' factors, age and sex from `anonfw.demographics`. A broken picture's
    caption is empty.
    """
    from anonfw.data.index import open_index
    from anonfw.data.pictures import pictures
    from anonfw.demographics import Demographics

    demographics, done = None, 0
    for shard in shards:
        if _is_there(folder, shard):
            advance(shard.samples)
            continue
        demographics = demographics or Demographics()
        index = open_index(folder / shard.file, shard)
        names = [name.decode() for name in index.factor_names.tolist()]
        captions = [("", "")] * shard.samples
        for rows, images in pictures(folder, card, shard, batch_size, advance):
            found = demographics(images, card.alignment)
            people = zip(rows.tolist(), found["age"].tolist(), found["female"].tolist(), strict=True)
            for row, age, female in people:
                factors = dict(zip(names, index.factors[row].tolist(), strict=True))
                captions[row] = describe(factors, age, female), describe(mirrored(factors), age, female)
        save_captions(folder, shard, captions)
        done += 1
    return done


def _is_there(folder: Path, shard: Shard) -> bool:
    try:
        Captions(folder, [shard])
    except DataError:
        return False
    return True


class Captions:
    """The captions of a split's shards.

    Raises:
        DataError: missing or damaged for a shard, or made from another version of it.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        remedy = f"Run: python -m anonfw embed {folder} --captions"
        self.distinct: list[list[str]] = []
        self.numbers: list[np.ndarray] = []
        for shard in shards:
            path = captions_path(folder / shard.file)
            if not path.is_file():
                raise DataError(f"{folder} has no captions for {shard.file}. {remedy}")
            try:
                value = json.loads(path.read_text(encoding="utf-8"))
                rows = np.array(value["rows"], np.int32).reshape(-1, 2)
                distinct, tar = list(value["captions"]), value["tar_sha256"]
            except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path} is damaged ({error}). Delete it. {remedy}") from error
            if tar != shard.sha256 or len(rows) != shard.samples:
                raise DataError(f"{path} was made from another version of {shard.file}. {remedy}")
            if rows.size and not 0 <= rows.min() <= rows.max() < len(distinct):
                raise DataError(f"{path} names sentences that it does not have. Delete it. {remedy}")
            self.distinct.append(distinct)
            self.numbers.append(rows)

    def of(self, shard: np.ndarray, row: np.ndarray, mirrored: np.ndarray) -> list[str]:
        """(n,) shard numbers, rows inside them and mirroring -> n captions."""
        numbers = self.number(shard, row, mirrored)
        return [self.distinct[s][number] for s, number in zip(shard.tolist(), numbers.tolist(), strict=True)]

    def number(self, shard: np.ndarray, row: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        """(n,) number of each caption among the distinct ones of its shard."""
        found = np.empty(len(shard), np.int64)
        for one in np.unique(shard):
            here = shard == one
            found[here] = self.numbers[one][row[here], mirrored[here].astype(np.int64)]
        return found
