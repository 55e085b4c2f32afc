"""The verb `validate`: measure a trained system on people it has never seen."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw validate`."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run folder (its last checkpoint) or a .ckpt file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="a dotted key of the run's recipe and a YAML value: evaluate.limit=200, dataset=path/to/lfw",
    )
    parser.add_argument("--device", help="torch device (default: cuda where there is one, else cpu)")
    parser.add_argument("--out", type=Path, help="folder for the table and the grid (default: validate/ in the run)")


def run(args: argparse.Namespace) -> int:
    """Print the table and where it was written."""
    import torch

    from anonfw.evaluate.evaluation import evaluate_system
    from anonfw.training import load_system

    system, recipe = load_system(args.run, args.overrides)
    place = Path(args.run)
    folder = args.out or (place if place.is_dir() else place.parent) / "validate"
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    report = evaluate_system(system.to(device), recipe, folder)
    print(report.text())
    print("\n".join(report.closing(folder)))
    return 0
