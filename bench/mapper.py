"""The identity mapper at the paper's size: 500,000 samples x 3 recognisers x 512, MLP 1536-2048-1024-512, 50 epochs.

    python bench/mapper.py --out mapper.json
    python bench/mapper.py --samples 500000 --batch-size 4096 --steps 2000     # with a GPU: the size itself

Four rates of the same work, each after warming up: the bare step on embeddings that lie on the device (what the device
can do), the same batches through `System` and Lightning, the loader alone (sidecars of generated shards, no picture
decoded), and the whole of `fit`'s path. The embeddings are made up, so the time is real and the loss means nothing.
On a CPU the CPU time is the robust column: wall times suffer when other jobs run.
The paper: more than 60 hours on one RTX 4090.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from torch import nn

from anonfw.batch import FaceBatch
from anonfw.data.loader import FaceLoader
from anonfw.data.writer import DatasetWriter, Sample
from anonfw.losses.triplet import Triplet
from anonfw.systems.identity_mapper import IdentityMapper
from anonfw.training.fit import best_precision, quiet

PAPER_SAMPLES, PAPER_EPOCHS, PAPER_HOURS = 500_000, 50, 60
DIM, PHOTOS = 512, 50
NAMES = ("one", "two", "three")


class Named(nn.Module):
    """A recogniser that is never asked: its embeddings come from sidecars."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.dim = name, DIM


