"""What stops a job in its first seconds: `launch check`."""

from __future__ import annotations

import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import tiny_training as tiny

from anonfw import __main__ as cli
from anonfw.errors import AnonfwError
from anonfw.launch import check

JOB = {"SLURM_NTASKS": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "2"}


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in os.environ:
        if name.startswith(("SLURM_", "SBATCH_")):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, None),
        ({"SLURM_GPUS_ON_NODE": "2"}, None),
        ({"SLURM_GPUS_ON_NODE": "8"}, "2 tasks but 8 GPUs"),
        ({"SLURM_NTASKS": "3"}, "3 tasks on 2 nodes"),
        ({"SLURM_NTASKS_PER_NODE": None}, "not given"),
    ],
)
def test_tasks_and_devices(change, words):
    job = {name: value for name, value in (JOB | change).items() if value is not None}
    if words is None:
        check.ranks_fit_devices(job)
    else:
        with pytest.raises(AnonfwError, match=words):
            check.ranks_fit_devices(job)
    check.ranks_fit_devices({})


def test_room_for_another_checkpoint(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    check.room(tmp_path / "not" / "there" / "yet", least=free / 2)
    with pytest.raises(AnonfwError, match="make room"):
        check.room(tmp_path, least=free * 2)
    (tmp_path / "checkpoints" / "step=3.ckpt").mkdir(parents=True)
    with open(tmp_path / "checkpoints" / "step=3.ckpt" / "part", "wb") as file:
        file.truncate(int(free * 0.6))  # sparse: it takes no room itself
    with pytest.raises(AnonfwError, match="checkpoints need"):
        check.room(tmp_path, least=1)


@pytest.fixture
def faces(tiny_faces, tmp_path) -> Path:
    """A copy that may be damaged."""
    return shutil.copytree(tiny_faces, tmp_path / "faces")


def run(faces: Path, *more: str) -> int:
    return cli.main(["launch", "check", str(tiny.RECIPE), *tiny.overrides(faces, *more)])


def test_a_job_that_can_start(faces, tmp_path, capsys):
    assert run(faces, f"run={tmp_path / 'run'}", "trainer.devices=2") == 0
    assert re.search(r"checked: 2 ranks, .* GB free", capsys.readouterr().out)
    assert not (tmp_path / "run").exists()


def test_what_stops_a_job(faces, tmp_path, capsys, monkeypatch):
    def said(*more: str) -> str:
        assert run(faces, *more) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, "one line"
        return error

    assert "too few for 50 ranks" in said("trainer.devices=50")
    assert "did you mean 'max_steps'" in " ".join(said_all(faces, capsys, "trainer.max_step=3").split())
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_NTASKS_PER_NODE", "2")
    assert "trains on 3 ranks" in said("trainer.devices=3")
    monkeypatch.delenv("SLURM_NTASKS")
    shard = next(faces.glob("*train*.tar"))
    shard.write_bytes(shard.read_bytes()[:-512])
    error = said()
    assert shard.name in error and "again" in error
    shard.unlink()
    assert shard.name in said()


def said_all(faces: Path, capsys, *more: str) -> str:
    assert run(faces, *more) == 2
    return capsys.readouterr().err


@pytest.fixture
def srun(tmp_path, monkeypatch):
    """A stand-in for srun that runs the command for each node of NODES here."""
    folder = tmp_path / "bin"
    folder.mkdir()
    tool = folder / "srun"
    tool.write_text(
        "#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\n"
        'for node in $NODES; do SLURMD_NODENAME=$node "$@"; done\nexit ${ANSWER:-0}\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("NODES", "n1 n2")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))


def test_nodes_meet_at_rank_0(srun, tmp_path, monkeypatch):
    check.nodes_meet(2, tmp_path)
    monkeypatch.setenv("NODES", "n1")
    with pytest.raises(AnonfwError, match="1 of 2 nodes answer"):
        check.nodes_meet(2, tmp_path)
    monkeypatch.setenv("NODES", "n1 n2")
    monkeypatch.setattr(check, "PROBE", check.PROBE.replace("$MASTER_PORT", "1"))
    with pytest.raises(AnonfwError, match=r"n1 cannot reach 127\.0\.0\.1:1; n2 cannot reach"):
        check.nodes_meet(2, tmp_path)


def test_nodes_see_the_run_folder_and_the_interpreter(srun, tmp_path, monkeypatch):
    monkeypatch.setattr(check.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(AnonfwError, match="n1 does not see .*python: install Python on a shared"):
        check.nodes_meet(2, tmp_path)
    monkeypatch.setattr(check, "_existing", lambda place: place)
    with pytest.raises(AnonfwError, match="the run folder must lie on a shared file system"):
        check.nodes_meet(2, tmp_path / "gone")
