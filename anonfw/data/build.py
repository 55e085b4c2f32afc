"""From photographs to a data set: each photo is read, its face found and aligned, and the crop encoded.

`workers` processes do it; the people come back in order and go to the writer. So the result does not depend on the
number of workers, and a killed run continues where its last finished shard ends.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from anonfw.align import similarity, template, transform_points, warp
from anonfw.data.card import CARD_NAME, Card, DataError
from anonfw.data.writer import DatasetWriter, Sample

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
SKIPPED = "skipped.jsonl"
UNDER_WAY = 64  # people that may wait for the writer: bounds memory


@dataclass(frozen=True)
class Person:
    """An identity and its photographs, in the order in which they shall lie in the shard."""

    name: str
    photos: tuple[Path, ...]


@dataclass(frozen=True)
class Recipe:
    """How a photo becomes a sample.

    Attributes:
        size: side of the crop in pixels.
        alignment: `arcface` or `portrait`.
        aligned: the photos are crops of this alignment already: only resized, with the template as landmarks.
        quality: of the JPEG.
        factors: measure pose, expression and brightness on the crop (`anonfw.attributes`).
        threshold: lowest score of a face.
    """

    size: int = 112
    alignment: str = "arcface"
    aligned: bool = False
    quality: int = 95
    factors: bool = False
    threshold: float = 0.5


@dataclass(frozen=True)
class Skipped:
    """A photo without a usable face, and why."""

    photo: str
    reason: str


def split_of(identity: str, splits: Mapping[str, float], seed: int) -> str:
    """The split of a person: a hash of seed and name against the cumulated shares. So it never changes with the data.

    Args:
        splits: name -> share; normalised to a sum of 1.
    """
    digest = hashlib.sha256(f"{seed}:{identity}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(splits.values())
    for name, share in splits.items():
        if place < share:
            return name
        place -= share
    return next(reversed(splits))


def key_of(identity: str, number: int) -> str:
    """Shard key of a person's photo: readable where the name allows it, unique in any case."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", identity)[:60]
    if plain != identity:
        plain += "-" + hashlib.sha256(identity.encode()).hexdigest()[:8]
    return f"{plain}_{number:04d}"


class Cropper:
    """Photo files to samples. Detector and estimators are made when they are first needed."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self._detector = self._attributes = None

    def sample(self, path: Path, key: str) -> Sample | Skipped:
        """The aligned crop of a photo's main face (large and central), or why there is none."""
        import cv2
        import simplejpeg

        recipe = self.recipe
        stored = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR) if path.stat().st_size else None
        if stored is None:
            return Skipped(str(path), "not a readable picture")
        image = np.ascontiguousarray(stored[..., ::-1])
        if recipe.aligned:
            height, width = image.shape[:2]
            if height != width:
                return Skipped(str(path), f"{width} x {height} px is no aligned crop: it is not square")
            points = template(recipe.alignment, recipe.size)
            method = cv2.INTER_AREA if width > recipe.size else cv2.INTER_CUBIC
            crop = image if width == recipe.size else cv2.resize(image, (recipe.size,) * 2, interpolation=method)
        else:
            if min(image.shape[:2]) < 16:
                return Skipped(str(path), "smaller than 16 px")
            landmarks = self._main_face(image)
            if landmarks is None:
                return Skipped(str(path), "no face found")
            matrix = similarity(landmarks, template(recipe.alignment, recipe.size))
            crop = warp(image, matrix, recipe.size)
            points = transform_points(landmarks, matrix)
        jpeg = simplejpeg.encode_jpeg(
            np.ascontiguousarray(crop), recipe.quality, colorspace="RGB", colorsubsampling="420"
        )
        return Sample(key, jpeg, points, self._measure(crop, points))

    def _main_face(self, image: np.ndarray) -> np.ndarray | None:
        if self._detector is None:
            from anonfw.detect import Detector

            self._detector = Detector()
        faces = self._detector.detect(image, self.recipe.threshold)
        if not len(faces):
            return None
        sides = faces.boxes[:, 2:] - faces.boxes[:, :2]
        away = (faces.boxes[:, :2] + faces.boxes[:, 2:]) / 2 - np.array(image.shape[1::-1]) / 2
        return faces.landmarks[int(np.argmax(np.prod(sides, 1) - 2.0 * (away**2).sum(1)))]

    def _measure(self, crop: np.ndarray, points: np.ndarray) -> dict[str, float]:
        if not self.recipe.factors:
            return {}
        if self._attributes is None:
            from anonfw.attributes import Attributes

            self._attributes = Attributes()
        measured = self._attributes.measure(crop, points)
        return {name: value for name, value in measured.items() if np.isfinite(value)}

    def person(self, person: Person) -> tuple[list[Sample], list[Skipped]]:
        """All photos of a person."""
        results = [self.sample(photo, key_of(person.name, i + 1)) for i, photo in enumerate(person.photos)]
        samples = [result for result in results if isinstance(result, Sample)]
        return samples, [result for result in results if isinstance(result, Skipped)]


