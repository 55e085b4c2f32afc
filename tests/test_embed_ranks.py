"""`embed` shared by several processes: every shard once, one record of all of them, whatever is killed on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny_dataset as tiny
import torch

from anonfw.data import processes
from anonfw.data.card import Card, DataError
from anonfw.data.embeddings import Sidecar, read_record, save_sidecar, sidecar_path
from anonfw.data.sidecars import write_sidecars
from anonfw.identity import Recognizer

SHARDS = 6


class MeanColour(Recognizer):
    """Three numbers a picture; refuses to work after so many batches."""

    name, dim, size, sha256, licence = "mean_colour", 3, 112, "c" * 64, "none"

    def __init__(self, calls: int = 10**9) -> None:
        super().__init__()
        self.left = calls

    def embed(self, images):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return images.mean((2, 3)) + 2


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "tiny", 4 * SHARDS, 0, 2, 8)


def arrays(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mean_colour.npy"))}


def test_each_launcher_says_who_a_process_is(monkeypatch):
    names = [name for launcher in processes.LAUNCHERS for name in launcher]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert processes.place() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "0")  # an sbatch script of four tasks, before srun: one process
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert processes.place() == (0, 1)
    monkeypatch.setenv("SLURM_PROCID", "2")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert processes.place() == (2, 4)
    monkeypatch.setenv("RANK", "5")  # torchrun inside of a step
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert processes.place() == (5, 8)


def test_the_gpu_of_a_process(monkeypatch):
    import torch

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.device() == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in (("RANK", "6"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "2")):
        monkeypatch.setenv(name, value)
    assert processes.device() == "cuda:2"


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_the_ranks_together_embed_every_shard_once(dataset: Path, world: int):
    done = [
        write_sidecars(dataset, MeanColour(), device="cpu", progress=False, rank=r, world=world) for r in range(world)
    ]
    assert sum(done) == len(Card.load(dataset).shards) == SHARDS
    assert max(done) - min(done) <= 1
    Sidecar(dataset, Card.load(dataset).shards, "mean_colour", MeanColour.sha256)  # complete, row by row
    assert write_sidecars(dataset, MeanColour(calls=0), device="cpu", progress=False) == 0


def test_any_number_of_processes_continues_what_others_left(dataset: Path):
    def run(calls: int, rank: int, world: int) -> int:
        return write_sidecars(dataset, MeanColour(calls), device="cpu", progress=False, rank=rank, world=world)

    with pytest.raises(KeyboardInterrupt):
        run(1, 0, 2)
    with pytest.raises(KeyboardInterrupt):
        run(2, 1, 2)
    before = arrays(dataset)
    assert len(before) == 3 == len(read_record(dataset, "mean_colour")["shards"])
    with pytest.raises(DataError, match="no mean_colour embeddings for .*anonfw embed"):
        Sidecar(dataset, Card.load(dataset).shards, "mean_colour", MeanColour.sha256)
    assert sum(run(9, rank, 3) for rank in range(3)) == 3  # what was there is not made again
    assert before.items() <= arrays(dataset).items() and len(arrays(dataset)) == SHARDS


def test_a_record_written_by_many_at_once_forgets_nobody(dataset: Path):
    shards = Card.load(dataset).shards

    def note(number: int) -> None:
        save_sidecar(dataset, shards[number % SHARDS], f"net_{number // SHARDS}", "e" * 64, np.ones((8, 3), np.float32))

    with ThreadPoolExecutor(SHARDS) as pool:
        list(pool.map(note, range(3 * SHARDS)))
    for number in range(3):
        record = read_record(dataset, f"net_{number}")
        assert list(record["shards"]) == sorted(shard.stem for shard in shards)
    assert not list(dataset.glob(".*.partial"))


RANK = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from test_embed_ranks import MeanColour
from anonfw.data.sidecars import write_sidecars

torch.set_num_threads(1)
print(write_sidecars(sys.argv[1], MeanColour(), device="cpu", progress=False))
"""


@pytest.mark.slow
def test_two_processes_make_what_one_makes(root: Path, dataset: Path, tmp_path: Path):
    alone = tiny.write(tmp_path / "alone", 4 * SHARDS, 0, 2, 8)
    write_sidecars(alone, MeanColour(), device="cpu", progress=False)
    command = [sys.executable, "-c", RANK, str(dataset), str(Path(__file__).parent)]
    running = [
        subprocess.Popen(
            command, cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ, "RANK": str(r), "WORLD_SIZE": "2"}
        )
        for r in range(2)
    ]
    assert [process.communicate(timeout=240)[0].split()[-1] for process in running] == ["3", "3"]
    assert arrays(dataset) == arrays(alone)
    assert read_record(dataset, "mean_colour") == read_record(alone, "mean_colour")
    assert sidecar_path(dataset / "tiny-train-000000.tar", "mean_colour").is_file()


def test_bfloat16_is_asked_for(dataset: Path):
    class Watching(MeanColour):
        def embed(self, images):
            seen.append((images @ images.transpose(2, 3)).dtype)  # a product: what autocast changes
            return super().embed(images)

    for bf16, expected in ((False, torch.float32), (True, torch.bfloat16)):
        seen: list[torch.dtype] = []
        encoder = Watching()
        encoder.sha256 = "e" * 64 if bf16 else "d" * 64
        write_sidecars(dataset, encoder, ["train"], device="cpu", progress=False, bf16=bf16)
        assert set(seen) == {expected}
        assert read_record(dataset, "mean_colour")["sha256"] == encoder.sha256
