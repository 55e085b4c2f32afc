"""The command line of the scripts in data/: one file a data set, which names its people and calls `main`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from anonfw.align import ALIGNMENTS
from anonfw.data import parts
from anonfw.data.build import SKIPPED, Person, Recipe, build
from anonfw.errors import AnonfwError


def splits(text: str) -> dict[str, float]:
    try:
        splits = {name: float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected NAME=SHARE,... such as train=0.8,val=0.1,test=0.1"
        ) from error
    if min(splits.values()) < 0 or not sum(splits.values()):
        raise argparse.ArgumentTypeError(f"{text!r}: shares are not negative and not all zero")
    return splits


def parser(description: str, source: str) -> argparse.ArgumentParser:
    """The arguments that every script has. `source` describes the first one."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("source", type=Path, help=source)
    made.add_argument("out", type=Path, help="folder of the data set; the same command again continues it")
    made.add_argument("--size", type=int, default=112, help="side of the crops in pixels")
    made.add_argument(
        "--alignment", choices=ALIGNMENTS, default="arcface", help="arcface: the recognisers' crop; portrait: wider"
    )
    made.add_argument("--aligned", action="store_true", help="the photos are crops of that alignment already")
    made.add_argument("--factors", action="store_true", help="measure pose, expression and brightness of each crop")
    made.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")
    made.add_argument("--threshold", type=float, default=0.5, help="lowest score of a detected face")
    made.add_argument("--min-photos", type=int, default=1, help="leave out people with fewer photos than this")
    made.add_argument("--limit", type=int, help="only the first so many people")
    made.add_argument(
        "--splits", type=splits, default="train=0.8,val=0.1,test=0.1", help="shares of people, by a hash of the name"
    )
    made.add_argument("--seed", type=int, default=0, help="of the splits")
    made.add_argument("--shard-samples", type=int, default=4096, help="a shard is closed at this many samples")
    made.add_argument("--workers", type=int, default=2, help="processes that find and align faces")
    made.add_argument("--part", type=parts.part, metavar="I/N", help="of an array job; the last part joins all of them")
    return made


def main(
    args: argparse.Namespace, read: Callable[[Path], list[Person]], *, name: str, source: str, licence: str
) -> int:
    """What a script does with its arguments: read the people, build, report. Returns the exit code."""
    out = args.out
    try:
        if args.part and parts.is_joined(out):
            print(f"{out} is complete already")
            return 0
        people = [person for person in read(args.source) if len(person.photos) >= args.min_photos][: args.limit]
        if args.part:
            out, share = args.part.folder(out), args.part.of(len(people))
            people = people[share.start : share.stop]
        recipe = Recipe(args.size, args.alignment, args.aligned, args.quality, args.factors, args.threshold)
        counts = build(
            out,
            people,
            recipe,
            name=name,
            source=source,
            licence=licence,
            splits=args.splits,
            seed=args.seed,
            workers=args.workers,
            shard_samples=args.shard_samples,
        )
        if args.part and not parts.join(args.out, args.part.count):
            print(f"{out}: {counts['samples']} photos written now; the data set waits for its other parts")
            return 0
    except AnonfwError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {counts['samples']} photos of {counts['identities']} people written now, "
        f"{counts['skipped']} skipped ({SKIPPED}). Next: python -m anonfw embed {args.out} --encoder arcface_mbf"
    )
    return 0
