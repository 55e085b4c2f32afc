"""Photographs of people who do not exist, several of each, as a data set of data/SCHEMA.md.

    python data/synthetic_people.py OUT --people 940 --photos 6 --seed 1 --workers 2
    python data/synthetic_people.py OUT --report

A person is a style vector of MobileStyleGAN. Their photographs move that vector along directions that turn the head,
open the mouth and so on, and take the fine layers' style (light, colours, background) from somebody else. What two
recognisers do not take for the same person is thrown away, and so is who looks like somebody already there.
docs/synthetic_people.md says how well that works. Needs `pip install anonfw[faces]`.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import synthetic_studio as studio
from synthetic_studio import DIRECTIONS, JPEG_QUALITY, RECOGNISERS, SIZE, Photo, Studio, centre, collides

from anonfw.data.writer import DatasetWriter, Sample
from anonfw.errors import AnonfwError

CHUNK = 32  # candidates that are compared with the people before them at once; fixed, so that workers change nothing
PERIOD = 75
TEST, VAL = frozenset((4, 12, 20, 29, 37, 45, 54, 62, 66, 70)), frozenset((16, 41))

_studio: Studio | None = None  # one per worker process


def split_of(number: int) -> str:
    """Split of the person with that number: of every 75 people 10 are test, 2 val and 63 train, from the start on."""
    place = number % PERIOD
    return "test" if place in TEST else "val" if place in VAL else "train"


@dataclass(frozen=True)
class Series:
    """A kind of data set: which pictures are taken of each person.

    Attributes:
        name: of the data set; its first letter begins the people's names.
        take: the studio's method that takes the pictures.
        missing: how many of them may be missing.
        split: number of the person -> split.
        source: for the card.
        known: () -> vectors (2,512) of people whom nobody may resemble.
    """

    name: str
    take: str
    missing: int
    split: Callable[[int], str]
    source: str
    known: Callable[[], list[np.ndarray]] = list


SOURCE = "people who do not exist: MobileStyleGAN (FFHQ) by data/synthetic_people.py"
PEOPLE = Series("people", "photos", 1, split_of, SOURCE)


def start_worker(parent: int) -> None:
    """Load the networks into this process, one thread each (sums come out the same whatever the machine)."""
    global _studio
    import cv2
    import torch

    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    _studio = Studio(threads=1)


def _end_with(parent: int) -> None:
    """A killed parent cannot stop its workers: they would wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def base_job(work: Path, seed: int, number: int) -> Path:
    """Candidate `number`'s style and first photo in a file (written once)."""
    file = work / f"base_{number:06d}.npz"
    if not file.exists():
        style, photo = _studio.base(seed, number)
        save_person(file, style, [photo] if photo else [])
    return file


def photos_job(work: Path, seed: int, number: int, count: int, take: str) -> Path:
    """Candidate `number`'s photos in a file (written once)."""
    file = work / f"{take}_{number:06d}_{count}.npz"
    if not file.exists():
        style, (first,) = load_person(work / f"base_{number:06d}.npz")
        save_person(file, style, getattr(_studio, take)(seed, number, first, style, count))
    return file


def save_person(file: Path, style: np.ndarray, photos: list[Photo]) -> None:
    """Write a candidate's style and photos, whole or not at all."""
    arrays = {"style": style, "factors": np.array(json.dumps([photo.factors for photo in photos]))}
    for i, photo in enumerate(photos):
        arrays |= {
            f"jpeg_{i}": np.frombuffer(photo.jpeg, np.uint8),
            f"landmarks_{i}": photo.landmarks,
            f"vectors_{i}": photo.vectors,
        }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, file)


def load_person(file: Path) -> tuple[np.ndarray, list[Photo]]:
    """(512,) style and photos of a candidate."""
    with np.load(file) as arrays:
        photos = [
            Photo(arrays[f"jpeg_{i}"].tobytes(), arrays[f"landmarks_{i}"], factors, arrays[f"vectors_{i}"])
            for i, factors in enumerate(json.loads(str(arrays["factors"])))
        ]
        return arrays["style"], photos


def people(
    pool: ProcessPoolExecutor,
    work: Path,
    seed: int,
    count: int,
    wanted: int,
    progress: Callable[[int, int], None],
    series: Series = PEOPLE,
) -> Iterator[list[Photo]]:
    """Photos of `wanted` distinct people, one person after the other, in an order that the seed alone decides.

    `progress` is called with the candidates tried and the people found.
    """
    centres = series.known()
    found = 0
    fixed = itertools.repeat(work), itertools.repeat(seed)
    for start in itertools.count(0, CHUNK):
        numbers = range(start, start + CHUNK)
        promising, taken = list(centres), []
        for number, file in zip(numbers, pool.map(base_job, *fixed, numbers), strict=True):
            _, photos = load_person(file)
            if photos and not collides(photos[0].vectors, promising):
                promising.append(photos[0].vectors)
                taken.append(number)
        jobs = pool.map(photos_job, *fixed, taken, itertools.repeat(count), itertools.repeat(series.take))
        for number, file in zip(taken, jobs, strict=True):
            _, photos = load_person(file)
            if len(photos) >= count - series.missing and not collides(centre(photos), centres):
                centres.append(centre(photos))
                found += 1
                yield photos
                if found == wanted:
                    return
            progress(number + 1, found)


