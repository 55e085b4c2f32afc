"""FaceLoader beside stock webdataset: the same shards, the same pixels, each run a process of its own, alternating.

    python bench/loader.py --out loader.json
    python bench/loader.py --dataset FOLDER --split train --workers 1 2 --rounds 5

Stock is what webdataset's documentation shows: `decode("torchrgb8")`, tuples, torch's DataLoader collating in the
workers. A run makes two passes and reports the second, so that starting is not counted. The robust column is
`cpu us/img` (user + system of the whole process tree, divided by images): wall times suffer when other jobs run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KINDS = ("stock", "ours", "ours shuffled", "ours pairs")
PEOPLE, PHOTOS = 1000, 6


def make_dataset(folder: Path, size: int) -> None:
    """Smooth noise with grain: JPEGs of about the size of faces."""
    import cv2
    import numpy as np
    import simplejpeg

    from anonfw.data.writer import DatasetWriter, Sample

    rng = np.random.default_rng(0)
    with DatasetWriter(
        folder,
        name="bench",
        image_size=size,
        alignment="arcface",
        source="noise",
        licence="none",
        shard_samples=1500,
    ) as writer:
        for person in range(PEOPLE):
            samples = []
            for photo in range(PHOTOS):
                small = rng.integers(0, 256, (size // 12, size // 12, 3), dtype=np.uint8)
                image = cv2.resize(small, (size, size), interpolation=cv2.INTER_CUBIC)
                grain = rng.integers(-4, 5, image.shape, dtype=np.int16)
                image = np.clip(image + grain, 0, 255).astype(np.uint8)
                jpeg = simplejpeg.encode_jpeg(image, 95, colorspace="RGB", colorsubsampling="420")
                samples.append(Sample(f"p{person:04d}_{photo}", jpeg))
            writer.add_identity("train", f"p{person}", samples)


def cpu_seconds() -> float:
    """User and system time of this process and its living descendants (Linux)."""
    ticks, todo = 0, [os.getpid()]
    while todo:
        process = todo.pop()
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
        for task in Path(f"/proc/{process}/task").iterdir():
            todo += map(int, (task / "children").read_text().split())
    return ticks / os.sysconf("SC_CLK_TCK")


def batches_of(kind: str, folder: Path, split: str, batch: int, workers: int):
    """An iterable that can be passed over twice, and what takes a batch to its list of (B,3,H,W) or (B,H,W,3) uint8."""
    if kind == "stock":
        import webdataset
        from torch.utils.data import DataLoader

        from anonfw.data.card import Card

        urls = [str(folder / shard.file) for shard in Card.load(folder).of_split(split)]
        data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode("torchrgb8")
        data = data.to_tuple("jpg", "json", "__key__").map_tuple(None, lambda record: record["identity"], None)
        loader = DataLoader(data, batch_size=batch, num_workers=workers, persistent_workers=workers > 0)
        return loader, lambda item: [item[0]]
    from anonfw.data.loader import FaceLoader

    mode = "pairs" if kind == "ours pairs" else "images"
    loader = FaceLoader(folder, split, batch, mode, shuffle=kind != "ours", workers=workers)
    return loader, lambda item: [item.image] + ([item.partner.image] if item.partner is not None else [])


def run_one(kind: str, folder: Path, split: str, batch: int, workers: int) -> dict:
    """One run in this process."""
    import torch

    torch.set_num_threads(1)
    loader, images_of = batches_of(kind, folder, split, batch, workers)
    for _ in range(2):
        count = checksum = 0
        cpu, wall = cpu_seconds(), time.perf_counter()
        for item in loader:
            for images in images_of(item):
                count += len(images)
                checksum += int(images[:, ..., ::16].sum())
        cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    return {"images": count, "cpu_us": cpu / count * 1e6, "rate": count / wall, "checksum": checksum}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--dataset", type=Path, help="folder of a data set; default: 6,000 pictures made for the purpose"
    )
    parser.add_argument("--split", default="train")
    parser.add_argument("--size", type=int, default=112, help="of the pictures that are made")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run_one(args.one, args.dataset, args.split, args.batch, args.workers[0])))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dataset or Path(temporary) / "bench"
        if args.dataset is None:
            make_dataset(folder, args.size)
        runs: dict[tuple[str, int], list[dict]] = {}
        for _ in range(args.rounds):
            for workers in args.workers:
                for kind in KINDS:
                    command = [sys.executable, __file__, "--one", kind, "--dataset", str(folder), "--split", args.split]
                    command += ["--batch", str(args.batch), "--workers", str(workers)]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    runs.setdefault((kind, workers), []).append(json.loads(done.stdout.splitlines()[-1]))
    whole = {run["checksum"] for (kind, _), found in runs.items() if kind in ("stock", "ours") for run in found}
    rows = [
        {
            "loader": kind,
            "workers": workers,
            "images": found[0]["images"],
            "cpu_us_per_image": round(statistics.median(run["cpu_us"] for run in found), 1),
            "images_per_s_median": round(statistics.median(run["rate"] for run in found)),
            "images_per_s_best": round(max(run["rate"] for run in found)),
        }
        for (kind, workers), found in sorted(runs.items(), key=lambda item: (item[0][1], KINDS.index(item[0][0])))
    ]
    print(f"{'loader':<14} {'workers':>7} {'cpu us/img':>11} {'img/s median':>13} {'best':>7}")
    for row in rows:
        numbers = (row["cpu_us_per_image"], row["images_per_s_median"], row["images_per_s_best"])
        print(f"{row['loader']:<14} {row['workers']:>7} {numbers[0]:>11} {numbers[1]:>13,} {numbers[2]:>7,}")
    same = len(whole) == 1
    print(f"pixels of stock and ours {'are the same' if same else 'DIFFER'}; {args.rounds} rounds, batch {args.batch}")
    if args.out:
        args.out.write_text(json.dumps({"rows": rows, "same_pixels": same, "rounds": args.rounds}, indent=1) + "\n")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
