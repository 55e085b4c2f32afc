"""From a published set of aligned crops to a data set of data/SCHEMA.md.

A JPEG of the right size goes into the shard byte for byte, after it was decoded once to see that it is whole; any other
picture is decoded, resized and encoded. Worker processes do it, the people come back in order, at most `UNDER_WAY`
pictures are in memory. So the result does not depend on the number of workers, and a killed run continues.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from anonfw.align import template
from anonfw.data.build import SKIPPED, Skipped, key_of, split_of
from anonfw.data.card import CARD_NAME, Card, DataError
from anonfw.data.parts import Part
from anonfw.data.sources import STAGE, Group, Groups, Source
from anonfw.data.writer import DatasetWriter, Sample

UNDER_WAY = 4096  # pictures that may wait for the writer
Outcome = tuple[list[Sample], list[Skipped]]


@dataclass(frozen=True)
class Crop:
    """How a picture becomes a sample.

    Attributes:
        size: side of the crop in pixels. The pictures are crops of the `arcface` alignment.
        quality: of the JPEG, where the picture is none of this size already.
        factors: measure pose, expression and brightness (`anonfw.attributes`).
    """

    size: int = 112
    quality: int = 95
    factors: bool = False


class Worker:
    """People to samples. It goes to worker processes whole; estimators are made when they are first needed."""

    def __init__(self, source: Source, crop: Crop) -> None:
        self.reader, self.judge, self.crop = source.reader, source.judge, crop
        self.points = template("arcface", crop.size)
        self._attributes = None

    def person(self, group: Group) -> Outcome:
        """All pictures of a person."""
        pictures = [self.reader.read(place) for place in group.places]
        samples, skipped = [], []
        verdicts = self.judge(group.photos, pictures)
        for number, (photo, picture, verdict) in enumerate(zip(group.photos, pictures, verdicts, strict=True), 1):
            result = verdict if isinstance(verdict, str) else self._crop(picture)
            if isinstance(result, str):
                skipped.append(Skipped(photo, result))
                continue
            jpeg, image = result
            factors = {**verdict, **self._measure(image)}
            samples.append(Sample(key_of(group.name, number), jpeg, self.points, factors))
        return samples, skipped

    def _crop(self, picture: bytes) -> tuple[bytes, np.ndarray] | str:
        """The JPEG for the shard and its RGB pixels, or why there is none."""
        import simplejpeg

        size = self.crop.size
        if picture[:2] == b"\xff\xd8":
            try:
                height, width, colours, _ = simplejpeg.decode_jpeg_header(picture)
                if max(height, width) > 16384:  # a damaged header must not take all memory
                    return f"its JPEG claims {width} x {height} px"
                image = simplejpeg.decode_jpeg(picture, "RGB")
            except ValueError:
                return "its JPEG is broken"
            if (height, width) == (size, size) and colours != "Gray":
                return picture, image
        else:
            image = _decode(picture)
            if image is None:
                return "not a readable picture"
        height, width = image.shape[:2]
        if height != width:
            return f"{width} x {height} px is no aligned crop: it is not square"
        image = _resize(image, size)
        return simplejpeg.encode_jpeg(image, self.crop.quality, colorspace="RGB", colorsubsampling="420"), image

    def _measure(self, image: np.ndarray) -> dict[str, float]:
        if not self.crop.factors:
            return {}
        if self._attributes is None:
            from anonfw.attributes import Attributes

            self._attributes = Attributes()
        measured = self._attributes.measure(image, self.points)
        return {name: value for name, value in measured.items() if np.isfinite(value)}


def _decode(picture: bytes) -> np.ndarray | None:
    """(h,w,3) RGB of a PNG, WebP or BMP; None if it is none. `picture` may be anything."""
    import cv2

    if not picture:
        return None
    try:
        stored = cv2.imdecode(np.frombuffer(picture, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # sizes beyond OpenCV's limit
        return None
    return None if stored is None else np.ascontiguousarray(stored[..., ::-1])


def _resize(image: np.ndarray, size: int) -> np.ndarray:
    import cv2

    if image.shape[0] == size:
        return np.ascontiguousarray(image)
    method = cv2.INTER_AREA if image.shape[0] > size else cv2.INTER_CUBIC
    return cv2.resize(image, (size, size), interpolation=method)


_worker: Worker | None = None  # of a worker process


def _start(worker: Worker) -> None:
    global _worker
    _worker = worker


def _person(group: Group) -> Outcome:
    return _worker.person(group)


def _outcomes(groups: Groups, worker: Worker, workers: int) -> Iterator[tuple[Group, Outcome]]:
    """Every person with its samples, in order. With 0 or 1 workers in this process."""
    if workers <= 1:
        try:
            for group in groups:
                yield group, worker.person(group)
        finally:
            worker.reader.close()
        return
    with ProcessPoolExecutor(workers, get_context("spawn"), _start, (worker,)) as pool:
        waiting: deque[tuple[Group, Future[Outcome]]] = deque()
        photos = 0
        try:
            for group in groups:
                waiting.append((group, pool.submit(_person, group)))
                photos += len(group.places)
                while photos > UNDER_WAY and len(waiting) > 1:
                    first, future = waiting.popleft()
                    photos -= len(first.places)
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def convert(
    out: str | Path,
    source: Source,
    crop: Crop,
    *,
    name: str,
    title: str,
    licence: str,
    splits: Mapping[str, float],
    seed: int,
    workers: int = 0,
    shard_samples: int = 4096,
    min_photos: int = 1,
    limit: int | None = None,
    part: Part | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write the data set. People in finished shards are not done again.

    Args:
        name: of the data set.  title: what it is and where it comes from, for the card.
        splits: name -> share; a person's split is a hash of its name.
        min_photos: people with fewer pictures are left out.
        limit: only the first so many people.
        part: only this share of them.
    Returns:
        counts of identities, samples and skipped pictures of this run.
    Raises:
        DataError: nobody is left, or the folder was begun with other settings or another source.
    """
    from tqdm import tqdm

    out = Path(out)
    groups = source.groups(min_photos)
    groups = groups.only(range(min(len(groups), limit or len(groups))))
    if part is not None:
        groups = groups.only(part.of(len(groups)))
    if not len(groups):
        raise DataError(f"{name}: nobody has {min_photos} or more pictures; nothing to write")
    given = {"identities": len(groups), "pictures": sum(map(groups.photos, range(len(groups))))}
    about = {"splits": dict(splits), "seed": seed, "crop": vars(crop), "source": source.about, "given": given}
    _same_settings(out, about)
    counts = {"identities": 0, "samples": 0, "skipped": 0}
    with DatasetWriter(
        out,
        name=name,
        image_size=crop.size,
        alignment="arcface",
        source=title,
        licence=licence,
        shard_samples=shard_samples,
        about=about,
    ) as writer:
        todo = groups.only([number for number in range(len(groups)) if not writer.done(groups.name(number))])
        total = sum(map(todo.photos, range(len(todo))))
        if len(todo) and source.stage:
            source.reader, source.places = source.stage(out / STAGE, progress)
        with _SkippedLog(out / SKIPPED) as log, tqdm(total=total, unit="img", disable=not progress) as bar:
            for group, (samples, skipped) in _outcomes(todo, Worker(source, crop), workers):
                log.add(skipped)
                if samples:
                    writer.add_identity(split_of(group.name, splits, seed), group.name, samples)
                counts["identities"] += bool(samples)
                counts["samples"] += len(samples)
                counts["skipped"] += len(skipped)
                bar.update(len(group.places))
            writer.card.about["skipped"] = len(log)
    if (out / STAGE).exists():
        shutil.rmtree(out / STAGE)
    return counts


