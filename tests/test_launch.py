"""The verb `launch`: job scripts from the templates, their submission to a stand-in for sbatch, and what is refused."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from anonfw import __main__ as cli
from anonfw.errors import AnonfwError
from anonfw.launch import slurm

RECIPE = "recipes/id2face.yaml"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch, root):
    """Run where the recipes are found, and without traces of a job that these tests may run in."""
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def options(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", script, re.MULTILINE)
    assert len(dict(found)) == len(found), "an option stands there twice"
    return dict(found)


def dry_run(capsys, *arguments: str) -> str:
    assert cli.main(["launch", "slurm", "--dry-run", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments: str) -> str:
    assert cli.main(["launch", "slurm", "--dry-run", *arguments]) == 2
    return capsys.readouterr().err


def test_a_training_on_gpus(capsys, tmp_path):
    script = dry_run(
        capsys, RECIPE, "trainer.max_steps=100", "--nodes", "2", "--gpus-per-node", "4", "--time", "1-00:00:00",
        "--lead", "600", "--sbatch=--partition=gpu", "--sbatch=--exclusive", "system.unet.widths=[8, 16]",
    )  # fmt: skip
    found = options(script)
    output = found.pop("output")
    assert re.fullmatch(r"runs/id2face/[\d_-]+\.%x-%j\.out", output)
    assert found == {
        "job-name": "id2face", "nodes": "2", "ntasks-per-node": "4", "gpus-per-node": "4", "cpus-per-task": "8",
        "time": "1-00:00:00", "signal": "USR1@600", "requeue": "", "open-mode": "append", "partition": "gpu",
        "exclusive": "",
    }  # fmt: skip
    (line,) = [line for line in script.splitlines() if line.startswith("set -- recipes")]
    folder = output.removesuffix(".%x-%j.out")
    assert shlex.split(line)[2:] == [RECIPE, "trainer.max_steps=100", "system.unet.widths=[8, 16]", f"run={folder}"]
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_a_training_on_cpus_asks_for_no_gpu(capsys):
    found = options(dry_run(capsys, RECIPE, "--tasks-per-node", "2", "--cpus-per-task", "4", "run=there/mine"))
    assert found["ntasks-per-node"] == "2" and found["cpus-per-task"] == "4" and "gpus-per-node" not in found
    assert found["output"] == "there/mine.%x-%j.out"


@pytest.mark.parametrize("name", ["slurm.sbatch", "array.sbatch", "torchrun.sh", "local.sh"])
def test_templates_are_scripts_that_also_work_by_hand(name, root):
    path = root / "launch" / name
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert all(len(line) <= 120 for line in path.read_text().splitlines())
    done = subprocess.run(["bash", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and name in done.stderr, "without arguments they say how they are called"


def test_a_sweep_is_an_array_with_a_run_folder_each(capsys, tmp_path):
    (tmp_path / "sweep").write_text("system.steps=4 seed=1\n'system.unet.widths=[16, 32, 32]'\n")
    script = dry_run(capsys, RECIPE, "--sweep", "sweep", "--gpus-per-node", "1", "seed=3")
    found = options(script)
    assert found["array"] == "0-1" and found["output"].endswith("%x-%A_%a.out")
    assert f"export SWEEP={tmp_path}/sweep" in script
    assert re.search(
        r"^set -- recipes/id2face.yaml seed=3 run=runs/id2face/[\d_-]+_\$SLURM_ARRAY_TASK_ID$", script, re.M
    )
    # The script's own lines, run as array task 1, up to where the run folder is known.
    body = script[: script.index("if [[ -e $folder/finished.json")]
    environment = os.environ | {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_ARRAY_TASK_ID": "1"}
    shown = subprocess.run(
        ["bash", "-c", body + '\nprintf "%s\\n" "$@"'], env=environment, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert shown[:2] == [RECIPE, "seed=3"] and shown[-1] == "system.unet.widths=[16, 32, 32]"
    assert shown[2].startswith("run=runs/id2face/") and shown[2].endswith("_1")


def test_an_array_of_writers(capsys, root, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "lfw.py").touch()
    script = dry_run(
        capsys, "--array", "16", "--time", "60", "--", "data/lfw.py", "source", "out put", "--workers", "8"
    )
    found = options(script)
    assert found["array"] == "0-15" and found["job-name"] == "lfw" and "signal" not in found and found["time"] == "60"
    assert "\nset -- data/lfw.py source 'out put' --workers 8\n" in script
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" "$RANK" "$WORLD_SIZE"\n')
    python.chmod(0o755)
    for command, said in (
        ("data/lfw.py source out", "data/lfw.py source out --part 3/16"),
        ("embed shards", "-m anonfw embed shards 3 16"),
    ):
        shown = subprocess.run(
            ["bash", str(root / "launch" / "array.sbatch"), *command.split()],
            env=os.environ | {"PYTHON": str(python), "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "16"},
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        assert shown.splitlines()[-1].strip() == said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([RECIPE, "trainer.devices=2"], "the job sets it"),
        ([RECIPE, "--gpus-per-node", "4", "--tasks-per-node", "2"], "a task uses one GPU"),
        ([RECIPE, "--nodes", "0"], "--nodes is at least 1"),
        ([RECIPE, "--time", "tomorrow"], "--time tomorrow"),
        ([RECIPE, "--sbatch=partition=gpu"], "--OPTION=VALUE"),
        ([RECIPE, "--sbatch=--nodes=3"], "none that launch sets"),
        ([RECIPE, "--array", "3"], "--sweep FILE"),
        ([RECIPE, "--sweep", "nowhere"], "No such file"),
        (["--array", "0", "--", "embed", "x"], "--array is at least 1"),
        (["--array", "3", "--nodes", "2", "--", "embed", "x"], "one process on one node"),
        (["--array", "3", "--", "data/nothing.py"], "no script data/nothing.py"),
        ([RECIPE, "trainer.max_step=3"], "did you mean 'max_steps'"),
    ],
)
def test_what_cannot_work_is_refused_before_it_is_submitted(arguments, words, capsys):
    assert words in refused(capsys, *arguments)


def test_each_line_of_a_sweep_is_checked_before_it_is_submitted(capsys, tmp_path):
    (tmp_path / "sweep").write_text("seed=1\nsystem.step=3\n")
    assert "did you mean 'steps'" in refused(capsys, RECIPE, "--sweep", "sweep")
    (tmp_path / "sweep").write_text("seed=1\n\n")
    assert "none of them empty" in refused(capsys, RECIPE, "--sweep", "sweep")
    (tmp_path / "sweep").write_text("seed=1\n")
    assert "a folder each" in refused(capsys, RECIPE, "--sweep", "sweep", "run=one")


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """A stand-in for sbatch that notes what it was given; ANSWER is its exit code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "sbatch"
    tool.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/given; env > {tmp_path}/environment\n'
        '[[ ${ANSWER:-0} == 0 ]] || { echo "sbatch: error: Invalid partition" >&2; exit 1; }\necho "41;cluster"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return tmp_path