_cropper: Cropper | None = None  # of a worker process


def _start_worker(recipe: Recipe) -> None:
    global _cropper
    _cropper = Cropper(recipe)


def _crop(person: Person) -> tuple[list[Sample], list[Skipped]]:
    return _cropper.person(person)


def crops(
    people: Sequence[Person], recipe: Recipe, workers: int
) -> Iterator[tuple[Person, list[Sample], list[Skipped]]]:
    """Every person with its samples, in the given order. With 0 or 1 workers in this process."""
    if workers <= 1:
        cropper = Cropper(recipe)
        for person in people:
            yield person, *cropper.person(person)
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe,)) as pool:
        waiting = []
        try:
            for person in people:
                waiting.append((person, pool.submit(_crop, person)))
                if len(waiting) >= UNDER_WAY:
                    first, future = waiting.pop(0)
                    yield first, *future.result()
            for person, future in waiting:
                yield person, *future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def build(
    out: Path,
    people: Sequence[Person],
    recipe: Recipe,
    *,
    name: str,
    source: str,
    licence: str,
    splits: Mapping[str, float],
    seed: int,
    workers: int = 0,
    shard_samples: int = 4096,
    progress: bool = True,
) -> dict[str, int]:
    """Write the data set. People already in finished shards are not done again.

    Returns:
        counts of identities, samples and skipped photos of this run (skipped ones stand in `skipped.jsonl`).
    Raises:
        DataError: no people, or the folder holds another data set.
    """
    from tqdm import tqdm

    if not people:
        raise DataError(f"no photographs for {name}: nothing to write")
    about = {"splits": dict(splits), "seed": seed, "crop": vars(recipe)}
    if (Path(out) / CARD_NAME).exists():
        before = Card.load(Path(out), complete=False).about
        if before != about:
            raise DataError(f"{out} was begun with other settings: {before}, now {about}. Choose another folder.")
    counts = {"identities": 0, "samples": 0, "skipped": 0}
    with DatasetWriter(
        out,
        name=name,
        image_size=recipe.size,
        alignment=recipe.alignment,
        source=source,
        licence=licence,
        shard_samples=shard_samples,
        about=about,
    ) as writer:
        todo = [person for person in people if not writer.done(person.name)]
        with (
            open(Path(out) / SKIPPED, "a+", encoding="utf-8") as log,
            tqdm(total=sum(len(person.photos) for person in todo), unit="photo", disable=not progress) as bar,
        ):
            log.seek(0)
            kept = log.read().rpartition("\n")  # by a run that was killed: its last line may be half a line
            log.truncate(len(f"{kept[0]}{kept[1]}".encode()))
            listed = {json.loads(line)["photo"] for line in kept[0].splitlines()}
            for person, samples, skipped in crops(todo, recipe, workers):
                for item in skipped:
                    if item.photo not in listed:
                        log.write(json.dumps(vars(item), ensure_ascii=False) + "\n")
                log.flush()  # before the person can be in a finished shard: it is not looked at again then
                if samples:
                    writer.add_identity(split_of(person.name, splits, seed), person.name, samples)
                counts["identities"] += bool(samples)
                counts["samples"] += len(samples)
                counts["skipped"] += len(skipped)
                bar.update(len(person.photos))
    return counts


def folder_people(folder: Path) -> list[Person]:
    """A folder an identity: sub-folders by name, and in each its pictures by name.

    Raises:
        DataError: there is no such folder, or no picture in any sub-folder.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; expected {folder}/PERSON/PHOTO.jpg")
    people = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        photos = tuple(sorted(path for path in place.iterdir() if path.suffix.lower() in PICTURES))
        if photos:
            people.append(Person(place.name, photos))
    if not people:
        raise DataError(f"{folder} has no sub-folder with pictures ({', '.join(PICTURES)}); expected PERSON/PHOTO.jpg")
    return people
