"""Several trainings, one after the other, on the ranks of one torchrun: starting processes costs more than they do.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/rank_jobs.py JOBS.json

JOBS.json is a list of {recipe, overrides, cut}: a run is cut before batch number `cut`, if that is not null. What a job
raised on rank 0 is written to FOLDER.error.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path

import tiny_training as tiny
import torch

from anonfw import recipe as recipes
from anonfw.system import System
from anonfw.training import fit as fitting
from anonfw.training.ranks import decided_once


class Cut(Exception):
    """Stands for whatever ends all processes of a run."""


def run(job: dict) -> None:
    recipe = recipes.read(Path(job["recipe"]), job["overrides"])
    plain = System.training_step

    def training_step(self, *arguments):
        if self.batches_seen == job["cut"]:
            raise Cut
        return plain(self, *arguments)

    System.training_step = training_step
    try:
        place = decided_once(lambda: [str(path) if path else None for path in fitting.open_run(recipe)])
        folder, checkpoint = (Path(path) if path else None for path in place)
        fitting.fit(recipe, folder, checkpoint)
    except Cut:
        pass
    finally:
        System.training_step = plain


def main(jobs: list[dict]) -> None:
    torch.set_num_threads(1)
    leave = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *_: None  # the next job needs it
    for job in jobs:
        try:
            run(job)
        except Exception:  # noqa: BLE001 the test reads it, and the other jobs go on
            folder = next(text.removeprefix("run=") for text in job["overrides"] if text.startswith("run="))
            Path(f"{folder}.error").write_text(traceback.format_exc())
        torch.distributed.barrier()
    leave()


if __name__ == "__main__":
    assert tiny  # its losses and callbacks are named by recipes
    main(json.loads(Path(sys.argv[1]).read_text()))
