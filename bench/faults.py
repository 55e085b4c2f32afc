"""What a run survives: kill -9 at random moments, a full disk, a folder without the right to write, a clock that jumps,
shards that vanish or change, a loader worker that dies, a NaN on one rank.

    python bench/faults.py --out faults.json               # 100 kills, then each other fault once
    python bench/faults.py --kills 6 --only kills

Every training is a recipe (ID2Face's) made tiny (tests/tiny_training.py), a checkpoint after each step, in a process of
its own: forked, so that the seconds of imports are paid once. A run that was hit is continued by the same command until
it ends, and must then equal an undisturbed one bit for bit: weights, averages, optimizer, position in the data, and
each row of metrics.jsonl.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import tiny_training as tiny

from anonfw.errors import AnonfwError
from anonfw.training import fit as fitting

PATIENCE = 600  # seconds that a training of seconds may take on a loaded machine
FACES = Path(__file__).resolve().parent.parent / "anonfw" / "faces"


class Child:
    """`work()` in a forked process. Its exit code is that of the command line; what it prints goes to `log`."""

    def __init__(self, work: Callable[[], object], log: Path) -> None:
        self.log, self.code = log, None
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(file, 1), os.dup2(file, 2)
            work()
            code = 0
        except AnonfwError as error:
            print(f"anonfw: {error}", flush=True)
            code = error.exit_code
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)

    def ended(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, seconds: float = PATIENCE) -> int:
        """The exit code; a child that takes longer is killed.

        Raises:
            TimeoutError: it took longer.
        """
        until = time.monotonic() + seconds
        while not self.ended():
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"not ended after {seconds:.0f} s\n{self.said()}")
            time.sleep(0.005)
        return self.code

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.code = -signal.SIGKILL

    def said(self) -> str:
        return self.log.read_text()[-3000:] if self.log.exists() else ""

    def last_line(self) -> str:
        lines = [line for line in self.said().splitlines() if line.startswith("anonfw: ")]
        return lines[-1].removeprefix("anonfw: ") if lines else self.said().strip().rpartition("\n")[2]


class Bench:
    """Trainings in one folder, all alike. Each method is one fault and returns a row of what happened."""

    def __init__(self, place: Path, seed: int, recipe: Path = tiny.RECIPE) -> None:
        self.place, self.rng, self.recipe, self.number = place, random.Random(seed), recipe, 0
        self.whole = place / "whole"
        child = self.start(self.whole)
        if child.wait():
            raise RuntimeError(f"the undisturbed training failed\n{child.said()}")
        self.seconds = time.monotonic() - child.began

    def folder(self, name: str) -> Path:
        self.number += 1
        return self.place / f"{name}-{self.number}"

    def start(
        self, folder: Path, *more: str, faces: Path = FACES, before: Callable[[], object] = lambda: None
    ) -> Child:
        """What the same command does, again and again. `before` runs in the child."""
        # With every person of a split in one shard the limits leave the same samples in a copy of the data set.
        overrides = tiny.overrides(faces, "data.validate=null", *more, path=self.recipe)
        recipe = tiny.recipes.load(self.recipe, [*overrides, f"run={folder}"])

        def work() -> None:
            before()
            tiny.train(recipe)

        return Child(work, folder.with_name(f"{folder.name}.log"))

    def same(self, folder: Path) -> str:
        """`bitwise equal`, or where the run differs from the undisturbed one."""
        try:
            tiny.assert_same_end(folder, self.whole)
            assert list(tiny.curve(folder)) == list(range(tiny.STEPS)), f"rows of {list(tiny.curve(folder))}"
            assert tiny.curve(folder) == tiny.curve(self.whole), "a logged loss differs"
        except AssertionError as difference:
            return f"differs: {difference}"
        return "bitwise equal"

    def finish(self, folder: Path, *more: str, faces: Path = FACES) -> str:
        """The same command again, and whether it ends like the undisturbed run."""
        child = self.start(folder, *more, faces=faces)
        return self.same(folder) if child.wait() == 0 else f"did not end: {child.last_line()}"

    def kills(self, count: int) -> dict:
        """`count` kills at moments drawn uniformly over the time that the last undisturbed training took."""
        made = saving = runs = 0
        ends: list[str] = []
        while made < count:
            folder = self.folder("kill")
            runs, before = runs + 1, made
            child = self.start(folder)
            while made < count:
                moment = child.began + self.rng.uniform(0, self.seconds)
                while time.monotonic() < moment and not child.ended():
                    time.sleep(0.001)
                if child.ended():
                    if made == before:  # nobody disturbed it: how fast the machine is now
                        self.seconds = time.monotonic() - child.began
                    break
                child.kill()
                made += 1
                saving += any((folder / "checkpoints").glob(".*.partial"))
                if (folder / "finished.json").exists():
                    break  # it was hit when all was done: there is nothing to continue
                child = self.start(folder)
            done = child.wait() == 0 or (folder / "finished.json").exists()
            ends.append(self.same(folder) if done else f"did not end: {child.last_line()}")
            if ends[-1] == "bitwise equal":
                shutil.rmtree(folder)
            print(f"  {made} kills ({saving} while saving), {runs} runs; this one: {ends[-1]}", flush=True)
        good = ends.count("bitwise equal")
        return {
            "fault": f"kill -9, {made} times",
            "met": f"{saving} of them while a checkpoint was written",
            "end": f"{good} of {runs} runs bitwise equal",
            "ok": good == runs,
            "others": [end for end in ends if end != "bitwise equal"],
        }

    def row(self, fault: str, child: Child, end: str, wanted: tuple[int, ...] = (2,)) -> dict:
        return {
            "fault": fault,
            "met": f"exit code {child.code}: {child.last_line()}" if child.code else "it trained on",
            "end": end,
            "ok": child.code in wanted and end == "bitwise equal",
        }

    def full_disk(self) -> dict:
        """No file may grow beyond 100 kB from the third step on: a checkpoint breaks off in the middle."""
        folder = self.folder("full")

        def full() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            at_batch(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))

        child = self.start(folder, before=full)
        child.wait()
        return self.row("disk full while a checkpoint is written", child, self.finish(folder))

    def read_only(self) -> dict:
        """The checkpoints' folder loses the right to write after the third step."""
        folder = self.folder("readonly")
        checkpoints = folder / "checkpoints"

        def protect() -> None:
            obey_permissions()
            checkpoints.chmod(0o500)

        child = self.start(folder, before=lambda: at_batch(3, protect))
        child.wait()
        checkpoints.chmod(0o700)
        return self.row("the run folder becomes read-only", child, self.finish(folder))

    def clock(self) -> dict:
        """The clock goes back a day after the second step, the run is killed after the fourth, and is found again."""
        folder = self.folder("clock")

        def back() -> None:
            now = time.time()
            time.time = lambda: now - 86400.0
            time.time_ns = lambda: int((now - 86400.0) * 1e9)

        def jump() -> None:
            at_batch(2, back)
            at_batch(4, lambda: os.kill(os.getpid(), signal.SIGKILL))

        child = self.start(folder, before=jump)
        child.wait()
        return self.row("the clock jumps back a day, then kill -9", child, self.finish(folder), (-signal.SIGKILL,))

    def shard(self, what: str) -> dict:
        """After the second step a shard is deleted, or gets other bytes of its length; after the fourth, kill -9."""
        folder, faces = self.folder(what), self.folder("faces")
        shutil.copytree(FACES, faces)
        shard = sorted(faces.glob("*train*.tar"))[0]
        kept = shard.read_bytes()

        def harm() -> None:
            if what == "vanishes":
                shard.unlink()
            else:
                shard.write_bytes(kept[:512] + bytes(len(kept) - 512))

        def plan() -> None:
            at_batch(2, harm)
            at_batch(4, lambda: os.kill(os.getpid(), signal.SIGKILL))

        first = self.start(folder, faces=faces, before=plan)
        trained_on = first.wait() == -signal.SIGKILL
        itself = "trained on until it was killed" if trained_on else first.last_line()
        again = self.start(folder, faces=faces)
        again.wait()
        shard.write_bytes(kept)
        row = self.row(f"a shard {what} under the run", again, self.finish(folder, faces=faces))
        row["met"] = f"the run itself: {itself}; continued: {row['met']}"
        shutil.rmtree(faces)
        return row

    def worker(self) -> dict:
        """The loader's worker process is killed after the second step."""
        folder = self.folder("worker")

        def shoot() -> None:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in map(int, children):
                os.kill(pid, signal.SIGKILL)

        child = self.start(folder, "data.train.workers=1", before=lambda: at_batch(2, shoot))
        child.wait()
        return self.row("a loader worker is killed", child, self.finish(folder, "data.train.workers=1"))

    def nan(self) -> dict:
        """Two ranks; rank 1's loss is NaN at step 3. Both end, and the message names term and sample."""
        folder = self.folder("nan")
        planted = "system.losses.planted={_target_: tiny_training.PlantedNaN, after: %d}"
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]

        def rank(number: int) -> Child:
            def enter() -> None:
                os.environ |= {
                    "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                    "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x",
                }  # fmt: skip

            return self.rank(folder, number, planted % (3 if number else 10**9), enter)

        children = [rank(0), rank(1)]
        codes = [child.wait() for child in children]
        return {
            "fault": "a NaN on rank 1 of 2",
            "met": f"exit codes {codes}: {children[1].last_line()}",
            "end": "both ranks end, nobody waits",
            "ok": all(codes) and "planted" in children[1].said(),
        }

    def rank(self, folder: Path, number: int, more: str, enter: Callable[[], object]) -> Child:
        """One rank of a two-rank training in `folder`; rank 0 makes it, the other one waits for it."""
        overrides = tiny.overrides(FACES, "data.validate=null", more, "trainer.devices=2", "trainer.strategy=ddp")
        args = argparse.Namespace(recipe=str(tiny.RECIPE), overrides=[*overrides, f"run={folder}"], new=False)

        def work() -> None:
            enter()
            fitting.run(args)

        return Child(work, folder.with_name(f"{folder.name}-{number}.log"))


