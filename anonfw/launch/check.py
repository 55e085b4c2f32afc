"""What stops a job in its first seconds instead of after an hour. Runs on the first node, before any rank starts.

Each check raises an AnonfwError of one line. A data set needs no more shards than one: ranks and workers read rows by
their place in the global order, so what must be large enough is the split, not the number of its files.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from anonfw import recipe as recipes
from anonfw.errors import AnonfwError, RecipeError

FREE_BYTES = 2e9
PROBE_SECONDS = 60

# Run on every node: can it reach rank 0's address, does it see the run folder and the interpreter?
PROBE = """
if ! timeout 20 bash -c "exec 3<>/dev/tcp/$MASTER_ADDR/$MASTER_PORT" 2>/dev/null; then
    echo "$SLURMD_NODENAME cannot reach $MASTER_ADDR:$MASTER_PORT"
elif [[ ! -e $0 ]]; then echo "$SLURMD_NODENAME does not see $0: the run folder must lie on a shared file system"
elif [[ ! -x $1 ]]; then echo "$SLURMD_NODENAME does not see $1: install Python on a shared file system"
else echo "ok $SLURMD_NODENAME"; fi
"""


def before_start(recipe_path: str, overrides: Sequence[str]) -> None:
    """Every check, in the order of what they cost. A requeued job's recipe is not checked against its classes again.

    Raises:
        AnonfwError: the first that fails.
    """
    job = {name: value for name, value in os.environ.items() if name.startswith("SLURM_")}
    ranks_fit_devices(job)
    recipe = recipes.load(recipe_path, list(overrides))
    if mistakes := recipe.mistakes if int(job.get("SLURM_RESTART_COUNT", 0)) else recipes.check(recipe):
        raise RecipeError(mistakes)
    trainer = recipe["trainer"]
    world = _count(trainer.get("num_nodes", 1)) * _count(trainer.get("devices", 1))
    if "SLURM_NTASKS" in job and world != int(job["SLURM_NTASKS"]):
        raise AnonfwError(
            f"the recipe trains on {world} ranks (trainer.num_nodes x trainer.devices), the job has "
            f"{job['SLURM_NTASKS']} tasks: leave both keys to `launch`"
        )
    place = Path(recipe["run"]) if recipe.get("run") else Path("runs")
    room(place)
    data_feeds_ranks(recipe, world)
    if int(job.get("SLURM_JOB_NUM_NODES", 1)) > 1:
        nodes_meet(int(job["SLURM_JOB_NUM_NODES"]), place)
    free = shutil.disk_usage(_existing(place)).free / 1e9
    print(f"checked: {world} ranks, their data, {free:.0f} GB free, all nodes meet", flush=True)


def ranks_fit_devices(job: Mapping[str, str]) -> None:
    """One task a GPU, and tasks x nodes = all tasks (`--ntasks` alone or `--gpus-per-task` break that silently).

    Raises:
        AnonfwError: they do not fit.
    """
    if "SLURM_NTASKS" not in job:
        return
    tasks, nodes = int(job["SLURM_NTASKS"]), int(job.get("SLURM_JOB_NUM_NODES", 1))
    per_node = job.get("SLURM_NTASKS_PER_NODE")
    if per_node is None or int(per_node) * nodes != tasks:
        raise AnonfwError(
            f"{tasks} tasks on {nodes} nodes with --ntasks-per-node={per_node or 'not given'}: give --nodes and "
            "--ntasks-per-node, and no --ntasks"
        )
    gpus = job.get("SLURM_GPUS_ON_NODE")
    if gpus is not None and int(gpus) != int(per_node):
        raise AnonfwError(
            f"{per_node} tasks but {gpus} GPUs on a node: a task uses one GPU, so give both the same number "
            f"(--ntasks-per-node={gpus} --gpus-per-node={gpus})"
        )


def room(place: Path, least: float = FREE_BYTES) -> None:
    """The run folder's disk takes another checkpoint: twice the size of the largest one there, and at least `least`.

    Raises:
        AnonfwError: too little room, or no right to write.
    """
    there = _existing(place)
    if not os.access(there, os.W_OK):
        raise AnonfwError(f"{there} cannot be written: choose another run folder (run=FOLDER)")
    sizes = [_size(path) for path in (place / "checkpoints").glob("*")]
    need = max(least, 2 * max(sizes, default=0))
    free = shutil.disk_usage(there).free
    if free < need:
        raise AnonfwError(
            f"{there} has {free / 1e9:.1f} GB free, checkpoints need {need / 1e9:.1f} GB: make room, or choose another "
            "run folder (run=FOLDER)"
        )


def data_feeds_ranks(recipe: Mapping[str, Any], world: int) -> None:
    """The shards are there and whole by their sizes, and every rank gets a batch in each epoch.

    Raises:
        DataError: which loader's data is missing, changed, or too small for the ranks.
    """
    from anonfw.data.open import open_loader

    for name, node in recipe["data"].items():
        if node is None or name == "test":
            continue
        loader = open_loader(recipe, name, rank=0, world=world, workers=0)
        for shard, tar in zip(loader.table.shards, loader.table.tars, strict=True):
            size = Path(tar).stat().st_size if Path(tar).exists() else -1
            if size != shard.bytes:
                what = f"has {size} bytes, not {shard.bytes}" if size >= 0 else "is gone"
                raise AnonfwError(f"data.{name}: {tar} {what}: copy or write it again")
        len(loader)
        loader.close()


def nodes_meet(nodes: int, place: Path) -> None:
    """Every node reaches rank 0's port (MASTER_ADDR, MASTER_PORT) and sees run folder and interpreter.

    Raises:
        AnonfwError: the nodes that do not, in one line.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    command = ["srun", "--overlap", "--ntasks-per-node=1", f"--ntasks={nodes}", "bash", "-c", PROBE]
    command += [str(_existing(place).absolute()), sys.executable]
    with socket.create_server(("", port), backlog=1024) as server:
        greeter = threading.Thread(target=_greet, args=(server,))
        greeter.start()
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=PROBE_SECONDS, stdin=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired as error:
            raise AnonfwError(
                f"not all of {os.environ.get('SLURM_JOB_NODELIST')} answer srun within {PROBE_SECONDS} s"
            ) from error
        finally:
            server.shutdown(socket.SHUT_RDWR)  # ends a waiting `accept`, or the port would stay taken
            greeter.join()
    answers = done.stdout.splitlines()
    bad = sorted(answer for answer in answers if not answer.startswith("ok "))
    if bad:
        raise AnonfwError("; ".join(bad) + f" (rank 0's rendezvous is {address}:{port}; set MASTER_ADDR for another)")
    if done.returncode or len(answers) != nodes:
        raise AnonfwError(f"{len(answers)} of {nodes} nodes answer srun: {' '.join(done.stderr.split())[-300:]}")


def _greet(server: socket.socket) -> None:
    while True:
        try:
            server.accept()[0].close()
        except OSError:  # shut down: all have asked
            return


def _count(value: Any) -> int:
    """Lightning's `devices` as a number; `auto` and -1 count the GPUs of this machine."""
    if isinstance(value, list):
        return len(value)
    if str(value).lstrip("-").isdigit() and int(value) > 0:
        return int(value)
    import torch

    return max(torch.cuda.device_count(), 1)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def _existing(place: Path) -> Path:
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place
