"""How well `anonfw.demographics` tells age and sex: `python bench/demographics.py UTKFACE`.

UTKFACE is the folder of the UTKFace set (AGE_SEX_RACE_*.jpg; sex 0 male, 1 female). The main face of each picture is
found and aligned as by every script of data/. Intervals are bootstraps over pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cv2
import numpy as np
import torch
from tqdm import tqdm

from anonfw.align import similarity, template, warp
from anonfw.demographics import Demographics
from anonfw.detect import Detector
from anonfw.evaluate.intervals import mean_interval, rate_interval

GROUPS = ((0, 12), (13, 19), (20, 39), (40, 59), (60, 116))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder with AGE_SEX_RACE_*.jpg")
    parser.add_argument("--every", type=int, default=1, help="take every so many-th picture")
    parser.add_argument("--alignment", default="portrait")
    parser.add_argument("--size", type=int, default=112)
    args = parser.parse_args()
    files = sorted(args.folder.glob("*_*_*_*.jpg"))[:: args.every]
    detector, demographics = Detector(), Demographics()
    target, crops, truth = template(args.alignment, args.size), [], []
    for file in tqdm(files, unit="img"):
        image = cv2.imread(str(file))[..., ::-1]
        faces = detector.detect(np.ascontiguousarray(image))
        if len(faces):
            crops.append(warp(image, similarity(faces.landmarks[0], target), args.size))
            truth.append([int(part) for part in file.name.split("_")[:2]])
    found = demographics(torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2), args.alignment)
    age, sex = np.array(truth).T
    wrong = np.abs(found["age"].numpy() - age)
    right = (found["female"].numpy() >= 0.5) == (sex == 1)
    bias = found["age"].numpy() - age
    print(f"{len(crops)} of {len(files)} pictures have a face; {args.alignment} crops of {args.size} px")
    print(f"{'age':>9} {'pictures':>8} {'error, years':>22} {'bias, years':>22} {'sex, % right':>22}")
    for low, high in ((0, 116), *GROUPS):
        here = (age >= low) & (age <= high)
        rows = np.arange(here.sum())
        cells = [mean_interval(wrong[here], rows), mean_interval(bias[here], rows)]
        shown = [f"{e.value:.1f} [{e.low:.1f}, {e.high:.1f}]" for e in cells]
        e = rate_interval(right[here], rows)
        shown.append(f"{100 * e.value:.1f} [{100 * e.low:.1f}, {100 * e.high:.1f}]")
        print(f"{low:>4}-{high:<4} {here.sum():>8} " + " ".join(f"{text:>22}" for text in shown))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
