"""The strength sweep of an anonymizer whose `anonymize` takes one: how much of the person is found, from 1 down to 0.

    python bench/strength.py RUN --people 125 --picture docs/iddiffuse_strength.png

RUN is a run folder or an export. People, judge and thresholds are those of the recipe's `data.test` and `evaluate`:
one photo of each person, thresholds from all pairs of different people's originals. Overrides as in `validate`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from anonfw.data.files import atomic
from anonfw.data.open import open_loader
from anonfw.evaluate import protocols
from anonfw.evaluate.evaluation import first_of_each_person, to_uint8
from anonfw.evaluate.grid import contact_sheet
from anonfw.evaluate.intervals import mean_interval, rate_interval
from anonfw.evaluate.scorers import refuse_own_judge
from anonfw.identity import embed_aligned, open_recognizer
from anonfw.recipe import build
from anonfw.training import load_system


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or export")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of the run's recipe")
    parser.add_argument(
        "--strengths", type=float, nargs="+", default=[1.0, 0.75, 0.5, 0.25, 0.0], help="default: %(default)s"
    )
    parser.add_argument("--people", type=int, default=125, help="one photo of each (default: %(default)s)")
    parser.add_argument("--picture", type=Path, help="PNG with a row a person, a column a strength")
    parser.add_argument("--rows", type=int, default=6, help="people on the picture (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()

    system, recipe = load_system(args.run, args.overrides)
    system = system.to(args.device)
    evaluation = build(recipe["evaluate"])
    judge = open_recognizer(evaluation.judge).to(args.device)
    refuse_own_judge(judge.name, judge.sha256, system.recognizer_names())
    loader = open_loader(recipe, "test", rank=0, world=1, shuffle=False)
    try:
        gallery = evaluation.collect(loader)
    finally:
        loader.close()

    def embed(images: torch.Tensor) -> torch.Tensor:
        """(N,3,H,W) uint8 -> (N,D) on the CPU."""
        parts = images.split(evaluation.batch_size)
        pixels = (part.to(args.device).float() / 127.5 - 1 for part in parts)
        return torch.cat([embed_aligned(judge, part, evaluation.alignment).cpu() for part in pixels])

    with torch.inference_mode():
        originals = embed(gallery.image)
        impostors = protocols.impostor_scores(originals.numpy(), gallery.identity.numpy())
        thresholds = [protocols.threshold_at(impostors, fpr) for fpr in evaluation.fpr]
        rows = first_of_each_person(gallery, args.people)
        photos, own, people = gallery.select(rows), originals[rows], gallery.identity.numpy()[rows]
        print(f"{len(rows)} photos of {len(set(people.tolist()))} people; judge {judge.name}; [..] = 95 % interval")
        print("".join(f"FPR {t.fpr:g}: cosine > {t.value:.4f}\n" for t in thresholds), end="")
        print("| strength | " + " | ".join(f"found % @{t.fpr:g}" for t in thresholds) + " | identity distance |")
        print("|---" * (len(thresholds) + 2) + "|")
        columns = {"original": photos.image[: args.rows]}
        for strength in args.strengths:
            parts = [
                photos.select(slice(i, i + evaluation.batch_size)) for i in range(0, len(photos), evaluation.batch_size)
            ]
            outputs = [to_uint8(system.anonymize(part.to(args.device), strength=strength)).cpu() for part in parts]
            images = torch.cat(outputs)
            cosine = (embed(images) * own).sum(-1).numpy()
            found = [rate_interval((cosine > threshold.value).astype(float), people) for threshold in thresholds]
            cells = [f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]" for e in found]
            distance = mean_interval(1 - cosine, people)
            cells.append(f"{distance.value:.3f} [{distance.low:.3f}, {distance.high:.3f}]")
            print(f"| {strength:g} | {' | '.join(cells)} |", flush=True)
            columns[f"strength {strength:g}"] = images[: args.rows]
    if args.picture:
        with atomic(args.picture) as file:
            file.write(contact_sheet(columns))


if __name__ == "__main__":
    main()
