"""What it costs to turn a RecordIO face set into shards: time and peak memory of data/casia_webface.py.

    python bench/recordio.py --images 50000 --workers 1 2

Makes a set in InsightFace's form from some hundred different 112 px JPEGs that are used again and again (about 6 kB
each), converts it in a process of its own and prints the numbers of that process and of its workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from anonfw.data.card import Card
from anonfw.data.index import open_index
from anonfw.data.recordio import write_face_set

ROOT = Path(__file__).resolve().parent.parent


def pictures(count: int, size: int = 112) -> list[bytes]:
    """Smooth noise with some grain: JPEGs of quality 95 with about 6 kB."""
    made = []
    for seed in range(count):
        rng = np.random.default_rng(seed)
        smooth = cv2.resize(
            rng.integers(0, 256, (14, 14, 3), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC
        )
        grain = cv2.GaussianBlur(rng.normal(0, 12, (size, size, 3)), (0, 0), 1)
        image = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        made.append(simplejpeg.encode_jpeg(image, 95, colorspace="RGB", colorsubsampling="420"))
    return made


def people(images: int, each: int, stock: list[bytes]) -> Iterator[list[bytes]]:
    """People with about `each` pictures, as uneven as CASIA-WebFace's."""
    rng = np.random.default_rng(0)
    left, place = images, 0
    while left:
        count = min(left, int(rng.lognormal(np.log(each) - 0.32, 0.8)) + 2)
        yield [stock[(place + i) % len(stock)] for i in range(count)]
        left, place = left - count, place + count


def checksum(out: Path) -> list[bytes]:
    """Hashes of all JPEGs in a data set, sorted: the same bytes went through, each as often."""
    hashes = []
    for shard in Card.load(out).shards:
        index = open_index(out / shard.file, shard)
        with open(out / shard.file, "rb") as file:
            for offset, size in zip(index.offset.tolist(), index.size.tolist(), strict=True):
                file.seek(offset)
                hashes.append(hashlib.sha256(file.read(size)).digest())
    return sorted(hashes)


def tree_memory(root: int) -> tuple[float, float]:
    """Resident MB of a process, and of it with all its descendants (shared pages counted once: PSS)."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    todo, total = [root], 0
    while todo:
        process = todo.pop()
        todo += children.get(process, [])
        total += _kilobytes(process, "smaps_rollup", "Pss:")
    return _kilobytes(root, "status", "VmRSS:") / 1024, total / 1024


def _kilobytes(process: int, file: str, field: str) -> int:
    try:
        for line in Path(f"/proc/{process}/{file}").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    except OSError:  # it has just ended
        pass
    return 0


def run(command: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a command; seconds on the clock and of CPU, and peak memory sampled ten times a second (Linux)."""
    peaks = [0.0, 0.0]
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        errors: list[bytes] = []
        drain = threading.Thread(target=lambda: errors.append(process.stderr.read()))
        drain.start()
        while process.poll() is None:
            peaks = [max(pair) for pair in zip(peaks, tree_memory(process.pid), strict=True)]
            time.sleep(0.1)
        drain.join()
    if process.returncode:
        raise SystemExit(errors[0].decode())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu, "main_mb": peaks[0], "all_mb": peaks[1]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--each", type=int, default=46, help="pictures a person, on average")
    parser.add_argument("--stock", type=int, default=300, help="different pictures")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        place = Path(temporary)
        stock = pictures(args.stock)
        started = time.perf_counter()
        write_face_set(place / "set", people(args.images, args.each, stock))
        size = (place / "set" / "train.rec").stat().st_size
        expected = sorted(
            hashlib.sha256(picture).digest() for person in people(args.images, args.each, stock) for picture in person
        )
        mean = np.mean([len(picture) for picture in stock])
        print(f"{args.images:,} pictures of {mean:,.0f} bytes written in {time.perf_counter() - started:.1f} s")
        print(f"train.rec has {size / 1e6:,.0f} MB")
        for number, workers in enumerate(args.workers):
            environment = {**os.environ, "ANONFW_CACHE": str(place / f"cache{number}")}
            out = place / f"out{number}"
            command = [sys.executable, str(ROOT / "data" / "casia_webface.py"), str(place / "set"), str(out)]
            row = run([*command, "--workers", str(workers)], environment)
            if checksum(out) != expected:
                raise SystemExit("the JPEGs in the shards are not those of the .rec file")
            rows.append(
                {"workers": workers, "images": args.images, **{name: round(value, 1) for name, value in row.items()}}
            )
    print(f"{'workers':>7} {'seconds':>8} {'CPU s':>7} {'img/s':>7} {'main MB':>8} {'all MB':>7}")
    for row in rows:
        rate = row["images"] / row["seconds"]
        numbers = (row["seconds"], row["cpu_seconds"], f"{rate:,.0f}", row["main_mb"], row["all_mb"])
        print("{:>7} {:>8} {:>7} {:>7} {:>8} {:>7}".format(row["workers"], *numbers))
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
