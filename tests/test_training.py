"""What every system shares while it trains: losses, averages, guards, logs, run folders."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_training as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from anonfw import __main__ as cli
from anonfw import recipe as recipes
from anonfw.data.open import open_loader
from anonfw.errors import AnonfwError
from anonfw.training import fit as fitting
from anonfw.training import runs, throughput
from anonfw.training.ema import EMA
from anonfw.training.guard import FiniteGuard, NonFiniteLoss
from anonfw.training.load import build_system, load_system
from anonfw.training.loggers import JsonLines

pytestmark = pytest.mark.filterwarnings("ignore:.*")  # Lightning advises on many things

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).parent / "golden"
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def run(tiny_faces, tmp_path_factory) -> Path:
    """A finished run of six steps with a checkpoint of each."""
    folder = tmp_path_factory.mktemp("training") / "run"
    more = ["callbacks.checkpoint.keep=6", "callbacks.throughput.every=2", f"run={folder}"]
    return tiny.train(tiny.recipe(tiny_faces, *more))


def parameters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]


# Losses.


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_takes_two_steps(path, tiny_faces, tmp_path):
    more = ["trainer.max_steps=2", "trainer.val_check_interval=2", f"run={tmp_path / 'run'}"]
    recipe = tiny.recipe(tiny_faces, *more, path=path)
    before = {name: p.detach().clone() for name, p in build_system(recipe).named_parameters() if p.requires_grad}
    folder = tiny.train(recipe)
    entries = tiny.metrics(folder)
    assert [entry["step"] for entry in entries if "train/loss" in entry] == [0, 1]
    assert [entry["step"] for entry in entries if "val/loss" in entry] == [1]
    values = {name: value for entry in entries for name, value in entry.items()}
    assert all(math.isfinite(value) for value in values.values()), values
    for name in recipe["system"]["losses"]:
        assert f"train/{name}" in values and f"val/{name}" in values
    after = parameters(folder / "checkpoints" / "last.ckpt")
    unmoved = [name for name in before if torch.equal(before[name], after[name])]
    # The harmonizer's gate starts with a layer of zeros: what lies before that moves from the second step on.
    assert unmoved == [], "these parameters take no part in training"
    assert (folder / "grid" / "step-0000002.png").exists() == ("grid" in recipe["callbacks"])


def test_the_loss_curve_is_the_one_in_git(run):
    """A change that should not change numbers must not change them. `ANONFW_UPDATE_GOLDEN=1 pytest ...` writes anew."""
    file = GOLDEN / "id2face.json"
    names = ("train/loss", "train/reconstruction", "train/identity_vae", "train/alignment")
    found = {name: list(tiny.curve(run, name).values()) for name in names}
    if os.environ.get("ANONFW_UPDATE_GOLDEN"):
        golden = json.loads(file.read_text()) | {"curves": found}
        file.write_text(json.dumps(golden, indent=1) + "\n")
    golden = json.loads(file.read_text())
    assert set(golden["curves"]) == set(names)
    for name, values in golden["curves"].items():
        assert found[name] == pytest.approx(values, rel=golden["relative_tolerance"]), name


def test_the_tiny_trainings_cross_epochs(tiny_faces):
    loader = open_loader(tiny.recipe(tiny_faces), "train")
    assert len(loader) == 3 < tiny.STEPS


def test_the_total_is_the_weighted_sum(run, tiny_faces):
    losses = tiny.recipe(tiny_faces)["system"]["losses"]
    for entry in tiny.metrics(run):
        total = sum(node["weight"] * entry[f"train/{name}"] for name, node in losses.items())
        assert entry["train/loss"] == pytest.approx(total, rel=1e-5)


def test_gradients_are_clipped(tiny_faces, tmp_path):
    """One step of plain descent is as long as the learning rate times the clipped norm."""
    more = [
        "system.optimizer={_target_: torch.optim.SGD, _partial_: true, lr: 1.0}",
        "system.schedule=null",
        "trainer.max_steps=1",
        "trainer.gradient_clip_val=0.05",
        f"run={tmp_path / 'run'}",
    ]
    recipe = tiny.recipe(tiny_faces, *more)
    before = dict(build_system(recipe).named_parameters())
    after = parameters(tiny.train(recipe) / "checkpoints" / "last.ckpt")
    moved = math.sqrt(sum((after[name] - before[name].detach()).double().square().sum().item() for name in after))
    assert moved == pytest.approx(0.05, rel=1e-3)


def test_clipping_by_value_is_not_clipping_by_norm(tiny_faces):
    system = build_system(tiny.recipe(tiny_faces))
    optimizer = torch.optim.SGD(system.vae.parameters(), lr=1.0)
    for parameter in system.vae.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    system.configure_gradient_clipping(optimizer, 0.5, "value")
    assert all((parameter.grad == 0.5).all() for parameter in system.vae.parameters())
    system.configure_gradient_clipping(optimizer, None, None)
    assert all((parameter.grad == 0.5).all() for parameter in system.vae.parameters())


# The average.


def ema_reference(values: list[torch.Tensor], decay: float) -> torch.Tensor:
    """m_0 = p_0;  m_n = d m_(n-1) + (1 - d) p_n  with d = min(decay, (1 + n) / (10 + n)), in double precision."""
    mean = values[0].double()
    for n, value in enumerate(values[1:], start=1):
        d = min(decay, (1 + n) / (10 + n))
        mean = d * mean + (1 - d) * value.double()
    return mean


def test_the_average_of_a_run_is_the_formula(run, tiny_faces):
    recipe = tiny.recipe(tiny_faces)
    start = dict(build_system(recipe).named_parameters())
    steps = [parameters(run / "checkpoints" / f"step={n}.ckpt") for n in range(1, tiny.STEPS + 1)]
    saved = torch.load(run / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True)
    (state,) = [state for state in saved["callbacks"].values() if "average" in state]
    assert state["updates"] == tiny.STEPS and state["average"].keys() == steps[0].keys()
    for name, mean in state["average"].items():
        expected = ema_reference([start[name].detach(), *(step[name] for step in steps)], 0.99)
        torch.testing.assert_close(mean.double(), expected, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(state["average"][name], steps[-1][name]) for name in steps[-1])
    system, _ = load_system(run)
    for name, parameter in system.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, state["average"][name]), "a run's system has the averaged parameters"


def two_layers() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    module[1].bias.requires_grad_(False)
    return module


@given(
    decay=st.floats(0, 0.9999),
    values=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=30),
    accumulate=st.integers(1, 3),
)
def test_the_average_of_any_parameters(decay, values, accumulate):
    module, ema, trainer = two_layers(), EMA(decay), SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    seen = [module[0].weight.detach().clone()]
    for value in values:
        for part in range(accumulate):
            if part == accumulate - 1:  # the optimizer steps with the last of the batches that it accumulates
                trainer.global_step += 1
                with torch.no_grad():
                    module[0].weight.fill_(value)
            ema.on_train_batch_end(trainer, module)
        seen.append(module[0].weight.detach().clone())
    assert ema.updates == len(values)
    assert set(ema.average) == {"0.weight", "0.bias", "1.weight"}
    torch.testing.assert_close(ema.average["0.weight"].double(), ema_reference(seen, decay), rtol=1e-4, atol=1e-5)


def test_a_resumed_average_waits_for_the_optimizer():
    module, ema, trainer = two_layers(), EMA(), SimpleNamespace(global_step=7)
    ema.on_train_start(trainer, module)
    ema.on_train_batch_end(trainer, module)
    assert ema.updates == 0
    trainer.global_step = 8
    ema.on_train_batch_end(trainer, module)
    assert ema.updates == 1


def test_averaged_swaps_and_restores():
    module, ema, trainer = two_layers(), EMA(0.9), SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    mean = {name: value.clone() for name, value in ema.average.items()}
    with torch.no_grad():
        module[0].weight.add_(1)
    own = {name: value.detach().clone() for name, value in module.named_parameters()}

    def holds(expected: dict[str, torch.Tensor]) -> bool:
        return all(torch.equal(dict(module.named_parameters())[name], expected[name]) for name in mean)

    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with ema.averaged(module):
        assert holds(mean) and not holds(own)
    assert holds(own)
    with pytest.raises(ZeroDivisionError), ema.averaged(module):
        raise ZeroDivisionError
    assert holds(own) and all(torch.equal(ema.average[name], mean[name]) for name in mean)
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not holds(own), "the optimizer still holds the module's parameters"


def test_the_state_of_an_average_survives_a_file(tmp_path):
    module, ema, trainer = two_layers(), EMA(0.9), SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    for step in range(1, 4):
        trainer.global_step = step
        with torch.no_grad():
            module[0].weight.mul_(1.5)
        ema.on_train_batch_end(trainer, module)
    torch.save(ema.state_dict(), tmp_path / "state")
    other = EMA(0.9)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    other.on_train_start(SimpleNamespace(global_step=0), module)
    assert other.updates == 3 and tiny.differences(other.average, ema.average) == []
    del other.average["0.bias"]
    with pytest.raises(ValueError, match="other parameters"):
        other.on_train_start(trainer, module)
    with pytest.raises(ValueError, match="decay"):
        EMA(1.0)


# Losses that are no numbers.


def test_a_nan_ends_the_run_and_names_term_and_sample(tiny_faces, tmp_path, capsys):
    more = ["system.losses.planted={_target_: tiny_training.PlantedNaN, after: 3}", f"run={tmp_path / 'run'}"]
    loader = open_loader(tiny.recipe(tiny_faces, *more), "train", seed=0)
    key = [batch.key[1] for batch in loader][2]
    loader.close()
    assert cli.main(["fit", str(tiny.RECIPE), *tiny.overrides(tiny_faces, *more)]) == 2
    error = capsys.readouterr().err
    assert f"not finite at step 2: term 'planted' of 1 samples ({key})" in error
    assert "Traceback" not in error and "regression" not in error
    folder = tmp_path / "run"
    assert runs.step_of(runs.newest(folder)) == 2 and not (folder / "finished.json").exists()


def test_the_guard_looks_at_each_nth_batch():
    trainer = SimpleNamespace(world_size=1, global_step=5)
    terms = {"good": torch.ones(3), "bad": torch.tensor([1.0, float("inf"), float("nan")])}
    module = SimpleNamespace(batches_seen=3, last_keys=["a", "b", "c"], last_terms=terms, global_rank=0)
    bad = torch.tensor(float("nan"))
    FiniteGuard(2).on_before_backward(trainer, module, bad)
    module.batches_seen = 4
    with pytest.raises(NonFiniteLoss, match=r"step 5: term 'bad' of 2 samples \(b, c\)"):
        FiniteGuard(2).on_before_backward(trainer, module, bad)
    FiniteGuard(2).on_before_backward(trainer, module, torch.tensor(1e30))
    with pytest.raises(ValueError):
        FiniteGuard(0)


def test_ranks_agree_before_one_stops():
    """A rank whose own loss is fine stops as well, and says that it was another one."""

    def reduce(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        return value + 1  # the other rank's

    module = SimpleNamespace(batches_seen=0, last_keys=["a"], last_terms={"x": torch.ones(1)}, global_rank=0)
    trainer = SimpleNamespace(world_size=2, global_step=0, strategy=SimpleNamespace(reduce=reduce))
    with pytest.raises(NonFiniteLoss, match="no term on rank 0, but one on another rank"):
        FiniteGuard().on_before_backward(trainer, module, torch.tensor(1.0))


# Logs.


def test_json_lines_go_back_to_a_checkpoint(tmp_path):
    log = JsonLines(tmp_path)
    log.rewind(3)  # nothing there yet
    for step in range(5):
        log.log_metrics({"loss": torch.tensor(step / 3)}, step)
    log.log_metrics({"val": 0.5}, 2)
    with log.file.open("a") as file:
        file.write('{"step": 1, "lo')  # cut off by a kill
    log.rewind(3)
    steps = [json.loads(line)["step"] for line in log.file.read_text().splitlines()]
    assert steps == [0, 1, 2, 2], "three optimizer steps are steps 0, 1 and 2"
    log.log_metrics({"loss": 1}, 3)
    last = json.loads(log.file.read_text().splitlines()[-1])
    assert last == {"step": 3, "loss": 1.0}


def test_throughput_is_logged(run):
    entries = [entry for entry in tiny.metrics(run) if "speed/images_per_second" in entry]
    assert next(entry["step"] for entry in entries) == 1
    assert all(entry["speed/images_per_second"] > 0 and 0 <= entry["speed/data_wait"] <= 1 for entry in entries)


def test_throughput_arithmetic(monkeypatch):
    """Two batches of three pairs on two ranks: 1 s waiting and 3 s computing for each."""
    clock = [0.0]
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock[0])
    logged: dict[str, float] = {}
    module = SimpleNamespace(log=lambda name, value, **_: logged.update({name: value}))
    trainer, pair = SimpleNamespace(world_size=2), type("Pair", (list,), {"partner": ()})([0, 0, 0])
    callback = throughput.Throughput(every=2)
    callback.on_train_epoch_start(trainer, module)
    for _ in range(2):
        assert not logged
        clock[0] += 1
        callback.on_train_batch_start(trainer)
        clock[0] += 3
        callback.on_train_batch_end(trainer, module, None, pair, 0)
    assert logged == {"speed/images_per_second": 2 * 3 * 2 * 2 / 8, "speed/data_wait": 0.25, "speed/seconds": 8}


# Run folders: what the same command does.


@pytest.fixture
def recipe(tiny_faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tiny.recipe(tiny_faces)


def test_the_same_command_continues_an_unfinished_run_and_follows_a_finished_one(recipe):
    first, checkpoint = fitting.open_run(recipe)
    assert checkpoint is None and first.parent == Path("runs/id2face")
    assert recipes.load(first / "recipe.yaml") == recipe
    record = json.loads((first / "run.json").read_text())
    assert record["command"][:3] == ["python", "-m", "anonfw"] and record["name"] == "id2face"
    assert fitting.open_run(recipe)[0] == first
    assert fitting.open_run(recipe, new=True)[0] != first
    newest, _ = fitting.open_run(recipe)
    assert newest != first, "of two unfinished runs the newer one is continued"
    runs.finish(newest, 1.0, 6, 1)
    assert fitting.open_run(recipe)[0] == first
    runs.finish(first, 1.0, 6, 1)
    third, _ = fitting.open_run(recipe)
    assert third not in (first, newest)


def test_another_recipe_is_another_run(recipe, tiny_faces):
    first, _ = fitting.open_run(recipe)
    second, _ = fitting.open_run(tiny.recipe(tiny_faces, "seed=1"))
    assert second != first
    assert fitting.open_run(recipe)[0] == first


def test_resume_auto_needs_something_to_resume(recipe, tiny_faces):
    auto = tiny.recipe(tiny_faces, "resume=auto")
    with pytest.raises(AnonfwError, match="no unfinished run"):
        fitting.open_run(auto)
    first, _ = fitting.open_run(recipe)
    assert fitting.open_run(auto)[0] == first


def test_a_named_run_folder(recipe, tiny_faces, tmp_path):
    named = tiny.recipe(tiny_faces, "run=here/there")
    folder, checkpoint = fitting.open_run(named)
    assert folder == Path("here/there") and checkpoint is None
    assert fitting.open_run(named)[0] == folder
    with pytest.raises(AnonfwError, match="another recipe"):
        fitting.open_run(tiny.recipe(tiny_faces, "run=here/there", "seed=1"))
    with pytest.raises(AnonfwError, match="--new"):
        fitting.open_run(named, new=True)
    runs.finish(folder, 1.0, 6, 1)
    with pytest.raises(AnonfwError, match="has finished"):
        fitting.open_run(named)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(AnonfwError, match="not empty"):
        fitting.open_run(tiny.recipe(tiny_faces, "run=full"))


def test_what_a_finished_run_leaves(run):
    finished = json.loads((run / "finished.json").read_text())
    assert finished["steps"] == tiny.STEPS and finished["ranks"] == 1 and finished["seconds"] > 0
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "run.json", "checkpoints", "metrics.jsonl", "model.safetensors", "finished.json",
    }  # fmt: skip
    names = {f"step={n}.{kind}" for n in range(1, tiny.STEPS + 1) for kind in ("ckpt", "json")} | {"last.ckpt"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == names


def test_the_first_parameters_depend_on_the_seed_and_on_nothing_else(recipe, tiny_faces):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = build_system(recipe)
    assert torch.equal(torch.get_rng_state(), state), "the global random state is left alone"
    torch.rand(5)
    two, three = build_system(recipe), build_system(tiny.recipe(tiny_faces, "seed=1"))
    assert tiny.differences(one.state_dict(), two.state_dict()) == []
    assert not torch.equal(one.vae.encoder[0].weight, three.vae.encoder[0].weight)
