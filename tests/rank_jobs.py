"""Several trainings, one after the other, on the ranks of one torchrun: starting processes costs more than they do.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/rank_jobs.py JOBS.json

JOBS.json is a list of {recipe, overrides, folder, start}. With `start`, [another folder, step], the run folder begins
as that one was when its checkpoint of that step was the newest. What a job raised is written to FOLDER.error.
"""

from __future__ import annotations

import json
import shutil
import sys
import traceback
from pathlib import Path

import tiny_training as tiny
import torch

from anonfw import recipe as recipes
from anonfw.training import fit as fitting
from anonfw.training import runs, storage
from anonfw.training.ranks import decided_once


def as_it_was(folder: Path, step: int, copy: Path) -> Path:
    """A copy of a finished run, in the state in which a kill soon after that step would have left it."""
    shutil.copytree(folder, copy, symlinks=True)
    for number, checkpoint in runs.numbered(copy):
        if number > step:
            storage.remove(checkpoint)
            storage.manifest_of(checkpoint).unlink()
    for name in ("finished.json", "model.safetensors", "measured.json"):
        (copy / name).unlink(missing_ok=True)
    return copy


def run(job: dict) -> None:
    recipe = recipes.read(Path(job["recipe"]), job["overrides"])

    def open_run() -> list[str | None]:
        if job["start"]:
            as_it_was(Path(job["start"][0]), job["start"][1], Path(job["folder"]))
        return [str(path) if path else None for path in fitting.open_run(recipe)]

    folder, checkpoint = (Path(path) if path else None for path in decided_once(open_run))
    fitting.fit(recipe, folder, checkpoint)


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None  # the next job needs it
    for job in jobs:
        try:
            run(job)
        except Exception:  # noqa: BLE001 the test reads it, and the other jobs go on
            Path(f"{job['folder']}.error").write_text(traceback.format_exc())
        torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    assert tiny  # its losses and callbacks are named by recipes
    main(json.loads(Path(sys.argv[1]).read_text()))
