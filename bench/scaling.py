"""How training scales: `python bench/scaling.py` over processes, and with `--estimate` over GPUs, on paper.

Measured here (weak scaling: every process keeps its batch): samples a second of 1 process, 2 with DDP and 2 with FSDP2,
in turns; CPU time of a step, which neighbours on the machine hardly change; the share of the step that waits for data;
the time to sum the gradients alone; time and size of a checkpoint; and bytes that one rank keeps of parameters, average
and optimizer. docs/scaling.md has the tables.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


# On paper.


@dataclass(frozen=True)
class Machine:
    """Per GPU. Rates are what is reached, not what is printed on the box."""

    flops: float = 316e12  # 40 % of the 790 TFLOP/s that an H200 reaches in a bf16 matrix product
    nvlink: float = 360e9  # bytes a second, each direction, of a collective within a node (450 printed, 80 %)
    network: float = 40e9  # bytes a second between nodes: one 400 Gbit/s InfiniBand card a GPU, 80 %
    latency: float = 20e-6  # seconds of each message of a ring
    node: int = 8
    overlap: float = 0.8  # share of the backward pass that gradients can be summed under
    cores: int = 12  # of the node's CPUs, for each GPU's loader
    disk: float = 2e9  # bytes a second that one writer reaches on a shared file system
    disks: float = 20e9  # and all of them together
    host: float = 0.5e-3  # seconds of Python a step: Lightning, logging, optimizer
    jitter: float = 0.02  # standard deviation of a GPU's compute time; a step waits for the slowest of them


@dataclass(frozen=True)
class Job:
    """A recipe of recipes/paper: batch a GPU; training FLOPs and bytes read a sample; parameters trained and frozen."""

    name: str
    batch: int
    flops: float
    trained: float
    frozen: float
    per_core: float  # samples a second that one core decodes

    def backward(self, machine: Machine) -> float:
        """Seconds: of a step, two thirds, where gradients go through the whole network."""
        return 2 / 3 * self.batch * self.flops / machine.flops


# FLOPs by torch's FlopCounterMode over the networks, forward and backward. Parameters counted in them; the adapter's
# are 341 M keys and values of 70 layers and 186 M of LoRA with rank 128. A JPEG of 112 px takes 50 us of a core.
JOBS = (
    Job("identity_mapper (E_I, cached embeddings)", 1024, 28.3e6, 5.8e6, 0, 1e6),
    Job("iddiffuse 112 px, U-Net 93.6 M", 32, 268e9, 93.6e6, 44e6, 2e4),
    Job("id2face 512 px, SD 1.5, codec online, pairs", 4, 2 * 3594e9, 890e6, 84e6 + 44e6, 450),
    Job("sdxl_adapter 512 px, cached latents", 8, 3211e9, 341e6 + 186e6, 2.57e9, 1e5),
    Job("sdxl_adapter 1024 px, cached latents", 4, 14406e9, 341e6 + 186e6, 2.57e9, 1e5),
    Job("SDXL 1024 px, all of the U-Net", 4, 20283e9, 2.57e9, 0.9e9, 1e5),
)


def ring(size: float, ranks: int, rate: float, latency: float) -> float:
    """Seconds of a reduce-scatter or an all-gather of `size` bytes: (n - 1) / n of them pass each rank's link."""
    return 0.0 if ranks == 1 else (ranks - 1) / ranks * size / rate + (ranks - 1) * latency


