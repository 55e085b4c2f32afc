"""Run folders: `runs/<recipe>/<time>/` with the resolved recipe, the commit, checkpoints, logs and results.

recipe.yaml           the recipe as it was resolved
run.json              command, commit, versions, fingerprint of the recipe
checkpoints/          step=N.ckpt with the hashes of its files in step=N.json; last.ckpt is a link to the newest
metrics.jsonl  grid/  model.safetensors  table.*  finished.json
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

from anonfw import __version__
from anonfw.data.files import atomic, write_json
from anonfw.errors import AnonfwError

ROOT = Path("runs")


def fingerprint(recipe_yaml: str) -> str:
    """Equal for recipes that resolve to the same text."""
    return hashlib.sha256(recipe_yaml.encode()).hexdigest()[:16]


def find_unfinished(name: str, mark: str, root: Path = ROOT) -> Path | None:
    """The newest folder of that recipe and fingerprint which has not finished; None if there is none."""
    return _newest_of(name, mark, root, finished=False)


def find_finished(name: str, mark: str, root: Path = ROOT) -> Path | None:
    """The newest folder of that recipe and fingerprint which has finished; None if there is none."""
    return _newest_of(name, mark, root, finished=True)


def _newest_of(name: str, mark: str, root: Path, finished: bool) -> Path | None:
    found = []
    for info in (root / name).glob("*/run.json"):
        record = json.loads(info.read_text())
        if record["fingerprint"] == mark and (info.parent / "finished.json").exists() == finished:
            found.append((record["started"], info.parent))
    return max(found)[1] if found else None


def numbered(folder: Path) -> list[tuple[int, Path]]:
    """(optimizer steps, checkpoint) of a run folder, the oldest first."""
    found = [(path.stem.removeprefix("step="), path) for path in (folder / "checkpoints").glob("step=*.ckpt")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def newest(folder: Path) -> Path | None:
    """The whole checkpoint of a run folder with the most steps; None if there is none. Tells of damaged ones."""
    from anonfw.training.storage import damage

    for _, path in reversed(numbered(folder)):
        if (what := damage(path)) is None:
            return path
        print(f"checkpoint {path} is damaged and not used ({what})", file=sys.stderr, flush=True)
    return None


def step_of(checkpoint: Path) -> int | None:
    """Optimizer steps behind a checkpoint; None where it is no whole checkpoint. Reads no tensors."""
    import pickle

    import torch

    from anonfw.training.storage import STRUCTURE

    file = checkpoint / STRUCTURE if checkpoint.is_dir() else checkpoint
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError):
        return None


def create(name: str, recipe_yaml: str, root: Path = ROOT, folder: Path | None = None, mark: str | None = None) -> Path:
    """A new run folder; the time in its name is UTC, and a number follows where two runs start in one second.

    Args:
        mark: what runs that are equal have in common; None for the fingerprint of the recipe.

    Raises:
        AnonfwError: `folder` was given and holds something else already.
    """
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S", time.gmtime())
    if folder is not None:
        if folder.exists() and any(folder.iterdir()):
            raise AnonfwError(f"{folder} is not empty and holds no run; name another folder (run=FOLDER)")
        folder.mkdir(parents=True, exist_ok=True)
    else:
        number = 1
        while True:
            folder = root / name / (stamp if number == 1 else f"{stamp}_{number}")
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                number += 1
    (folder / "checkpoints").mkdir()
    with atomic(folder / "recipe.yaml") as file:
        file.write(recipe_yaml.encode())
    record = {
        "name": name,
        "started": time.time_ns(),
        "time": stamp,
        "command": ["python", "-m", "anonfw", *sys.argv[1:]],
        "commit": commit(),
        "anonfw": __version__,
        "fingerprint": mark or fingerprint(recipe_yaml),
    }
    write_json(folder / "run.json", record)
    return folder


def commit() -> str | None:
    """The commit of the source tree that runs, `+` behind it when files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def finish(folder: Path, seconds: float, steps: int, ranks: int, device: str | None = None) -> None:
    """Marks the run as finished: the same command starts a new one from now on.

    Args:
        seconds: since the command was last started. steps: of the optimizer. ranks: processes that trained.
        device: what each of them computed on: `CPU`, or the name of the GPU.
    """
    stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    record = {"seconds": round(seconds, 1), "time": stamp, "steps": steps, "ranks": ranks, "device": device}
    write_json(folder / "finished.json", record)
