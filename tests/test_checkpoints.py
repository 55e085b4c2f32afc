"""Checkpoints: written whole or not at all, found to be damaged when they are, and the best weights kept apart."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_training as tiny
import torch

from anonfw import __main__ as cli
from anonfw.errors import AnonfwError
from anonfw.training import runs, storage
from anonfw.training.checkpoint import CheckpointError, Checkpoints
from anonfw.training.load import load_system
from anonfw.training.loggers import JsonLines

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning advises on many things

TREE = {
    "global_step": 7,
    "state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.mean": torch.ones(3, dtype=torch.bfloat16)},
    "optimizer_states": [{"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "betas": (0.9, 1)}]}],
    "callbacks": {"EMA": {"average": {"a.weight": torch.zeros(2, 3)}, "updates": 7}, "other": None},
}


class Trainer(SimpleNamespace):
    """As much of a trainer as the callback asks for; its checkpoints hold the step."""

    def __init__(self, shards: bool = False) -> None:
        super().__init__(global_step=0, is_global_zero=True, global_rank=0, world_size=1, sanity_checking=False)
        self.strategy = SimpleNamespace(checkpoint_io=storage.Storage())
        self.shards = shards

    def save_checkpoint(self, path: Path, weights_only: bool) -> None:
        tree = TREE | {"global_step": self.global_step}
        if self.shards:
            self.strategy.checkpoint_io.failure = storage.attempt(lambda: storage.write_shards(tree, path, 0))
        else:
            self.strategy.checkpoint_io.save_checkpoint(tree, path)


def steps(trainer: Trainer, callback: Checkpoints, count: int) -> None:
    callback.on_train_start(trainer, None)
    for _ in range(count):
        callback.on_train_batch_start(trainer)
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, None)


@pytest.fixture(params=[False, True], ids=["file", "shards"])
def saved(request, tmp_path) -> Path:
    """A run folder with checkpoints of the steps 2, 4 and 6, and step 6 not yet named."""
    trainer = Trainer(request.param)
    steps(trainer, Checkpoints(tmp_path, every=2, keep=2), 6)
    return tmp_path


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").iterdir()}


def test_a_checkpoint_gets_its_name_when_the_next_step_begins(saved):
    assert names(saved) == {"step=2.ckpt", "step=2.json", "step=4.ckpt", "step=4.json", "last.ckpt"} | {
        ".step=6.ckpt.partial"
    }
    assert runs.newest(saved) == saved / "checkpoints" / "step=4.ckpt"
    assert os.readlink(saved / "checkpoints" / "last.ckpt") == "step=4.ckpt"


def test_the_next_start_clears_what_a_kill_has_left_and_old_ones_go(saved):
    trainer = Trainer((saved / "checkpoints" / "step=2.ckpt").is_dir())
    trainer.global_step = 4
    callback = Checkpoints(saved, every=2, keep=2)
    callback.on_train_start(trainer, None)
    assert not [name for name in names(saved) if name.startswith(".")]
    trainer.global_step = 5
    callback.on_train_end(trainer, None)
    assert {name for name in names(saved) if name.endswith(".ckpt")} == {"step=4.ckpt", "step=5.ckpt", "last.ckpt"}
    assert runs.step_of(runs.newest(saved)) == 5


def test_what_is_read_is_what_was_written(saved):
    path = saved / "checkpoints" / "step=4.ckpt"
    assert tiny.differences(storage.read(path), TREE | {"global_step": 4}) == []
    assert runs.step_of(path) == 4 and storage.damage(path) is None


@pytest.mark.parametrize("harm", ["cut short", "one bit", "gone", "no manifest", "half a manifest"])
def test_damage_is_seen_and_the_one_before_is_used(saved, harm, capsys):
    last, before = (saved / "checkpoints" / f"step={n}.ckpt" for n in (4, 2))
    file = max(last.glob("*"), key=lambda path: path.stat().st_size) if last.is_dir() else last
    content = file.read_bytes()
    if harm == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif harm == "one bit":
        file.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif harm == "gone" and last.is_dir():
        file.unlink()
    elif harm == "gone":
        shutil.copy(storage.manifest_of(last), saved / "checkpoints" / "step=5.json")
        last = last.rename(last.with_name("step=5.ckpt"))
        (last.parent / "step=5.json").write_text(json.dumps({"step": 5, "files": {"part": {"bytes": 1, "sha256": ""}}}))
    elif harm == "no manifest":
        storage.manifest_of(last).unlink()
    else:
        storage.manifest_of(last).write_text('{"step": 4, "fi')
    assert runs.newest(saved) == before
    told = capsys.readouterr().err
    assert str(last) in told and "damaged and not used" in told


def test_a_damaged_later_checkpoint_does_not_push_out_a_whole_one(tmp_path):
    steps(Trainer(), Checkpoints(tmp_path, every=2, keep=1), 5)
    later = tmp_path / "checkpoints" / "step=8.ckpt"
    later.write_bytes(b"half")
    trainer = Trainer()
    trainer.global_step = 4
    callback = Checkpoints(tmp_path, every=2, keep=1)
    callback.on_train_start(trainer, None)
    trainer.global_step = 6
    callback.on_train_end(trainer, None)
    assert runs.newest(tmp_path) == tmp_path / "checkpoints" / "step=6.ckpt"


@pytest.mark.parametrize("shards", [False, True], ids=["file", "shards"])
def test_a_full_disk_costs_no_checkpoint(tmp_path, monkeypatch, shards):
    trainer, callback = Trainer(shards), Checkpoints(tmp_path, every=2)
    steps(trainer, callback, 3)
    callback.on_train_batch_start(trainer)
    trainer.global_step = 4
    monkeypatch.setattr(storage, "open", lambda _, mode: open("/dev/full", mode), raising=False)  # noqa: SIM115
    with pytest.raises(CheckpointError, match=r"No space left on device.*ones before it are untouched"):
        callback.on_train_batch_end(trainer, None)
    assert names(tmp_path) == {"step=2.ckpt", "step=2.json", "last.ckpt"}
    assert runs.newest(tmp_path) == tmp_path / "checkpoints" / "step=2.ckpt"


def test_ranks_stop_together_when_one_cannot_write(tmp_path, monkeypatch):
    """Rank 0 is fine; what the other one reports ends both."""
    trainer, callback = Trainer(), Checkpoints(tmp_path, every=1)
    trainer.world_size = 2
    callback.on_train_start(trainer, None)
    trainer.global_step = 1

    def gather(answers, mine):
        assert mine[0] is None and mine[1]
        answers[:] = [mine, ("OSError: [Errno 28] No space left on device", {})]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(CheckpointError, match="rank 1: OSError"):
        callback.on_train_batch_end(trainer, None)
    assert names(tmp_path) == set()


def test_arguments_are_checked(tmp_path):
    for wrong in ({"every": 0}, {"keep": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            Checkpoints(tmp_path, **wrong)


# In whole trainings.


class Killed(BaseException):
    """Nothing catches it: what kill -9 leaves is what lies on the disk when it is raised."""


def kill_before_row(patch: pytest.MonkeyPatch) -> None:
    """The checkpoint of step 4 is written; the row of that step is not."""
    log = JsonLines.log_metrics

    def log_metrics(self, metrics, step=None):
        if step == 3:
            raise Killed
        log(self, metrics, step)

    patch.setattr(JsonLines, "log_metrics", log_metrics)


def kill_at_name(patch: pytest.MonkeyPatch, after: bool) -> None:
    """Just before or just after the checkpoint of step 4 gets its name."""
    replace = os.replace

    def rename(source, target):
        if Path(target).name != "step=4.ckpt":
            return replace(source, target)
        if after:
            replace(source, target)
        raise Killed

    patch.setattr(os, "replace", rename)


KILLS = {
    "before the row": (kill_before_row, 2),
    "before the name": (lambda patch: kill_at_name(patch, False), 2),
    "after the name": (lambda patch: kill_at_name(patch, True), 4),
}


@pytest.fixture(scope="module")
def whole(tiny_faces, tmp_path_factory) -> Path:
    """An undisturbed run, with its best weights."""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    return tiny.train(tiny.recipe(tiny_faces, *OFTEN, f"run={folder}"))


OFTEN = ("callbacks.checkpoint.every=2", "trainer.val_check_interval=2", "callbacks.checkpoint.best=val/loss")


@pytest.mark.slow
@pytest.mark.parametrize("moment", KILLS)
def test_no_row_is_lost_wherever_a_save_is_killed(moment, tiny_faces, tmp_path, monkeypatch, whole):
    kill, left = KILLS[moment]
    recipe = tiny.recipe(tiny_faces, *OFTEN, f"run={tmp_path / 'run'}")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill(patch)
        tiny.train(recipe)
    folder = tmp_path / "run"
    assert runs.step_of(runs.newest(folder)) == left
    tiny.train(recipe)
    tiny.assert_same_end(folder, whole)
    for name in ("train/loss", "val/loss"):
        assert tiny.curve(folder, name) == tiny.curve(whole, name)
    assert list(tiny.curve(folder)) == list(range(tiny.STEPS))


def test_the_best_weights_are_kept(whole):
    curve = tiny.curve(whole, "val/loss")
    record = json.loads((whole / "checkpoints" / "best.json").read_text())
    assert record == {"metric": "val/loss", "value": min(curve.values()), "step": min(curve, key=curve.get) + 1}
    system, _ = load_system(whole / "checkpoints" / "best.safetensors")
    if record["step"] == tiny.STEPS:
        averages = storage.read(whole / "checkpoints" / "last.ckpt")["callbacks"]["EMA"]["average"]
        assert all(torch.equal(value, averages[name]) for name, value in system.trained_state().items())


def test_a_worse_value_after_a_resume_does_not_replace_the_best(tmp_path):
    trainer, callback = Trainer(), Checkpoints(tmp_path, best="val/score", mode="max")
    module = SimpleNamespace(trained_state=lambda: {"a": torch.full((1,), float(trainer.global_step))})
    callback.on_train_start(trainer, None)
    for step, score in ((1, 0.5), (2, 0.7)):
        trainer.global_step, trainer.callback_metrics = step, {"val/score": torch.tensor(score)}
        callback.on_validation_epoch_end(trainer, module)
    again = Checkpoints(tmp_path, best="val/score", mode="max")
    again.on_train_start(trainer, None)
    trainer.global_step, trainer.callback_metrics = 3, {"val/score": torch.tensor(0.6)}
    again.on_validation_epoch_end(trainer, module)
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text())["step"] == 2
    trainer.callback_metrics = {"val/loss": torch.tensor(1.0)}
    with pytest.raises(AnonfwError, match=r"no metric 'val/score' is logged; validation logs val/loss"):
        again.on_validation_epoch_end(trainer, module)


@pytest.mark.slow
def test_a_full_disk_ends_the_command_with_an_error(tiny_faces, tmp_path, monkeypatch, capsys, whole):
    changes = tiny.overrides(tiny_faces, *OFTEN, f"run={tmp_path / 'run'}")
    write, calls = storage.write_file, []

    def fill(tree, path):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        write(tree, path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_file", fill)
        assert cli.main(["fit", str(tiny.RECIPE), *changes]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "Traceback" not in error
    assert runs.step_of(runs.newest(tmp_path / "run")) == 2
    assert cli.main(["fit", str(tiny.RECIPE), *changes]) == 0
    tiny.assert_same_end(tmp_path / "run", whole)
