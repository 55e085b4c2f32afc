"""Weights & Biases without an account: what the real library writes offline, over a kill and a resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_training as tiny
from tiny_wandb import log

from anonfw.errors import AnonfwError
from anonfw.training import runs
from anonfw.training.loggers import JsonLines, Wandb
from anonfw.wandb_files import STEP, find_files, read_runs

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning advises on many things

# Written by wandb 0.31.0 (offline, no machine information): one run, in two processes.
OFFLINE = Path(__file__).parent / "wandb_offline"

RECIPE = """
name: trial
dataset: faces/embedded
system: {_target_: anonfw.systems.id2face.ID2Face, beta: 3.0e-4, unet: {widths: [1, 2]}}
"""


@pytest.fixture
def offline(monkeypatch):
    """The real library, writing files only."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield
    import wandb

    wandb.teardown()  # also where the test failed: the next one begins anew


def wandb_run(folder: Path):
    import wandb

    wandb.teardown()  # its core process writes behind
    (run,) = read_runs(find_files(folder))
    return run


@pytest.mark.slow
def test_a_killed_run_goes_on_as_one_run_without_gap_or_repeat(tmp_path, offline, root):
    folder = runs.create("trial", RECIPE, folder=tmp_path / "run")
    program = [sys.executable, str(Path(__file__).with_name("tiny_wandb.py")), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(program, cwd=root, env=environment, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    # Its last checkpoint was of 4 steps, so steps 4 to 7 are repeated; W&B lacks what only the lines have, which wandb
    # did not write before the kill.
    lines = JsonLines(folder)
    lines.rewind(4)
    lines.log_metrics({"train/extra": 0.25}, 3)
    for start, end in ((4, 9), (6, 11)):
        loggers = [JsonLines(folder), Wandb(folder)]
        for logger in loggers:
            logger.rewind(start)
        log(loggers, range(start, end))
        if end == 9:  # ends without a word, but wandb writes all of it
            loggers[1].experiment.finish()
            wandb_run(folder)
    (folder / "table.json").write_text(json.dumps({"rows": {"anonymized": {"tpr@1e-2": {"value": 0.5}}}}))
    runs.finish(folder, seconds=3.0, steps=11, ranks=1)
    loggers[1].conclude()

    assert len(find_files(folder)) == 3, "one folder a process, as wandb does it"
    run = wandb_run(folder)
    assert run.id == (folder / "wandb_id").read_text() and run.exit_code == 0
    for name in ("train/loss", "val/loss", "train/extra"):
        found = [(row[STEP], row[name]) for row in run.rows if name in row]
        assert sorted(found) == sorted(tiny.curve(folder, name).items()), name
    own_steps = [row["_step"] for row in run.rows]
    assert own_steps == list(range(len(own_steps))), "W&B's own step continues where the killed process ended"
    assert run.summary["result"]["rows"]["anonymized"]["tpr@1e-2"]["value"] == 0.5
    assert run.summary["finished"]["steps"] == 11


@pytest.mark.slow
def test_fit_says_what_the_run_is_and_ends_with_its_result(tiny_faces, tmp_path, offline):
    node = "loggers.wandb={_target_: anonfw.training.loggers.wandb, _partial_: true, project: p, tags: [mine]}"
    recipe = tiny.recipe(tiny_faces, node, "trainer.max_steps=2", f"run={tmp_path / 'run'}")
    folder = tiny.train(recipe)
    run = wandb_run(folder)
    assert (run.project, run.group, run.job_type, run.name) == ("p", "id2face", "fit", "id2face/run")
    assert run.tags == ["ID2Face", tiny_faces.name, "mine"]
    begun = run.config.pop("anonfw")
    assert begun == json.loads((folder / "run.json").read_text())
    assert run.config == {key: value for key, value in recipe.items() if key != "run"}
    assert run.summary["finished"] == json.loads((folder / "finished.json").read_text())
    assert [row[STEP] for row in run.rows if "train/loss" in row] == [0, 1]


def test_a_group_of_its_own_and_other_ranks_make_no_run(tmp_path, monkeypatch):
    from lightning.pytorch.utilities.rank_zero import rank_zero_only

    folder = runs.create("trial", RECIPE, folder=tmp_path / "run")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    logger = Wandb(folder, group="sweep", tags=["ID2Face"])
    logger.rewind(0)
    logger.log_metrics({"train/loss": 1.0}, 0)
    logger.conclude()
    assert logger._wandb_init["group"] == "sweep" and logger._wandb_init["tags"] == ["ID2Face", "embedded"]
    assert not (folder / "wandb_id").exists() and not (folder / "wandb").exists()


def test_files_that_are_not_whole(tmp_path):
    """Half a record at the end is what a kill leaves; another format is refused."""
    source = find_files(OFFLINE)[-1]
    content = source.read_bytes()
    whole = read_runs([source])[0]
    assert len(whole.rows) == 6 and whole.exit_code == 0
    for cut in (len(content) - 1, len(content) // 2, 9, 0):
        part = tmp_path / "run-tiny0001.wandb"
        part.write_bytes(content[:cut])
        read = read_runs([part])
        rows = read[0].rows if read else []
        assert rows == whole.rows[: len(rows)] and len(rows) <= len(whole.rows)
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    part.write_bytes(flipped)
    rows = read_runs([part])[0].rows
    assert rows == whole.rows[: len(rows)] and len(rows) < len(whole.rows)
    part.write_bytes(b"something else")
    with pytest.raises(AnonfwError, match="no file of wandb's"):
        read_runs([part])
    with pytest.raises(AnonfwError, match="cannot read"):
        read_runs([tmp_path / "absent.wandb"])