def at_batch(number: int, act: Callable[[], object]) -> None:
    """Has `act` called before training batch `number` (from 0) of this process."""
    from anonfw.system import System

    plain = System.training_step

    def training_step(self: System, *arguments: object) -> object:
        if self.batches_seen == number:
            act()
        return plain(self, *arguments)

    System.training_step = training_step


def obey_permissions() -> None:
    """Gives up root's right to write everywhere (CAP_DAC_OVERRIDE)."""
    if os.geteuid():
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    sets = (ctypes.c_uint32 * 6)()
    library = ctypes.CDLL(None, use_errno=True)
    library.capget(header, sets)
    sets[0] &= ~(1 << 1)
    if library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


FAULTS: dict[str, Callable[[Bench], dict]] = {
    "full_disk": Bench.full_disk,
    "read_only": Bench.read_only,
    "clock": Bench.clock,
    "vanishes": lambda bench: bench.shard("vanishes"),
    "changes": lambda bench: bench.shard("changes"),
    "worker": Bench.worker,
    "nan": Bench.nan,
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill, starve and poison small trainings; each must end as if not.")
    parser.add_argument("--kills", type=int, default=100, help="how many kill -9 (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--recipe", type=Path, default=tiny.RECIPE, help="made tiny as in tests/tiny_training.py")
    parser.add_argument("--only", nargs="*", choices=["kills", *FAULTS], help="only these faults")
    parser.add_argument("--out", type=Path, help="JSON file for the rows")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)  # also: no thread is lost in a fork
    chosen = args.only or ["kills", *FAULTS]
    rows = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="anonfw-faults-") as place:
        bench = Bench(Path(place), args.seed, args.recipe)
        print(f"an undisturbed training takes {bench.seconds:.1f} s", flush=True)
        for name in chosen:
            rows.append(bench.kills(args.kills) if name == "kills" else FAULTS[name](bench))
            row = rows[-1]
            print(f"{'ok ' if row['ok'] else 'BAD'} {row['fault']}: {row['met']} -> {row['end']}", flush=True)
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} as wanted, {time.monotonic() - began:.0f} s")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
