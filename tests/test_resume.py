"""A run that is cut off anywhere, and the same command again: bitwise the same end as without the cut."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_training as tiny
import torch

from anonfw.system import System
from anonfw.training import fit as fitting
from anonfw.training import runs

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning advises on many things


class Cut(Exception):
    """Stands for whatever ends a process."""


def train_until(monkeypatch: pytest.MonkeyPatch, recipe, batch: int) -> Path:
    """Trains, and falls over before batch number `batch` (from 0)."""
    plain = System.training_step

    def training_step(self, *arguments):
        if self.batches_seen == batch:
            raise Cut
        return plain(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(System, "training_step", training_step)
        tiny.train(recipe)
    return Path(recipe["run"])


CASES = {
    # overrides, batch that never comes, step of the checkpoint that is left
    "each step": (["callbacks.checkpoint.every=1"], 3, 3),
    "steps are repeated": (["callbacks.checkpoint.every=2"], 5, 4),
    "inside an epoch": (["callbacks.checkpoint.every=2"], 3, 2),
    "before the first checkpoint": (["callbacks.checkpoint.every=4"], 2, None),
    "validation": (["callbacks.checkpoint.every=2", "trainer.val_check_interval=2"], 5, 4),
    "bf16": (["callbacks.checkpoint.every=2", "trainer.precision=bf16-mixed", "trainer.val_check_interval=3"], 5, 4),
    # One epoch, each step over two batches; cut between the two of a step.
    "accumulated": (
        ["trainer.accumulate_grad_batches=2", "data.train.limit_samples=60", "trainer.max_steps=3"], 3, 1,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tiny_faces, tmp_path_factory):
    """Run folder of an uncut training, one for each set of overrides that matters to its end."""
    made: dict[tuple, Path] = {}

    def get(more: list[str]) -> Path:
        key = tuple(item for item in more if not item.startswith("callbacks.checkpoint.every"))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("undisturbed") / "run"
            tiny.train(tiny.recipe(tiny_faces, *key, f"run={made[key]}"))
        return made[key]

    return get


@pytest.mark.parametrize("case", CASES)
def test_the_same_command_again_ends_bitwise_equal(case, tiny_faces, tmp_path, monkeypatch, undisturbed):
    more, batch, step = CASES[case]
    recipe = tiny.recipe(tiny_faces, *more, f"run={tmp_path / 'run'}")
    folder = train_until(monkeypatch, recipe, batch)
    left = runs.newest(folder)
    assert (runs.step_of(left) if left else None) == step
    assert not (folder / "finished.json").exists()
    before = tiny.curve(folder)
    assert len(before) == batch // recipe["trainer"].get("accumulate_grad_batches", 1)

    assert tiny.train(recipe) == folder
    whole = undisturbed(more)
    tiny.assert_same_end(folder, whole)
    for name in ("train/loss", "train/reconstruction", "train/kl"):
        assert tiny.curve(folder, name) == tiny.curve(whole, name)
    steps = recipe["trainer"]["max_steps"]
    assert list(tiny.curve(folder)) == list(range(steps))
    assert before.items() <= tiny.curve(folder).items(), "what was logged before the cut stays true"
    if "trainer.val_check_interval=2" in more:
        assert list(tiny.curve(folder, "val/loss")) == [1, 3, 5]
        assert tiny.curve(folder, "val/loss") == tiny.curve(whole, "val/loss")
    assert (folder / "finished.json").exists()


@pytest.mark.slow
def test_a_run_that_was_cut_after_each_step(tiny_faces, tmp_path, monkeypatch, undisturbed):
    """Resumed from resumed runs, in and at the end of epochs."""
    recipe = tiny.recipe(tiny_faces, f"run={tmp_path / 'run'}")
    for batch in range(1, tiny.STEPS):
        folder = train_until(monkeypatch, recipe, batch)
    tiny.train(recipe)
    tiny.assert_same_end(folder, undisturbed([]))


def test_validation_and_grids_in_between_change_nothing(tiny_faces, tmp_path, undisturbed):
    grid = "callbacks.grid={_target_: anonfw.training.grid.SampleGrid, _partial_: true, rows: 2, every: 2}"
    more = ["trainer.val_check_interval=1", grid]
    folder = tiny.train(tiny.recipe(tiny_faces, *more, f"run={tmp_path / 'run'}"))
    assert sorted(path.name for path in (folder / "grid").iterdir()) == [f"step-{s:07d}.png" for s in (2, 4, 6)]
    assert len(tiny.curve(folder, "val/loss")) == tiny.STEPS
    whole = undisturbed([])
    ours, theirs = tiny.checkpoint(folder), tiny.checkpoint(whole)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "batches_seen"):
        assert tiny.differences(ours[part], theirs[part]) == []
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert tiny.curve(folder) == tiny.curve(whole)


def test_validation_sees_the_averaged_parameters_and_always_the_same_noise(tiny_faces, tmp_path):
    """With a learning rate of zero, every validation must give the same number; with the average it lags behind."""
    folder = tiny.train(
        tiny.recipe(tiny_faces, "system.optimizer.lr=0.0", "trainer.val_check_interval=2", f"run={tmp_path / 'still'}")
    )
    values = list(tiny.curve(folder, "val/loss").values())
    assert len(values) == 3 and len(set(values)) == 1 and math.isfinite(values[0])


def test_a_kill_after_training_trains_no_further(tiny_faces, tmp_path, monkeypatch, undisturbed):
    """Cut in the evaluation that ends a run: the same command goes on there."""
    recipe = tiny.recipe(tiny_faces, "callbacks.checkpoint.every=4", f"run={tmp_path / 'run'}")

    def cut(*_):
        raise Cut

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(fitting, "save_average", cut)
        tiny.train(recipe)
    folder = tmp_path / "run"
    assert runs.step_of(runs.newest(folder)) == tiny.STEPS, "the last step is kept, although 4 does not divide it"
    assert not (folder / "finished.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(System, "training_step", cut)
        tiny.train(recipe)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed([]) / "model.safetensors").read_bytes()
    assert list(tiny.curve(folder)) == list(range(tiny.STEPS))


@pytest.mark.slow
def test_kill_9_and_the_same_command_again(tiny_faces, tmp_path, root):
    """A real process with a loader worker, killed between two steps, one step behind it that no checkpoint has."""
    more = [
        "callbacks.checkpoint.every=2",
        "callbacks.hold={_target_: tiny_training.Hold, _partial_: true, batch: 3}",
        "data.train.workers=1",
    ]

    def command(folder: Path) -> list[str]:
        changes = tiny.overrides(tiny_faces, *more, f"run={folder}")
        return [sys.executable, "-W", "ignore", "-m", "anonfw", "fit", str(tiny.RECIPE), *changes]

    environment = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'tests'}", "OMP_NUM_THREADS": "1"}
    folder, held, hold = tmp_path / "run", tmp_path / "run.held", tmp_path / "run.hold"
    hold.touch()
    with open(tmp_path / "output", "wb") as output:
        process = subprocess.Popen(command(folder), cwd=tmp_path, env=environment, stdout=output, stderr=output)
        try:
            until = time.monotonic() + 280
            while not held.exists():
                assert process.poll() is None and time.monotonic() < until, (tmp_path / "output").read_text()
                time.sleep(0.05)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert process.returncode == -signal.SIGKILL
    assert runs.step_of(runs.newest(folder)) == 2 and list(tiny.curve(folder)) == [0, 1, 2]
    hold.unlink()

    again = subprocess.run(command(folder), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "continuing" in again.stdout and str(folder) in again.stdout
    whole = tiny.train(tiny.recipe(tiny_faces, *more, f"run={tmp_path / 'whole'}"))
    tiny.assert_same_end(folder, whole)
    assert tiny.curve(folder) == tiny.curve(whole)
    assert list(tiny.curve(folder)) == list(range(tiny.STEPS))


def test_a_checkpoint_of_another_network_is_refused(tiny_faces, tmp_path, undisturbed):
    """The run folder's recipe forbids this; a checkpoint that was copied by hand could still meet another network."""
    from anonfw.errors import AnonfwError

    left = runs.newest(undisturbed([]))
    for number, (change, words) in enumerate(
        [("system.gate=prediction", "another network"), ("system.landmarks=true", "another network"),
         ("system.unet.blocks=2", "another network")]
    ):  # fmt: skip
        recipe = tiny.recipe(tiny_faces, change, f"run={tmp_path / str(number)}")
        folder, _ = fitting.open_run(recipe)
        with pytest.raises(AnonfwError, match=words):
            fitting.fit(recipe, folder, left)


def test_a_resumed_run_needs_the_same_data(tiny_faces, tmp_path, monkeypatch):
    from anonfw.data.card import DataError

    left = runs.newest(train_until(monkeypatch, tiny.recipe(tiny_faces, f"run={tmp_path / 'run'}"), 2))
    recipe = tiny.recipe(tiny_faces, "data.train.limit_samples=18", f"run={tmp_path / 'other'}")
    folder, _ = fitting.open_run(recipe)
    with pytest.raises(DataError, match="other data"):
        fitting.fit(recipe, folder, left)


def test_checkpoints_hold_what_was_trained_and_load_safely(undisturbed):
    saved = torch.load(undisturbed([]) / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if name.startswith("identity.")], "a frozen network is inside"
    (average,) = [state["average"] for state in saved["callbacks"].values() if "average" in state]
    assert average.keys() == saved["state_dict"].keys()
    assert "unet.conv_in.weight" in average and "vae.encoder.0.weight" in average
    assert saved["global_step"] == saved["batches_seen"] == tiny.STEPS
