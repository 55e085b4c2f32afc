"""The verb `compare`: runs side by side as a table, plots and one HTML page, wherever the runs were kept."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from anonfw.compare.experiment import Experiment
    from anonfw.compare.table import Comparison

LEAKAGE = (
    "How often a recogniser that had no part in the training finds the photo that was anonymized, against what was "
    "lost of it. Less is better on both axes: the best corner is the lower left. Bars are intervals over people. Grey: "
    "a black box, and the photo of a random other person."
)
CURVES = "Where a curve has many points, the line is their running mean, and the points lie faintly behind it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw compare`."""
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="a run folder, a folder or pattern of them, RUN/validate, a wandb folder; with --project also the id, "
        "name or group of runs on W&B",
    )
    parser.add_argument("--project", metavar="ENTITY/PROJECT", help="W&B project of the runs that are not on this disk")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/comparison"), help="folder of the page and the pictures (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table and where the page was written."""
    from anonfw.compare.sources import find

    experiments = find(args.runs, args.project)
    table = write(experiments, args.out)
    print(table.text())
    print(f"page   {args.out / 'comparison.html'} (and .png of each plot, table.md .csv .json .txt)")
    return 0


def write(experiments: Sequence[Experiment], folder: Path) -> Comparison:
    """Write `comparison.html`, a PNG of each plot and `table.*` into `folder`, over those of an earlier comparison.

    Returns:
        What the page shows.
    """
    from anonfw.compare import plots
    from anonfw.compare.page import page
    from anonfw.compare.table import compare
    from anonfw.data.files import atomic

    table = compare(experiments)
    labels = list(table.rows)[: len(experiments)]
    table.save(folder)
    drawn = {
        "leakage_utility": (plots.leakage_utility(experiments, labels), "Leakage against utility", LEAKAGE),
        "learning_curves": (plots.learning_curves(experiments, labels), "Learning curves", CURVES),
    }
    figures = []
    for name, (figure, title, caption) in drawn.items():
        picture = folder / f"{name}.png"
        if figure is None:
            picture.unlink(missing_ok=True)
            continue
        with atomic(picture) as file:
            file.write(plots.png(figure))
        figures.append((title, plots.svg(figure), caption))
    with atomic(folder / "comparison.html") as file:
        file.write(page(table, figures).encode())
    return table
