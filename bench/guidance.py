"""The guidance sweep of an identity adapter: how much of the person is left, and what the picture pays for it.

    python bench/guidance.py RUN --people 40 --picture docs/guidance.png --plot docs/guidance_curve.png
    python bench/guidance.py RUN --guidance -5 --prompts man woman "70-year-old person"

RUN is a run folder, an export, or a recipe whose `init` has the weights. People, judge and thresholds are those of
the recipe's `data.test` and `evaluate`: one photo of each person, thresholds from all pairs of different people. With
prompts, a row for each (at the first guidance that is given). Overrides as in `validate`.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from anonfw.attributes import Attributes
from anonfw.data.files import atomic
from anonfw.data.open import open_loader
from anonfw.demographics import Demographics
from anonfw.detect import Detector
from anonfw.evaluate import protocols
from anonfw.evaluate.evaluation import first_of_each_person, to_uint8
from anonfw.evaluate.grid import contact_sheet
from anonfw.evaluate.intervals import Estimate, mean_interval, rate_interval
from anonfw.evaluate.rows import utility_measures
from anonfw.evaluate.scorers import EXPRESSION, Scorers, open_judge, refuse_own_judge
from anonfw.photographs import open_system
from anonfw.recipe import build

DISTANCE, EXPRESSION_ERROR, FACE = "identity distance", "expression, sd", "face %"


def measures(
    images: torch.Tensor, scorers: Scorers, originals: Any, people: np.ndarray, thresholds: list, spread: np.ndarray
) -> dict[str, Estimate]:
    """Column -> estimate, for (P,3,H,W) uint8 versions of the originals."""
    made = scorers.measure(images)
    looks = Demographics()(images, scorers.alignment)
    cosine = (made.embedding * originals.embedding).sum(-1)
    utility = utility_measures([made], originals, people, spread, 0)
    return {
        **{f"found % @{t.fpr:g}": rate_interval(100.0 * (cosine > t.value) / 100, people) for t in thresholds},
        DISTANCE: mean_interval(1 - cosine, people),
        FACE: utility["detected"],
        "pose, deg": utility["pose_error"],
        EXPRESSION_ERROR: utility["expression_error"],
        "female %": rate_interval((looks["female"].numpy() > 0.5).astype(float), people),
        "age": mean_interval(looks["age"].numpy(), people),
        "smile": mean_interval(made.factors["smile"], people),
    }


def cell(column: str, value: Estimate) -> str:
    """Estimate and 95 % interval as the table shows them."""
    factor, digits = (100, 0) if "%" in column else (1, 1 if column in ("age", "pose, deg") else 2)
    return f"{factor * value.value:.{digits}f} [{factor * value.low:.{digits}f}, {factor * value.high:.{digits}f}]"


def plot(file: Path, weights: list[float], rows: list[dict[str, Estimate]]) -> None:
    """Identity distance, expression error and faces found against |w|, with 95 % bands."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3), constrained_layout=True)
    order = np.argsort(np.abs(weights))
    x = np.abs(weights)[order]
    for axis, name in zip(axes, (DISTANCE, EXPRESSION_ERROR, FACE), strict=True):
        factor = 100 if "%" in name else 1
        value, low, high = (
            factor * np.array([getattr(rows[i][name], k) for i in order]) for k in ("value", "low", "high")
        )
        axis.fill_between(x, low, high, alpha=0.2)
        axis.plot(x, value, marker="o")
        axis.set(xlabel="|w|", title=name)
    with atomic(file) as stream:
        figure.savefig(stream, format="png", dpi=110)
    pyplot.close(figure)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder, export, or recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's recipe")
    parser.add_argument(
        "--guidance", type=float, nargs="+", default=[0, -1, -2, -4, -7, -10], help="w (default: 0 .. -10)"
    )
    parser.add_argument("--prompts", nargs="+", default=[], help="what should remain when the person is taken away")
    parser.add_argument("--people", type=int, default=40, help="one photo of each (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="faces at a time (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="PNG with a row a person, a column a setting")
    parser.add_argument("--plot", type=Path, help="PNG of the trade-off against |w|")
    parser.add_argument("--rows", type=int, default=6, help="people on the picture (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_intermixed_args()

    system, recipe = open_system(args.run, args.overrides)
    system = system.to(args.device)
    evaluation = build(recipe["evaluate"])
    judge = open_judge(evaluation.judge, args.device)
    refuse_own_judge(judge.name, judge.sha256, system.recognizer_names())
    loader = open_loader(recipe, "test", rank=0, world=1, shuffle=False)
    try:
        gallery = evaluation.collect(loader)
    finally:
        loader.close()
    scorers = Scorers(judge, Detector(), Attributes(), evaluation.alignment, device=args.device)
    everyone = gallery.identity.numpy()
    impostors = protocols.impostor_scores(scorers.embed(gallery.image), everyone)
    thresholds = [protocols.threshold_at(impostors, fpr) for fpr in evaluation.fpr]
    chosen = first_of_each_person(gallery, args.people)
    photos, people = gallery.select(chosen), everyone[chosen]
    originals = scorers.measure(photos.image)
    spread = np.nanstd(originals.table(EXPRESSION), axis=0)

    print(f"{len(chosen)} photos of {len(set(people.tolist()))} people; judge {judge.name}; [..] = 95 % interval")
    print("".join(f"FPR {t.fpr:g}: cosine > {t.value:.4f}\n" for t in thresholds), end="")
    usual = system.anonymizer
    sheet, rows = {}, []
    settings = [(f"w {w:g}", {"guidance": w}) for w in args.guidance]
    for prompt in args.prompts:  # in place of what the recipe's own prompt asks for
        asked = {"age": None, "sex": None, "race": None, "text": prompt}
        settings.append((prompt, {"guidance": args.guidance[0], **asked}))

    def show(title: str, images: torch.Tensor) -> None:
        row = measures(images, scorers, originals, people, thresholds, spread)
        if not rows:
            print(f"| | {' | '.join(row)} |\n{'|---' * (len(row) + 1)}|")
        print(f"| {title} | {' | '.join(cell(name, value) for name, value in row.items())} |", flush=True)
        rows.append(row)
        sheet[title] = images[: args.rows]

    show("original", photos.image)
    for title, options in settings:
        system.anonymizer = replace(usual, **options)
        parts = [photos.select(slice(i, i + args.batch)).to(args.device) for i in range(0, len(photos), args.batch)]
        show(title, torch.cat([to_uint8(system.anonymize(part)).cpu() for part in parts]))
    if args.picture:
        with atomic(args.picture) as file:
            file.write(contact_sheet(sheet))
    if args.plot:
        plot(args.plot, args.guidance, rows[1 : 1 + len(args.guidance)])


if __name__ == "__main__":
    main()
