"""Trainings as jobs of a real SLURM cluster: two ranks on two nodes, and what happens to them there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_training as tiny
from cluster import PATIENCE, wait_for

from anonfw import wandb_files
from anonfw.launch import slurm
from anonfw.training import runs

HOLD = "callbacks.hold={_target_: faults.Hold, _partial_: true, batch: 3%s}"


@pytest.fixture(scope="module")
def undisturbed(jobs) -> Path:
    """The run folder of a two-node job that nothing happened to."""
    job = jobs.submit("undisturbed")
    jobs.wait(job, "undisturbed", "COMPLETED")
    return jobs.folder("undisturbed")


def assert_same_run(one: Path, other: Path) -> None:
    """Bitwise the same end, and every step logged once, with the same values."""
    tiny.assert_same_end(one, other)
    assert list(tiny.curve(one)) == list(range(tiny.STEPS))
    assert tiny.curve(one) == tiny.curve(other)


def test_a_job_on_two_nodes(undisturbed, jobs):
    finished = json.loads((undisturbed / "finished.json").read_text())
    assert finished["ranks"] == 2 and finished["steps"] == tiny.STEPS
    said = jobs.output("undisturbed").read_text()
    assert "nodes n[1-2], 2 tasks" in said and "checked: 2 ranks" in said
    assert said.count("checked:") == said.count("run folder " + str(undisturbed) + "\n") - 1 == 1, "rank 0 alone speaks"
    assert list(tiny.curve(undisturbed)) == list(range(tiny.STEPS))
    wait_for("no process is left", lambda: not jobs.cluster.tasks(), PATIENCE)


def test_a_requeue_in_the_middle_of_an_epoch(undisturbed, jobs):
    """`scontrol requeue` while both ranks are inside step 4 and never return from it: SLURM kills them."""
    hold = Path(f"{jobs.folder('requeued')}.hold")
    hold.touch()
    wandb = "loggers.wandb={_target_: anonfw.training.loggers.wandb, _partial_: true, project: tests}"
    job = jobs.submit("requeued", HOLD % "", "callbacks.checkpoint.every=2", wandb)
    jobs.wait_until_held(job, "requeued")
    assert runs.step_of(runs.newest(jobs.folder("requeued"))) == 2
    jobs.cluster.run("scontrol", "requeue", job)
    wait_for("the requeue", lambda: jobs.cluster.states(job)[1] == 1, PATIENCE)
    hold.unlink()
    jobs.cluster.start_now(job)
    jobs.wait(job, "requeued", "COMPLETED", restarts=1)
    assert_same_run(jobs.folder("requeued"), undisturbed)
    said = jobs.output("requeued").read_text()
    assert "start 0," in said and "start 1," in said and "continuing" in said, "one output file, appended to"
    check_offline_wandb(jobs.folder("requeued"))


def check_offline_wandb(folder: Path) -> None:
    """Both starts wrote the same W&B run, and together every step once."""
    files = wandb_files.find_files(folder)
    assert len(files) == 2
    (run,) = wandb_files.read_runs(files)
    assert run.id == (folder / "wandb_id").read_text()
    rows = [(row[wandb_files.STEP], row["train/loss"]) for row in run.rows if "train/loss" in row]
    assert rows == list(tiny.curve(folder).items())


def test_a_node_that_dies(undisturbed, jobs):
    """Power cut on the second node: the job is requeued by itself and finishes when the node is back."""
    hold = Path(f"{jobs.folder('orphaned')}.hold")
    hold.touch()
    job = jobs.submit("orphaned", HOLD % "", "callbacks.checkpoint.every=2")
    jobs.wait_until_held(job, "orphaned")
    jobs.cluster.kill_node("n2")
    hold.unlink()
    try:
        jobs.cluster.wait(job, lambda _, again: again >= 1, PATIENCE, lambda: jobs.output("orphaned"))
    finally:
        jobs.cluster.start_node("n2")
    # SLURM's own delay is waited for: what it told the dead node to kill is sent once more when that is back, and would
    # hit a job of the same number that has started by then.
    jobs.wait(job, "orphaned", "COMPLETED", restarts=1)
    assert_same_run(jobs.folder("orphaned"), undisturbed)


def test_a_rank_that_crashes_ends_the_job(jobs):
    job = jobs.submit("crashed", "callbacks.crash={_target_: faults.Crash, rank: 1, batch: 2}")
    jobs.wait(job, "crashed", "FAILED")
    _, restarts, code = jobs.cluster.states(job)
    assert restarts == 0 and int(code.split(":")[0]) != 0
    said = jobs.output("crashed").read_text()
    assert "not requeued" in said
    left = f"SLURM_JOB_ID={job}"
    wait_for("no process is left", lambda: not jobs.cluster.processes(left), 60)
    assert not (jobs.folder("crashed") / "finished.json").exists()


def test_a_time_limit(undisturbed, jobs):
    """SIGUSR1 five minutes before the limit: both ranks save at the same step, and the job requeues itself."""
    Path(f"{jobs.folder('warned')}.hold").touch()
    shape = slurm.Shape(nodes=2, cpus_per_task=1, time="600", lead=300)
    more = ["callbacks.checkpoint.every=100", "data.train.workers=1"]  # SLURM signals the loader's worker, too
    job = jobs.submit("warned", HOLD % ", for_signal: true", *more, shape=shape)
    jobs.wait_until_held(job, "warned")
    # Now the limit comes near: SLURM looks at it twice a minute, and finds that less than the lead is left.
    minutes = jobs.cluster.run("squeue", "-h", "-j", job, "-o", "%M").strip().split(":")
    jobs.cluster.run("scontrol", "update", f"jobid={job}", f"timelimit={int(minutes[-2]) + 4}")
    jobs.cluster.wait(job, lambda _, again: again >= 1, PATIENCE, lambda: jobs.output("warned"))
    jobs.cluster.run("scontrol", "update", f"jobid={job}", "timelimit=600")
    Path(f"{jobs.folder('warned')}.hold").unlink()
    jobs.cluster.start_now(job)
    jobs.wait(job, "warned", "COMPLETED", restarts=1)
    said = jobs.output("warned").read_text()
    assert "stopped by SIGUSR1 at step 4, and saved" in said
    assert "stopped before its time limit: requeue" in said
    assert "continuing" in said and not (jobs.folder("warned") / "stopped.json").exists()
    assert_same_run(jobs.folder("warned"), undisturbed)
