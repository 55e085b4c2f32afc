"""One cluster, and the environment of its jobs, for all tests of this folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny_training as tiny
from cluster import PATIENCE, Cluster, missing

from anonfw.launch import slurm

TESTS = Path(__file__).resolve().parent


@pytest.fixture(scope="session")
def cluster():
    """Two nodes. Without SLURM on the machine: skips, or fails where ANONFW_SLURM=required (`make test-slurm`)."""
    if absent := missing():
        say = f"{', '.join(absent)} not found: apt-get install slurm-wlm munge"
        (pytest.fail if os.environ.get("ANONFW_SLURM") == "required" else pytest.skip)(say)
    with Cluster() as made:
        yield made


class Jobs:
    """Submits tiny trainings. `folder`: the run folder of each name."""

    def __init__(self, cluster: Cluster, faces: Path, place: Path) -> None:
        self.cluster, self.faces, self.place = cluster, faces, place

    def folder(self, name: str) -> Path:
        return self.place / name

    def submit(self, name: str, *more: str, shape: slurm.Shape | None = None) -> str:
        """Submits what `python -m anonfw launch slurm` would; returns the job's number."""
        own = [item for item in tiny.overrides(self.faces, *more) if not item.startswith("trainer.accelerator")]
        job = slurm.training_job(
            shape or slurm.Shape(nodes=2, cpus_per_task=1), str(tiny.RECIPE), [*own, f"run={self.folder(name)}"]
        )
        return slurm.submit(job)

    def output(self, name: str) -> Path:
        return next(self.place.glob(f"{name}.*.out"), self.place / f"{name}.out")

    def wait_until_held(self, job: str, name: str) -> None:
        """Until both ranks stand still (`faults.Hold`)."""
        held = [Path(f"{self.folder(name)}.held-{rank}") for rank in (0, 1)]
        self.cluster.wait(job, lambda *_: all(path.exists() for path in held), PATIENCE, lambda: self.output(name))

    def wait(self, job: str, name: str, state: str, restarts: int = 0) -> None:
        self.cluster.wait(
            job, lambda now, again: now == state and again >= restarts, PATIENCE, lambda: self.output(name)
        )


@pytest.fixture(scope="session")
def jobs(cluster, tiny_faces, tmp_path_factory):
    """The environment of the cluster, for this process too, while these tests run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(cluster.conf))
        patch.setenv("PATH", cluster.environment()["PATH"])
        patch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # both nodes are this machine, whatever its name resolves to
        patch.setenv("WANDB_MODE", "offline")
        patch.syspath_prepend(str(TESTS))
        yield Jobs(cluster, tiny_faces, tmp_path_factory.mktemp("jobs"))
