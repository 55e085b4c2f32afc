"""The verb `validate`: measure a trained system on people it has never seen."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anonfw.evaluate.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m anonfw validate`."""
    parser.add_argument("run", metavar="RUN_OR_CHECKPOINT", help="a run folder (its last checkpoint) or a .ckpt file")
    parser.add_argument(
        "overrides",
        metavar="key=value",
        nargs="*",
        help="a dotted key of the run's recipe and a YAML value: evaluate.limit=200, data.test.dataset=path/to/lfw",
    )
    parser.add_argument("--out", type=Path, help="folder for the table and the grid (default: validate/ in the run)")


def run(args: argparse.Namespace) -> int:
    """Print the table and the paths of table and sample grid."""
    from anonfw.training import load_system

    system, recipe = load_system(args.run, args.overrides)
    place = Path(args.run)
    folder = args.out or (place if place.is_dir() else place.parent) / "validate"
    report = evaluate_system(system, recipe, folder)
    print(report.text())
    cost = ", ".join(f"{name} {ms:.1f}" for name, ms in report.cost_ms.items())
    print(f"milliseconds per image: {cost}")
    print(f"table  {folder / 'table.txt'} (.md .csv .json)")
    print(f"grid   {folder / 'grid.png'}")
    return 0


def evaluate_system(system: Any, recipe: Mapping[str, Any], folder: str | Path, grid_rows: int = 6) -> Report:
    """Evaluate a trained system as its recipe says, and write table and sample grid into `folder`.

    One process does it for all: the loader is asked for the whole split, in a fixed order.

    Args:
        system: a `System` on its device, with its averaged weights; in eval mode while this runs.
        recipe: its section `evaluate` is an `Evaluation`, its `data.test` a partial `FaceLoader`.
        folder: gets table.{txt,md,csv,json}, grid.png, and bad_samples.jsonl where a photo could not be read.
        grid_rows: photos in the grid, each of another person as far as there are so many.
    Raises:
        EvaluationError: the recipe lacks one of the two sections, or states another crop than the data set's card.
    """
    from anonfw.data.files import atomic
    from anonfw.evaluate.evaluation import EvaluationError
    from anonfw.evaluate.grid import first_of_each_person, sample_grid
    from anonfw.recipe import build

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not recipe.get("evaluate") or not recipe.get("data", {}).get("test"):
        raise EvaluationError("the recipe has no `evaluate` section or no `data.test`: there is nothing to measure on")
    evaluation = build(recipe["evaluate"])
    loader = build(recipe["data"]["test"])(
        rank=0, world=1, shuffle=False, bad_samples_file=folder / "bad_samples.jsonl"
    )
    if (alignment := loader.table.card.alignment) != evaluation.alignment:
        raise EvaluationError(f"the photos are {alignment} crops: evaluate them with evaluate.alignment={alignment}")
    try:
        photos = evaluation.collect(loader)
    finally:
        loader.close()
    was_training = system.training
    system.eval()
    try:
        report = evaluation.run(system.anonymize, [photos], system.recognizer_names(), device=system.device)
        png = sample_grid(system, photos.select(first_of_each_person(photos, grid_rows)))
    finally:
        system.train(was_training)
    report.save(folder)
    with atomic(folder / "grid.png") as stream:
        stream.write(png)
    return report
