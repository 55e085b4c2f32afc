"""The command line of the scripts in data/ that convert a published set of aligned crops."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from anonfw.data import parts
from anonfw.data.build import SKIPPED
from anonfw.data.script import splits
from anonfw.data.sources import Source
from anonfw.data.sources.convert import Crop, convert
from anonfw.errors import AnonfwError


def parser(description: str, source: str, train_share: str = "train=0.95,val=0.05") -> argparse.ArgumentParser:
    """The arguments that every script has. `source` describes the first one."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("source", type=Path, help=source)
    made.add_argument("out", type=Path, help="folder of the data set; the same command again continues it")
    made.add_argument(
        "--size", type=int, default=112, help="side of the crops; JPEGs of this size are not encoded again"
    )
    made.add_argument("--quality", type=int, default=95, help="of JPEGs that must be encoded, 1 to 100")
    made.add_argument("--factors", action="store_true", help="measure pose, expression and brightness of each crop")
    made.add_argument("--min-photos", type=int, default=1, help="leave out people with fewer pictures than this")
    made.add_argument("--limit", type=int, help="only the first so many people")
    made.add_argument("--splits", type=splits, default=train_share, help="shares of people, by a hash of the name")
    made.add_argument("--seed", type=int, default=0, help="of the splits")
    made.add_argument("--shard-samples", type=int, default=4096, help="a shard is closed at this many samples")
    made.add_argument("--workers", type=int, default=2, help="processes that read and check pictures")
    made.add_argument("--part", type=parts.part, metavar="I/N", help="of an array job; the last part joins all of them")
    return made


def main(args: argparse.Namespace, read: Callable[[Path], Source], *, name: str, title: str, licence: str) -> int:
    """What a script does with its arguments: read the source, convert, report. Returns the exit code."""
    out = args.part.folder(args.out) if args.part else args.out
    try:
        if args.part and parts.is_joined(args.out):
            print(f"{args.out} is complete already")
            return 0
        counts = convert(
            out,
            read(args.source),
            Crop(args.size, args.quality, args.factors),
            name=name,
            title=title,
            licence=licence,
            splits=args.splits,
            seed=args.seed,
            workers=args.workers,
            shard_samples=args.shard_samples,
            min_photos=args.min_photos,
            limit=args.limit,
            part=args.part,
        )
        if args.part and not parts.join(args.out, args.part.count):
            print(f"{out}: {counts['samples']} pictures written now; the data set waits for its other parts")
            return 0
    except AnonfwError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {counts['samples']} pictures of {counts['identities']} people written now, "
        f"{counts['skipped']} skipped ({SKIPPED}). Next: python -m anonfw embed {args.out} --encoder arcface_mbf"
    )
    return 0
