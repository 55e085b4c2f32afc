"""A run that is asked to stop: it saves itself between two steps, and the same command continues."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import tiny_training as tiny

from anonfw import __main__ as cli
from anonfw.system import System
from anonfw.training import runs, signals
from anonfw.training.preemption import Stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning advises on many things


@pytest.fixture
def undisturbed(tiny_faces, tmp_path) -> Path:
    return tiny.train(tiny.recipe(tiny_faces, f"run={tmp_path / 'undisturbed'}"))


def signalled(monkeypatch, number: signal.Signals, batch: int) -> None:
    """The process gets the signal in the middle of batch `batch` (from 0)."""
    plain = System.training_step

    def training_step(self, *arguments):
        if self.batches_seen == batch:
            os.kill(os.getpid(), number)
        return plain(self, *arguments)

    monkeypatch.setattr(System, "training_step", training_step)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_the_run_after_its_step(number, tiny_faces, tmp_path, monkeypatch, capsys, undisturbed):
    handlers = [signal.getsignal(each) for each in (signal.SIGUSR1, signal.SIGTERM)]
    arguments = tiny.overrides(
        tiny_faces, "callbacks.checkpoint.every=100", "trainer.val_check_interval=4", f"run={tmp_path / 'run'}"
    )
    with monkeypatch.context() as patch:
        signalled(patch, number, 3)
        assert cli.main(["fit", str(tiny.RECIPE), *arguments]) == 75
    said = capsys.readouterr().err
    assert f"stopped by {number.name} at step 4, and saved: the same command continues" in said
    folder = tmp_path / "run"
    record = json.loads((folder / "stopped.json").read_text())
    assert (record["signal"], record["step"]) == (number.name, 4)
    assert runs.step_of(runs.newest(folder)) == 4 and not (folder / "finished.json").exists()
    assert list(tiny.curve(folder)) == [0, 1, 2, 3], "the row of the last step was written"
    assert signals.received == 0
    assert cli.main(["fit", str(tiny.RECIPE), *arguments]) == 0
    assert not (folder / "stopped.json").exists() and (folder / "finished.json").exists()
    assert tiny.curve(folder) == tiny.curve(undisturbed)
    assert (folder / "model.safetensors").read_bytes() == (undisturbed / "model.safetensors").read_bytes()
    signal.signal(signal.SIGUSR1, handlers[0])
    assert signal.getsignal(signal.SIGTERM) == handlers[1], "a training gives the signals back"


def test_a_signal_between_accumulated_batches_waits_for_the_step(tiny_faces, tmp_path, monkeypatch):
    more = ["trainer.accumulate_grad_batches=2", "data.train.limit_samples=60", "trainer.max_steps=3"]
    recipe = tiny.recipe(tiny_faces, "callbacks.checkpoint.every=100", *more, f"run={tmp_path / 'run'}")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        signalled(patch, signal.SIGUSR1, 2)
        tiny.train(recipe)
    folder = tmp_path / "run"
    assert runs.step_of(runs.newest(folder)) == 2
    tiny.train(recipe)
    whole = tiny.train(tiny.recipe(tiny_faces, *more, f"run={tmp_path / 'whole'}"))
    tiny.assert_same_end(folder, whole)


def test_a_signal_in_the_last_step_ends_a_finished_run(tiny_faces, tmp_path, monkeypatch, undisturbed):
    recipe = tiny.recipe(tiny_faces, f"run={tmp_path / 'run'}")
    signalled(monkeypatch, signal.SIGTERM, tiny.STEPS - 1)
    tiny.train(recipe)
    assert signals.received == 0, "the next training of this process is not stopped"
    tiny.assert_same_end(tmp_path / "run", undisturbed)
    assert (tmp_path / "run" / "finished.json").exists() and not (tmp_path / "run" / "stopped.json").exists()