def check_work(work: Path, seed: int) -> None:
    """Refuse half-made people of other settings.

    Raises:
        AnonfwError: the folder was filled with another seed, or by another version of the scripts.
    """
    constants = {name: value for name, value in vars(studio).items() if name.isupper() and name != "DIRECTIONS"}
    settings = {"seed": seed, "directions": hashlib.sha256(DIRECTIONS.read_bytes()).hexdigest()}
    settings |= {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in constants.items()}
    text = json.dumps(settings, indent=1, sort_keys=True)
    work.mkdir(parents=True, exist_ok=True)
    file = work / "settings.json"
    if not file.exists():
        partial = file.with_name(f"settings.{os.getpid()}.partial")
        partial.write_text(text)
        os.replace(partial, file)
    elif file.read_text() != text:
        raise AnonfwError(f"{work} holds people of another seed or version. Delete it, or choose another --work.")


def write(args: argparse.Namespace, series: Series = PEOPLE) -> None:
    """Make the data set, or continue it."""
    import multiprocessing

    from anonfw.weights import weight

    work = args.work or args.out / ".work"
    check_work(work, args.seed)
    writer = DatasetWriter(
        args.out,
        name=series.name,
        image_size=SIZE,
        alignment="portrait",
        source=series.source,
        licence="generator Apache-2.0, trained on FFHQ (CC BY-NC-SA 4.0): non-commercial",
        shard_samples=args.shard_samples,
        sidecars={name: weight(name).sha256 for name in RECOGNISERS},
        about={"seed": args.seed, "photos": args.photos, "jpeg_quality": JPEG_QUALITY},
    )
    began = time.monotonic()
    shown, first_found = began, None

    def progress(tried: int, found: int) -> None:
        nonlocal shown, first_found
        now = time.monotonic()
        first_found = found if first_found is None else first_found
        if now - shown >= (1 if sys.stdout.isatty() else 30):
            shown = now
            left = (args.people - found) * (now - began) / max(found - first_found, 1)
            line = f"{found}/{args.people} people of {tried} tried, {now - began:.0f} s, about {left:.0f} s left"
            print(line, end=" \r" if sys.stdout.isatty() else "\n", flush=True)

    context = multiprocessing.get_context("spawn")  # OpenVINO's and torch's threads do not survive a fork
    with writer, ProcessPoolExecutor(args.workers, context, start_worker, (os.getpid(),)) as pool:
        for number, photos in enumerate(people(pool, work, args.seed, args.photos, args.people, progress, series)):
            name = f"{series.name[0]}{number:05d}"
            if not writer.done(name):
                writer.add_identity(series.split(number), name, list(samples(name, photos)))
    print(f"{args.people} people in {args.out}, {time.monotonic() - began:.0f} s. {work} may be deleted.")


def samples(name: str, photos: list[Photo]) -> Iterator[Sample]:
    digits = len(str(len(photos) - 1))
    for i, photo in enumerate(photos):
        vectors = dict(zip(RECOGNISERS, photo.vectors, strict=True))
        yield Sample(f"{name}_{i:0{digits}d}", photo.jpeg, photo.landmarks, photo.factors, vectors)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def parser(description: str, people: tuple[str, int, str], photos: tuple[str, int, str]) -> argparse.ArgumentParser:
    """The arguments of the scripts that make people. `people` and `photos`: option, default and help of the counts."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("out", type=Path, help="folder of the data set; the same command again continues it")
    for dest, (option, default, words) in (("people", people), ("photos", photos)):
        made.add_argument(option, dest=dest, metavar="N", type=positive, default=default, help=words)
    made.add_argument("--seed", type=int, default=1, help="of the people")
    made.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes")
    made.add_argument("--shard-samples", type=positive, default=1024, help="a shard is closed at this many samples")
    made.add_argument("--work", type=Path, help="where finished people are kept (OUT/.work if not given)")
    return made


def ended(program: str, work: Callable[[], None]) -> int:
    """Exit code of a script that does this work; what is wrong is told in one line."""
    try:
        work()
    except AnonfwError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return 2
    return 0


def show(args: argparse.Namespace) -> None:
    """Print the report, and write the picture where asked."""
    import synthetic_report

    print(synthetic_report.report(args.out))
    if args.picture:
        synthetic_report.contact_sheet(args.out, args.picture)


def main() -> int:
    made = parser(
        "Make photographs of people who do not exist, as a data set of data/SCHEMA.md.",
        ("--people", 940, "a larger number later adds people"),
        ("--photos", 6, "of each person; one fewer is accepted"),
    )
    made.add_argument("--report", action="store_true", help="only print the quality of the set at OUT")
    made.add_argument("--picture", type=Path, help="with --report: also write a contact sheet, rows = people")
    args = made.parse_args()
    return ended("synthetic_people", lambda: show(args) if args.report else write(args))


if __name__ == "__main__":
    raise SystemExit(main())
