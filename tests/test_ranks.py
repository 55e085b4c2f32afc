"""Two ranks, replicated (DDP) and sharded (FSDP2): they train what one process trains, and continue each other."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import rank_jobs
import tiny_training as tiny
import torch
from emulated_ranks import emulate
from safetensors.torch import load_file

from anonfw import recipe as recipes
from anonfw.export import export
from anonfw.recipe import Recipe
from anonfw.training import runs, storage
from anonfw.training.load import build_system, load_system

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*")]

ROOT = Path(__file__).resolve().parent.parent
MAPPER = ROOT / "recipes" / "identity_mapper.yaml"

DDP = "trainer.strategy=ddp"
FSDP = "trainer.strategy={_target_: anonfw.training.fsdp.FSDP2, min_parameters: 0}"
HYBRID = FSDP.replace("}", ", shard_over: 1}")  # two copies, each on one rank
GATHERED = FSDP.replace("}", ", gather: bfloat16, reshard_after_forward: false}")
GRID = "callbacks.grid={_target_: anonfw.training.grid.SampleGrid, _partial_: true, rows: 2}"
MEASURED = "evaluate={_target_: tiny_training.Measured}"
# The other systems, each with its smallest recipe.
OTHERS = [
    path
    for path in sorted((ROOT / "recipes").glob("*.yaml"))
    if path not in (tiny.RECIPE, MAPPER)
    and not path.stem.endswith("_base")
    and recipes.load(path)["system"]["_target_"] in tiny.SYSTEMS
]
MORE = ("callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=6", "trainer.val_check_interval=3")
BEST = "callbacks.checkpoint.best=val/loss"
EMA = "callbacks.ema={_target_: anonfw.training.ema.EMA, decay: 0.99}"

FEW = ("trainer.max_steps=2",)


class Job(NamedTuple):
    """A training of two ranks in the run folder `name`. With `start` that begins as a copy of the folder of another
    job, as it was when its checkpoint of that step was the newest."""

    name: str
    path: Path
    more: tuple[str, ...]
    start: tuple[str, int] | None = None


JOBS = [
    Job("ddp", tiny.RECIPE, (DDP, *MORE)),
    Job("fsdp", tiny.RECIPE, (FSDP, *MORE, BEST, GRID, MEASURED)),
    Job("fsdp again", tiny.RECIPE, (FSDP, *MORE, BEST, GRID, MEASURED), ("fsdp", 4)),
    Job("ddp to fsdp", tiny.RECIPE, (FSDP, *MORE), ("ddp", 4)),
    Job("hybrid", tiny.RECIPE, (HYBRID, *MORE), ("ddp", 4)),
    Job("gathered", tiny.RECIPE, (GATHERED, "trainer.precision=bf16-mixed", *MORE), ("ddp", 4)),
    Job("fsdp to ddp", tiny.RECIPE, (DDP, *MORE, BEST, GRID, MEASURED), ("fsdp", 4)),
    Job("mapper ddp", MAPPER, (DDP, EMA, *MORE)),
    Job("mapper fsdp", MAPPER, (FSDP, EMA, *MORE)),
    Job("mapper fsdp again", MAPPER, (FSDP, EMA, *MORE), ("mapper fsdp", 4)),
    *(Job(f"{path.stem} ddp", path, (DDP, *FEW)) for path in OTHERS),
    *(Job(f"{path.stem} fsdp", path, (FSDP, *FEW)) for path in OTHERS),
]


def overrides(faces: Path, folder: Path, more: tuple[str, ...], path: Path) -> list[str]:
    return tiny.overrides(faces, "trainer.devices=2", f"run={folder}", *more, path=path)


@pytest.fixture(scope="module")
def folders(tiny_faces, tmp_path_factory) -> dict[str, Path]:
    """Run folder of each name in JOBS, all trained by one torchrun."""
    place = tmp_path_factory.mktemp("ranks")
    jobs = []
    for job in JOBS:
        folder = place / job.name.replace(" ", "_")
        start = job.start and [str(place / job.start[0].replace(" ", "_")), job.start[1]]
        changes = overrides(tiny_faces, folder, job.more, job.path)
        jobs.append({"recipe": str(job.path), "folder": str(folder), "overrides": changes, "start": start})
    (place / "jobs.json").write_text(json.dumps(jobs))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "tests/rank_jobs.py")]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    with open(place / "output", "wb") as output:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *command, str(place / "jobs.json")],
            cwd=place, env=environment, stdout=output, stderr=output,
        )  # fmt: skip
    errors = "\n".join(file.read_text() for file in sorted(place.glob("*.error")))
    assert done.returncode == 0 and not errors, errors or (place / "output").read_text()
    return {job.name: place / job.name.replace(" ", "_") for job in JOBS}


@pytest.fixture(scope="module")
def reference(tiny_faces):
    """One process that computes what two ranks do."""
    made = {}

    def get(path: Path):
        if path not in made:
            made[path] = emulate(tiny.recipe(tiny_faces, *MORE, path=path), 2)
        return made[path]

    return get


@pytest.mark.parametrize("name", ["ddp", "fsdp", "mapper ddp", "mapper fsdp"])
def test_two_ranks_have_the_losses_and_the_weights_of_one_process(name, folders, reference):
    expected = reference(MAPPER if name.startswith("mapper") else tiny.RECIPE)
    found = tiny.curve(folders[name])
    assert list(found) == list(range(tiny.STEPS))
    assert list(found.values()) == pytest.approx(expected.losses, rel=1e-5)
    weights = load_file(folders[name] / "model.safetensors")
    assert weights.keys() == expected.state.keys()
    for key, value in weights.items():
        wanted = expected.average.get(key, expected.state[key])
        torch.testing.assert_close(value.double(), wanted.double(), rtol=1e-3, atol=2e-5, msg=key)


def test_validation_and_its_grid_are_those_of_all_ranks(folders):
    assert tiny.curve(folders["fsdp"], "val/loss") == pytest.approx(tiny.curve(folders["ddp"], "val/loss"), rel=1e-5)
    assert [path.name for path in sorted((folders["fsdp"] / "grid").iterdir())] == [
        "step-0000003.png", "step-0000006.png",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["fsdp again", "mapper fsdp again"])
def test_a_sharded_run_that_was_cut_ends_bitwise_equal(name, folders):
    one, other = folders[name], folders[name.removesuffix(" again")]
    first, second = (storage.read(folder / "checkpoints" / "last.ckpt") for folder in (one, other))
    for part in ("state_dict", "optimizer_states", "callbacks", "lr_schedulers", "batches_seen"):
        assert tiny.differences(first[part], second[part]) == [], part
    for curve in ("train/loss", "val/loss"):
        assert tiny.curve(one, curve) == tiny.curve(other, curve)
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["ddp to fsdp", "fsdp to ddp"])
def test_replicated_and_sharded_runs_continue_each_other(name, folders):
    found, expected = tiny.curve(folders[name]), tiny.curve(folders["ddp"])
    assert list(found) == list(range(tiny.STEPS))
    assert found == pytest.approx(expected, rel=1e-5)
    kinds = [path.is_dir() for _, path in runs.numbered(folders[name])]
    assert kinds == ([False, False, True] if name == "ddp to fsdp" else [True, True, False])


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_every_other_system_trains_sharded_as_it_does_replicated(path, folders):
    one, other = folders[f"{path.stem} ddp"], folders[f"{path.stem} fsdp"]
    assert tiny.curve(one) == pytest.approx(tiny.curve(other), rel=1e-5) and list(tiny.curve(one)) == [0, 1]
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-3, atol=2e-5, msg=name)


def test_rank_0_measures_a_sharded_run_alone(folders):
    """With the whole network, under the averaged weights, while the other rank has gone on."""
    measured = json.loads((folders["fsdp"] / "measured.json").read_text())
    weights = load_file(folders["fsdp"] / "model.safetensors")
    assert measured["world"] == 1
    assert measured["sum"] == pytest.approx(float(sum(value.double().sum() for value in weights.values())), rel=1e-9)


def test_copies_of_shards_train_as_one_set_of_shards(folders):
    assert tiny.curve(folders["hybrid"]) == pytest.approx(tiny.curve(folders["ddp"]), rel=1e-5)


def test_parameters_can_travel_in_half_the_bytes(folders):
    found, expected = tiny.curve(folders["gathered"]), tiny.curve(folders["ddp"])
    assert found == pytest.approx(expected, rel=1e-3) and found[5] != expected[5]


def test_one_process_continues_a_sharded_run(folders, tiny_faces, tmp_path):
    """On half the ranks with twice the batch: the same samples, other noise."""
    folder = rank_jobs.as_it_was(folders["fsdp"], 4, tmp_path / "run")
    left = storage.read(runs.newest(folder))
    double = [f"data.{name}.batch_size=8" for name in ("train", "validate")]
    one = tiny.recipe(tiny_faces, *MORE, BEST, GRID, f"run={folder}", *double, MEASURED)
    assert tiny.train(one) == folder
    assert list(tiny.curve(folder)) == list(range(tiny.STEPS))
    assert tiny.curve(folder)[4] == pytest.approx(tiny.curve(folders["ddp"])[4], rel=0.5)
    end, whole = tiny.checkpoint(folder), tiny.checkpoint(folders["ddp"])
    position = [each["loops"]["fit_loop"]["state_dict"]["combined_loader"] for each in (end, whole)]
    assert position[0] == position[1], "neither a gap nor a repeat"
    for index, state in left["optimizer_states"][0]["state"].items():
        assert end["optimizer_states"][0]["state"][index]["step"] == state["step"] + 2


def test_a_shard_holds_a_part_and_together_they_are_the_whole(folders):
    """Parameters, both moments and the average: half of each on each rank."""
    from torch.distributed.checkpoint import FileSystemReader

    path = runs.newest(folders["fsdp"])
    metadata = FileSystemReader(path).read_metadata().state_dict_metadata
    names = [name for name in metadata if name.startswith("state_dict/")]
    weights = load_file(folders["ddp"] / "model.safetensors")
    assert {name.removeprefix("state_dict/") for name in names} == weights.keys()
    for group in ("state_dict/", "callbacks/EMA/average/"):
        large = [metadata[group + name] for name, value in weights.items() if value.dim() and len(value) >= 2]
        assert large and all(len(entry.chunks) == 2 for entry in large)
    sizes = [sum(file.stat().st_size for file in path.glob(f"__{rank}_*")) for rank in range(2)]
    assert 0.8 < sizes[0] / sizes[1] < 1.25


def test_a_sharded_run_is_loaded_like_any_other(folders, tmp_path):
    """By the run folder, by a checkpoint that is a folder, by an export of it, and by the best weights."""
    folder = folders["fsdp"]
    state = load_system(folder)[0].trained_state()
    newest = load_system(runs.newest(folder))[0].trained_state()
    assert all(torch.equal(value, newest[name]) for name, value in state.items())
    assert json.loads((folder / "checkpoints" / "best.json").read_text())["metric"] == "val/loss"
    exported = load_file(export(runs.newest(folder), tmp_path / "exported", "fp32") / "model.safetensors")
    assert exported.keys() == state.keys() and all(torch.equal(value, state[name]) for name, value in exported.items())
    load_system(folder / "checkpoints" / "best.safetensors")


def test_all_ranks_share_one_run_folder(tiny_faces, folders):
    for name, folder in folders.items():
        assert json.loads((folder / "run.json").read_text())["command"], name
    finished = json.loads((folders["fsdp"] / "finished.json").read_text())
    assert finished["ranks"] == 2 and finished["steps"] == tiny.STEPS
    assert sorted(path.name for path in folders["ddp"].parent.iterdir() if path.is_dir()) == sorted(
        name.replace(" ", "_") for name in folders
    )


def recipe_of(folder: Path) -> Recipe:
    return recipes.load(folder / "recipe.yaml")


def test_the_layout_is_no_part_of_what_a_run_is(folders, tiny_faces):
    """The run folder keeps the layout that it began with."""
    assert recipe_of(folders["ddp to fsdp"])["trainer"]["strategy"] == "ddp"
    assert build_system(recipe_of(folders["fsdp to ddp"])).trained_names() == set(
        load_file(folders["ddp"] / "model.safetensors")
    )
