"""Array jobs on a real SLURM cluster: a data set written in parts, and a sweep."""

from __future__ import annotations

import json
import re
import shlex

import tiny_sources
import tiny_training as tiny
from cluster import PATIENCE

from anonfw.data.card import Card
from anonfw.launch import slurm

SHAPE = slurm.Shape(cpus_per_task=1, time="60")


def finish(jobs, job: str, tasks: int, output) -> None:
    for task in range(tasks):
        jobs.cluster.wait(f"{job}_{task}", lambda state, _: state == "COMPLETED", PATIENCE, output)


def test_a_data_set_is_written_by_an_array(jobs, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for person, pictures in enumerate(tiny_sources.faces(9)):
        (tmp_path / "photos" / f"p{person}").mkdir(parents=True)
        for number, content in enumerate(pictures):
            (tmp_path / "photos" / f"p{person}" / f"{number}.jpg").write_bytes(content)
    script = str(root / "data" / "image_folder.py")
    job = slurm.submit(slurm.array_job(SHAPE, 3, [script, "photos", "out", "--aligned", "--size", "32"]))
    finish(jobs, job, 3, lambda: next(tmp_path.glob("runs/arrays/*.out"), tmp_path / "none"))
    assert Card.load(tmp_path / "out").complete
    assert sorted(tiny_sources.contents(tmp_path / "out")) == [f"p{person}" for person in range(9)]
    said = [path.read_text() for path in sorted(tmp_path.glob("runs/arrays/*.out"))]
    assert len(said) == 3 and sum("waits for its other parts" in text for text in said) == 2


def test_a_sweep_is_an_array_of_runs(jobs, tiny_faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep").write_text("seed=1\nseed=2 system.steps=3\n")
    own = [item for item in tiny.overrides(tiny_faces, "trainer.max_steps=1") if not item.startswith("trainer.acc")]
    job = slurm.submit(slurm.training_job(SHAPE, str(tiny.RECIPE), own, sweep=tmp_path / "sweep"))
    finish(jobs, job, 2, lambda: next(tmp_path.glob("runs/id2face/*.out"), tmp_path / "none"))
    folders = sorted(path.parent for path in tmp_path.glob("runs/id2face/*/finished.json"))
    assert [re.sub(r".*_", "", folder.name) for folder in folders] == ["0", "1"]
    seeds = [tiny.recipes.load(folder / "recipe.yaml")["seed"] for folder in folders]
    assert seeds == [1, 2]
    commands = [shlex.join(json.loads((folder / "run.json").read_text())["command"]) for folder in folders]
    assert "seed=1" in commands[0] and "system.steps=3" in commands[1]