def test_submission(sbatch, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")
    monkeypatch.setenv("SLURM_CONF", "/conf")
    assert cli.main(["launch", "slurm", RECIPE, "run=mine", "--gpus-per-node", "1"]) == 0
    said = capsys.readouterr().out
    assert "job 41: script mine.sbatch" in said
    assert (sbatch / "given").read_text().split() == ["--parsable", "mine.sbatch"]
    environment = (sbatch / "environment").read_text()
    assert "SLURM_NTASKS" not in environment and "SLURM_CONF=/conf" in environment
    assert options((sbatch / "mine.sbatch").read_text())["gpus-per-node"] == "1"
    assert f"export PYTHON={sys.executable}" in (sbatch / "mine.sbatch").read_text()


def test_a_submission_that_sbatch_refuses(sbatch, capsys, monkeypatch):
    monkeypatch.setenv("ANSWER", "1")
    assert cli.main(["launch", "slurm", RECIPE]) == 2
    assert "sbatch refuses" in (error := capsys.readouterr().err) and "Invalid partition" in error
    monkeypatch.setenv("PATH", "")
    assert cli.main(["launch", "slurm", RECIPE]) == 2
    assert "login node" in capsys.readouterr().err


def test_a_missing_template_is_said():
    with pytest.raises(AnonfwError, match="install anonfw again"):
        slurm.template("nothing.sbatch")


def test_a_wheel_carries_the_templates(root):
    import tomllib

    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["sources"]["launch"] == "anonfw/launch/templates" and "launch" in wheel["only-include"]
    assert {path.name for path in (root / "launch").iterdir()} >= {"slurm.sbatch", "array.sbatch"}
    assert Path(slurm.__file__).parent.name == "launch"