def _same_settings(out: Path, about: Mapping) -> None:
    if not (out / CARD_NAME).exists():
        return
    before = Card.load(out, complete=False).about
    different = [key for key, value in about.items() if before.get(key) != json.loads(json.dumps(value))]
    if different:
        said = "; ".join(f"{key}: {before.get(key)}, now {about[key]}" for key in different)
        raise DataError(f"{out} was begun with other settings ({said}). Choose another folder.")


class _SkippedLog:
    """skipped.jsonl: each picture once, also when a killed run wrote some of them before."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> _SkippedLog:
        written = self.path.read_bytes() if self.path.exists() else b""
        whole = written[: written.rfind(b"\n") + 1]  # a killed run may have left half a line
        self._listed = {json.loads(line)["photo"] for line in whole.splitlines()}
        self._file = open(self.path, "ab")
        os.ftruncate(self._file.fileno(), len(whole))
        return self

    def __len__(self) -> int:
        return len(self._listed)

    def add(self, skipped: Sequence[Skipped]) -> None:
        for item in skipped:
            if item.photo not in self._listed:
                self._listed.add(item.photo)
                self._file.write((json.dumps(vars(item), ensure_ascii=False) + "\n").encode())
        self._file.flush()  # before the person's shard can be finished: a continued run does not come here again

    def __exit__(self, *_: object) -> None:
        self._file.close()