def make_dataset(folder: Path, samples: int) -> None:
    """People of PHOTOS photos, one grey JPEG for all, and random embeddings around a centre each."""
    jpeg = simplejpeg.encode_jpeg(np.full((16, 16, 3), 128, np.uint8))
    rng = np.random.default_rng(0)
    landmarks = np.full((5, 2), 8.0)
    with DatasetWriter(
        folder,
        name="bench",
        image_size=16,
        alignment="arcface",
        source="noise",
        licence="none",
        shard_samples=10_000,
        sidecars=dict.fromkeys(NAMES, "0" * 64),
    ) as writer:
        for person in range(samples // PHOTOS):
            drawn = rng.standard_normal((len(NAMES), 1, DIM), np.float32) + rng.standard_normal(
                (len(NAMES), PHOTOS, DIM), np.float32
            )
            drawn /= np.linalg.norm(drawn, axis=-1, keepdims=True)
            photos = [
                Sample(f"{person}_{i}", jpeg, landmarks, {}, {n: drawn[k, i] for k, n in enumerate(NAMES)})
                for i in range(PHOTOS)
            ]
            writer.add_identity("train", str(person), photos)


def make_system(mining: str, margin: float) -> IdentityMapper:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return IdentityMapper(
            [Named(name) for name in NAMES],
            {"triplet": Triplet(margin, mining)},
            functools.partial(torch.optim.AdamW, lr=3e-4, fused=True),
        )


class Seconds(NamedTuple):
    """Of one step."""

    wall: float
    cpu: float

    @staticmethod
    def now() -> Seconds:
        return Seconds(time.perf_counter(), time.process_time())

    def since(self, begin: Seconds, steps: int) -> Seconds:
        return Seconds((self.wall - begin.wall) / steps, (self.cpu - begin.cpu) / steps)


def bare(args: argparse.Namespace, batches: list[FaceBatch], device: str) -> Seconds:
    """A step without any framework."""
    system = make_system(args.mining, 1.0).to(device).train()
    optimizer = system.configure_optimizers()
    batches = [batch.to(device) for batch in batches]
    rng = torch.Generator(device).manual_seed(0)
    half = best_precision() == "bf16-mixed"

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        with torch.autocast(device, torch.bfloat16, enabled=half):
            out = system.step(batch, rng)
            out.rng = rng
            loss = system.losses["triplet"](out, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return seconds_each(step, args.steps, device)


def seconds_each(step: Callable[[int], object], steps: int, device: str) -> Seconds:
    """Of `steps` calls after a tenth of them."""
    warm = max(2, steps // 10)
    for number in range(warm):
        step(number)
    _wait(device)
    begin = Seconds.now()
    for number in range(steps):
        step(number)
    _wait(device)
    return Seconds.now().since(begin, steps)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Resident:
    """Batches that lie on the device, again and again."""

    def __init__(self, batches: list[FaceBatch], steps: int) -> None:
        self.batches, self.steps = batches, steps

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[FaceBatch]:
        for number in range(self.steps):
            yield self.batches[number % len(self.batches)]


def trained(args: argparse.Namespace, loader: Iterable[FaceBatch], device: str) -> Seconds:
    """A step through Lightning, with the recipe's guard."""
    import lightning

    from anonfw.training.guard import FiniteGuard

    class Clock(lightning.Callback):
        begin = Seconds(0.0, 0.0)

        def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
            if trainer.global_step == warm:
                _wait(device)
                self.begin = Seconds.now()

    warm, clock = max(2, args.steps // 10), Clock()
    trainer = lightning.Trainer(
        max_steps=args.steps + warm,
        max_epochs=-1,
        precision=best_precision(),
        accelerator="gpu" if device == "cuda" else "cpu",
        devices=1,
        callbacks=[clock, FiniteGuard(every=50)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(make_system(args.mining, 1.0), loader)
    _wait(device)
    return Seconds.now().since(clock.begin, args.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000, help="of the generated data set")
    parser.add_argument("--batch-size", type=int, default=1024)
    parser.add_argument("--per-identity", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--mining", choices=("hard", "semi-hard", "random"), default="hard")
    parser.add_argument("--dataset", type=Path, help="keep the generated shards there, and use them again")
    parser.add_argument("--out", type=Path, help="the numbers as JSON")
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.dataset or Path(temporary) / "set"
        begin = time.perf_counter()
        if not (folder / "card.json").exists():
            make_dataset(folder, args.samples)
        written = time.perf_counter() - begin
        result = measure(args, folder, device)
    result |= {"made the shards, s": round(written, 1)}
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


def measure(args: argparse.Namespace, folder: Path, device: str) -> dict:
    def open_loader() -> FaceLoader:
        return FaceLoader(
            folder,
            "train",
            args.batch_size,
            mode="groups",
            per_identity=args.per_identity,
            sidecars=NAMES,
            decode=False,
            bad_samples_file=folder / "bad_samples.jsonl",
        )

    def endless() -> Iterator[FaceBatch]:
        loader = open_loader()
        while True:
            yield from loader

    stream = endless()
    some = [next(stream) for _ in range(8)]
    system = make_system(args.mining, 1.0)
    parameters = sum(p.numel() for p in system.mapper.parameters())
    seconds = {
        "bare step": bare(args, some, device),
        "Lightning, resident batches": trained(args, Resident([b.to(device) for b in some], args.steps * 2), device),
        "loader alone": seconds_each(lambda _: next(stream), args.steps, "cpu"),
        "loader and Lightning (fit)": trained(args, open_loader(), device),
    }
    total = PAPER_SAMPLES * PAPER_EPOCHS
    kinds = {
        kind: {name: args.batch_size / getattr(each, kind) for name, each in seconds.items()}
        for kind in Seconds._fields
    }
    print(f"{'':<28} {'samples/s':>12} {'minutes':>9}   samples/s of CPU time, minutes: 50 epochs of 500,000")
    for name in seconds:
        wall, cpu = kinds["wall"][name], kinds["cpu"][name]
        print(f"{name:<28} {wall:>12,.0f} {total / wall / 60:>9.1f}   {cpu:>12,.0f} {total / cpu / 60:>9.1f}")
    over = {
        kind: getattr(seconds["Lightning, resident batches"], kind) / getattr(seconds["bare step"], kind) - 1
        for kind in Seconds._fields
    }
    print(
        f"Lightning and System over the bare step: {100 * over['wall']:+.1f} % of wall time, "
        f"{100 * over['cpu']:+.1f} % of CPU time; the paper took more than {PAPER_HOURS} hours"
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "load average": os.getloadavg()[0],
        "precision": best_precision(),
        "parameters": parameters,
        "batch size": args.batch_size,
        "samples on disk": args.samples,
        "steps": args.steps,
        "mining": args.mining,
        "GFLOP per sample": round(6 * parameters / 1e9, 4),
        "samples per second": {k: {n: round(rate) for n, rate in rates.items()} for k, rates in kinds.items()},
        "projected minutes": {
            k: {n: round(total / rate / 60, 1) for n, rate in rates.items()} for k, rates in kinds.items()
        },
        "Lightning overhead": {kind: round(value, 4) for kind, value in over.items()},
        "paper hours": PAPER_HOURS,
    }


if __name__ == "__main__":
    main()