def gather(size: float, gpus: int, machine: Machine) -> float:
    """Seconds to gather or to reduce-scatter `size` bytes over all GPUs: in nodes, and each card its part between."""
    inside, nodes = min(gpus, machine.node), max(1, gpus // machine.node)
    return ring(size, inside, machine.nvlink, machine.latency) + ring(
        size / inside, nodes, machine.network, machine.latency
    )


def estimate(job: Job, gpus: int, machine: Machine, sharded: bool = False) -> dict[str, float]:
    """Seconds of a step on paper, and what follows.

    DDP sums float32 gradients: an all-reduce is a reduce-scatter and an all-gather. FSDP2 gathers all parameters in
    bfloat16 twice (forward, backward) and scatters the trained ones' float32 gradients.
    """
    compute = job.batch * job.flops / machine.flops
    if sharded:
        traffic = 2 * gather(2 * (job.trained + job.frozen), gpus, machine) + gather(4 * job.trained, gpus, machine)
        hidden = machine.overlap * compute
    else:
        traffic = 2 * gather(4 * job.trained, gpus, machine)
        hidden = machine.overlap * job.backward(machine)
    # The last bucket has nothing to hide under.
    last = 0.0 if gpus == 1 else traffic * min(1.0, 25e6 / (4 * job.trained))
    waiting = max(0.0, traffic - hidden, last)
    slowest = compute * machine.jitter * math.sqrt(2 * math.log(gpus))  # expected excess of the largest of n normals
    loader = job.batch / (job.per_core * machine.cores)
    step = max(compute + slowest + waiting, loader, machine.host)
    states = 4 + 4 + 8 + 4  # parameter, gradient, AdamW, average: float32
    cut = gpus if sharded else 1
    saved = 16 * job.trained
    return {
        "compute": compute,
        "traffic": traffic,
        "waiting": waiting,
        "slowest": slowest,
        "loader": loader,
        "step": step,
        "samples_per_second": gpus * job.batch / step,
        "efficiency": compute / step,
        "state_bytes": (states * job.trained + 2 * job.frozen) / cut,
        "checkpoint_bytes": saved,
        "checkpoint_seconds": saved / (min(gpus * machine.disk, machine.disks) if sharded else machine.disk),
    }


def estimates(machine: Machine, gpus: tuple[int, ...] = (8, 16, 32, 64, 128, 256)) -> str:
    """The table of docs/scaling.md: a row for each job and layout."""
    lines = [
        f"| job (samples a GPU) | layout | compute ms | {' | '.join(f'{n} GPUs' for n in gpus)} "
        f"| samples/s, {gpus[-1]} | traffic ms, {gpus[0]} and {gpus[-1]} | state GB, {gpus[0]} and {gpus[-1]} "
        f"| checkpoint, {gpus[0]} |",
        "|" + "---|" * (len(gpus) + 7),
    ]
    for job in JOBS:
        for sharded in (False, True):
            each = [estimate(job, n, machine, sharded) for n in gpus]
            few, many = each[0], each[-1]
            shares = " | ".join(f"{100 * one['efficiency']:.0f} %" for one in each)
            lines.append(
                f"| {job.name} ({job.batch}) | {'FSDP2' if sharded else 'DDP'} | {1e3 * few['compute']:.1f} | {shares} "
                f"| {many['samples_per_second']:,.0f} | {1e3 * few['traffic']:.1f}, {1e3 * many['traffic']:.1f} "
                f"| {few['state_bytes'] / 1e9:.1f}, {many['state_bytes'] / 1e9:.1f} "
                f"| {few['checkpoint_bytes'] / 1e9:.1f} GB in {few['checkpoint_seconds']:.1f} s |"
            )
    return "\n".join(lines)


# Measured.

LAYOUTS = {
    "1 process": (1, None),
    "2, DDP": (2, "ddp"),
    "2, FSDP2": (2, "{_target_: anonfw.training.fsdp.FSDP2, min_parameters: 0}"),
}


def worker(recipe: Path, changes: list[str], folder: Path, steps: int) -> None:
    """One rank: trains, and rank 0 writes what it measured to FOLDER.json."""
    import lightning
    import torch

    from anonfw import recipe as recipes
    from anonfw.training import fit as fitting
    from anonfw.training.checkpoint import Checkpoints
    from anonfw.training.ema import EMA, local
    from anonfw.training.ranks import decided_once

    torch.set_num_threads(1)
    times: dict[str, list[float]] = {"step": [], "cpu": [], "data": [], "save": []}
    found: dict[str, float] = {}
    save = Checkpoints.save

    def timed_save(self: Checkpoints, trainer: lightning.Trainer) -> None:
        if trainer.global_step != self._saved:
            start = time.perf_counter()
            save(self, trainer)
            times["save"].append(time.perf_counter() - start)

    Checkpoints.save = timed_save

    class Clock(lightning.Callback):
        """A step is from batch to batch; its wait for data ends with `on_train_batch_start`."""

        ended = used = 0.0

        def on_train_batch_start(self, *_: object) -> None:
            if self.ended:
                times["data"].append(time.perf_counter() - self.ended)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:  # noqa: ARG002
            now, cpu = time.perf_counter(), time.process_time()
            if self.ended:
                times["step"].append(now - self.ended)
                times["cpu"].append(cpu - self.used)
            self.ended, self.used = now, cpu
            found["batch"] = len(batch) * (1 if batch.partner is None else 2)

        def on_train_end(self, trainer, pl_module) -> None:
            trained = [local(p) for p in pl_module.parameters() if p.requires_grad]
            found["parameter_bytes"] = sum(p.nbytes for p in trained)
            found["frozen_bytes"] = sum(local(p).nbytes for p in pl_module.parameters() if not p.requires_grad)
            averages = [each for each in trainer.callbacks if isinstance(each, EMA)]
            found["average_bytes"] = sum(local(mean).nbytes for each in averages for mean in each.average.values())
            states = [value for state in trainer.optimizers[0].state.values() for value in state.values()]
            found["optimizer_bytes"] = sum(local(value).nbytes for value in states)
            found["sum_seconds"] = self._sums(sum(p.numel() for p in pl_module.parameters() if p.requires_grad))

        @staticmethod
        def _sums(numbers: int) -> float:
            """Seconds to sum as many float32 as there are trained parameters over the ranks, nothing beside it."""
            if not torch.distributed.is_initialized():
                return 0.0
            gradients, took = torch.zeros(numbers), []
            for _ in range(5):
                torch.distributed.barrier()
                start = time.perf_counter()
                torch.distributed.all_reduce(gradients)
                took.append(time.perf_counter() - start)
            return statistics.median(took)

    read = recipes.read(recipe, changes)
    decided_once(lambda: str(fitting.open_run(read)[0]))
    callbacks = fitting.built
    fitting.built = lambda nodes, place: callbacks(nodes, place) + ([Clock()] if nodes is read["callbacks"] else [])
    fitting.fit(read, folder, None)
    if int(os.environ.get("RANK", "0")) == 0:
        files = [path for path in (folder / "checkpoints" / f"step={steps}.ckpt").rglob("*") if path.is_file()]
        single = folder / "checkpoints" / f"step={steps}.ckpt"
        found["checkpoint_bytes"] = sum(path.stat().st_size for path in files or [single])
        medians = {name: statistics.median(values) for name, values in times.items() if values}
        Path(f"{folder}.json").write_text(json.dumps(found | medians))


def measure(layout: str, args: argparse.Namespace, place: Path) -> dict[str, float]:
    """One run in fresh processes, each with one thread and its own batch."""
    ranks, strategy = LAYOUTS[layout]
    folder = place / f"{ranks}-{time.monotonic_ns()}"
    changes = [
        "init=null", "evaluate=null", f"trainer.max_steps={args.steps}", "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false", f"trainer.devices={ranks}", "data.validate=null",
        f"callbacks.checkpoint.every={args.steps}", f"run={folder}", *args.overrides,
    ]  # fmt: skip
    if strategy:
        changes.append(f"trainer.strategy={strategy}")
    itself = [str(Path(__file__).resolve()), "--worker", str(folder), "--steps", str(args.steps)]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", *launch, *itself, "--recipe", str(args.recipe), *changes]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(Path(f"{folder}.json").read_text())


def report(rounds: dict[str, list[dict[str, float]]]) -> str:
    """Medians over the rounds; of the rate also the smallest and the largest."""

    def middle(each: list[dict[str, float]], what: str) -> float:
        return statistics.median(found[what] for found in each)

    lines = [
        "| processes | samples/s (min, max) | efficiency | step ms | CPU ms | waits for data | sums gradients, ms |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    rates = {name: [LAYOUTS[name][0] * found["batch"] / found["step"] for found in rounds[name]] for name in rounds}
    alone = statistics.median(next(iter(rates.values())))
    for name, each in rounds.items():
        rate = statistics.median(rates[name])
        lines.append(
            f"| {name} | {rate:.1f} ({min(rates[name]):.1f}, {max(rates[name]):.1f}) "
            f"| {100 * rate / (LAYOUTS[name][0] * alone):.0f} % | {1e3 * middle(each, 'step'):.0f} "
            f"| {1e3 * middle(each, 'cpu'):.0f} | {100 * middle(each, 'data') / middle(each, 'step'):.1f} % "
            f"| {1e3 * middle(each, 'sum_seconds'):.0f} |"
        )
    lines += ["", "| processes | parameters MB | average MB | optimizer MB | frozen MB | checkpoint MB | saved in s |"]
    lines.append("|---|---|---|---|---|---|---|")
    for name, each in rounds.items():
        sizes = [
            each[0][f"{what}_bytes"] / 1e6 for what in ("parameter", "average", "optimizer", "frozen", "checkpoint")
        ]
        lines.append(f"| {name} | {' | '.join(f'{size:.2f}' for size in sizes)} | {middle(each, 'save'):.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--estimate", action="store_true", help="print the table for 8 to 256 GPUs and end")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "id2face.yaml")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.estimate:
        print(estimates(Machine()))
    elif args.worker:
        worker(args.recipe, args.overrides, args.worker, args.steps)
    else:
        rounds: dict[str, list[dict[str, float]]] = {layout: [] for layout in LAYOUTS}
        with tempfile.TemporaryDirectory() as place:
            for _ in range(args.rounds):
                for layout, found in rounds.items():
                    found.append(measure(layout, args, Path(place)))
        print(report(rounds))


if __name__ == "__main__":
    main()
