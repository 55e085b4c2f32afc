"""One training in different layouts: blocks, precision, accumulation, and which runs are the same run."""

from __future__ import annotations

import importlib.util
import json
import socket
import sys
import threading
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_training as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anonfw.errors import AnonfwError
from anonfw.training import fit as fitting
from anonfw.training import ranks, runs
from anonfw.training.blocks import ActivationCheckpointing, Compile, find_blocks
from anonfw.training.ema import EMA
from anonfw.training.load import build_system
from anonfw.training.precision import BFloat16Weights

pytestmark = pytest.mark.filterwarnings("ignore:.*")

ROOT = Path(__file__).resolve().parent.parent


# Blocks.


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return x + scale * torch.tanh(self.linear(x))


def network() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), Block(4), nn.ModuleDict({"deep": Block(4)})["deep"], nn.Linear(4, 1))


def gradients(net: nn.Module) -> dict[str, torch.Tensor]:
    net.zero_grad()
    net(torch.arange(8.0).reshape(2, 4)).sum().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def test_blocks_are_outermost_and_large_enough():
    net = nn.ModuleDict({"a": nn.Sequential(Block(8), Block(2)), "b": Block(4)})
    net["b"].inner = Block(4)
    assert find_blocks(net, ["Block"]) == [net["a"][0], net["a"][1], net["b"]]
    assert find_blocks(net, ["Block"], min_parameters=20) == [net["a"][0], net["b"]]
    assert find_blocks(net, ["Other"]) == []


@pytest.mark.parametrize(
    "prepare",
    [ActivationCheckpointing(["Block"]), Compile(["Block"], backend="eager")],
    ids=["checkpointed", "compiled"],
)
def test_prepared_blocks_compute_the_same_under_the_same_names(prepare):
    expected = gradients(network())
    net = network()
    names = list(net.state_dict())
    prepare.setup(None, net, "fit")
    assert list(net.state_dict()) == names
    found = gradients(net)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-7, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(net(torch.ones(1, 4)), network()(torch.ones(1, 4)))


def test_checkpointed_activations_are_not_kept():
    kept: list[int] = []
    net, plain = network(), network()
    ActivationCheckpointing(["Block"]).setup(None, net, "fit")
    for each in (plain, net):
        kept.append(0)

        def count(tensor: torch.Tensor) -> torch.Tensor:
            kept[-1] += 1
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            each(torch.ones(2, 4, requires_grad=True))
    assert kept[1] < kept[0]


@pytest.mark.parametrize("callback", [ActivationCheckpointing, Compile])
def test_blocks_that_do_not_exist_are_told(callback):
    with pytest.raises(ValueError, match="no module is a Missing; name other classes, of Linear"):
        callback(["Missing"]).setup(None, network(), "fit")


def test_the_systems_have_blocks(tiny_faces):
    system = build_system(tiny.recipe(tiny_faces))
    kinds = {type(block).__name__ for block in find_blocks(system)}
    assert kinds == {"ResnetBlock2D", "BasicTransformerBlock"}


# Precision.


def test_bf16_true_holds_trained_matrices_in_half_the_bytes():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    net[3].requires_grad_(False)
    BFloat16Weights("cpu").convert_module(net)
    kinds = {name: p.dtype for name, p in net.named_parameters()}
    half = {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert {name for name, dtype in kinds.items() if dtype == torch.bfloat16} == half


def test_the_average_of_bfloat16_parameters_is_float32_and_moves():
    """1 - d = 0.0001 of a bfloat16 is below its last digit."""
    net, trainer, ema = nn.Linear(2, 2).bfloat16(), SimpleNamespace(global_step=0), EMA(0.9999)
    with torch.no_grad():
        net.weight.fill_(1.0)
    ema.on_train_start(trainer, net)
    ema.updates = 1_000_000
    with torch.no_grad():
        net.weight.fill_(2.0)
    for _ in range(3):
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, net)
    mean = ema.average["weight"]
    assert mean.dtype == torch.float32
    torch.testing.assert_close(mean, torch.full((2, 2), 2 - 0.9999**3), rtol=0, atol=1e-6)
    with ema.averaged(net):
        assert net.weight.dtype == torch.bfloat16 and (net.weight == 1.0).all()
    assert (net.weight == 2.0).all() and ema.average["weight"] is mean


@pytest.mark.slow
def test_half_weights_checkpointed_blocks_and_accumulation_train_and_resume(tiny_faces, tmp_path):
    more = [
        "trainer.precision=bf16-true",
        "trainer.accumulate_grad_batches=2",
        "trainer.max_steps=3",
        "callbacks.blocks={_target_: anonfw.training.blocks.ActivationCheckpointing}",
        "callbacks.checkpoint.keep=3",
    ]
    folder = tiny.train(tiny.recipe(tiny_faces, *more, f"run={tmp_path / 'run'}"))
    assert list(tiny.curve(folder)) == [0, 1, 2]
    saved = tiny.checkpoint(folder)
    kinds = {name: value.dtype for name, value in saved["state_dict"].items()}
    assert kinds["unet.conv_in.weight"] == torch.bfloat16 and kinds["unet.conv_norm_out.weight"] == torch.float32
    assert {value.dtype for value in saved["callbacks"]["EMA"]["average"].values()} == {torch.float32}
    again = tmp_path / "again"
    recipe = tiny.recipe(tiny_faces, *more, f"run={again}")
    place, _ = fitting.open_run(recipe)
    fitting.fit(recipe, place, folder / "checkpoints" / "step=2.ckpt")
    tiny.assert_same_end(again, folder)


# Which run a command means.


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_is_the_same_on_any_number_of_devices(here, tiny_faces):
    folder, _ = fitting.open_run(tiny.recipe(tiny_faces))
    strategy = "trainer.strategy={_target_: anonfw.training.fsdp.FSDP2}"
    for layout in (["trainer.devices=2", "trainer.strategy=ddp"], ["trainer.num_nodes=4", strategy]):
        assert fitting.open_run(tiny.recipe(tiny_faces, *layout))[0] == folder
    assert fitting.open_run(tiny.recipe(tiny_faces, "data.train.batch_size=8"))[0] != folder


def test_a_named_run_continues_with_another_batch_on_each_rank(here, tiny_faces):
    folder, _ = fitting.open_run(tiny.recipe(tiny_faces, "run=one"))
    half = ["trainer.devices=2", "data.train.batch_size=2", "data.train.workers=1", "trainer.accumulate_grad_batches=2"]
    assert fitting.open_run(tiny.recipe(tiny_faces, "run=one", *half))[0] == folder
    with pytest.raises(AnonfwError, match="another recipe"):
        fitting.open_run(tiny.recipe(tiny_faces, "run=one", *half, "data.train.flip=0.1"))


def test_without_takes_dotted_keys():
    tree = {"a": {"b": {"c": 1, "d": 2}, "e": 3}, "f": 4}
    assert fitting.without(tree, ["a.b.c", "f", "x.y"]) == {"a": {"b": {"d": 2}, "e": 3}}
    assert tree["f"] == 4 and tree["a"]["b"]["c"] == 1


# What rank 0 decides.


def test_one_process_decides_for_itself_and_for_those_that_it_starts(monkeypatch):
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "SLURM_NTASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(ranks.INHERITED, "")
    assert ranks.decided_once(lambda: ["folder", None]) == ["folder", None]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ranks.decided_once(lambda: pytest.fail("only rank 0 decides")) == ["folder", None]
    monkeypatch.delenv(ranks.INHERITED)
    with pytest.raises(AnonfwError, match="srun or torchrun"):
        ranks.decided_once(lambda: None)


def test_the_others_hear_of_a_decision_that_failed():
    """Rank 0 leaves, and takes the server of the store along, only when they have."""
    store, heard = torch.distributed.HashStore(), []

    def other() -> None:
        heard.append(json.loads(store.get("here/decision")))
        store.set("here/heard/1", "")

    def decide() -> None:
        raise AnonfwError("no run there")

    thread = threading.Thread(target=other)
    thread.start()
    with pytest.raises(AnonfwError, match="no run there"):
        ranks._publish(store, "here", 2, decide)
    thread.join(10)
    assert heard == [{}]


def test_a_rank_that_waits_in_vain_says_for_what(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    with _free_port() as port:
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(AnonfwError, match="rank 1 of 2 did not meet the others at localhost"):
            ranks.decided_once(lambda: None, patience=timedelta(seconds=1))


@contextmanager
def _free_port():
    """A port that is bound, so that nobody else serves there, and that answers nobody."""
    with socket.socket() as bound:
        bound.bind(("localhost", 0))
        yield bound.getsockname()[1]


# The estimate on paper.


@pytest.fixture(scope="module")
def scaling():
    spec = importlib.util.spec_from_file_location("scaling", ROOT / "bench" / "scaling.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling"] = module
    spec.loader.exec_module(module)
    return module


def test_an_all_reduce_passes_twice_all_but_one_nth(scaling):
    machine = scaling.Machine(latency=0.0)
    assert scaling.ring(8e9, 4, 1e9, 0.0) == pytest.approx(6.0)
    assert scaling.gather(8e9, 1, machine) == 0.0
    inside = 7 / 8 * 8e9 / machine.nvlink
    assert scaling.gather(8e9, 8, machine) == pytest.approx(inside)
    assert scaling.gather(8e9, 32, machine) == pytest.approx(inside + 3 / 4 * 1e9 / machine.network)


@given(gpus=st.sampled_from([1, 2, 8, 64, 256]), sharded=st.booleans(), number=st.integers(0, 5))
def test_estimates_are_bounded(scaling, gpus, sharded, number):
    job = scaling.JOBS[number]
    found = scaling.estimate(job, gpus, scaling.Machine(), sharded)
    assert 0 < found["efficiency"] <= 1 and found["step"] >= found["compute"]
    free = scaling.Machine(nvlink=1e30, network=1e30, latency=0.0, jitter=0.0, host=0.0, cores=10**9)
    assert scaling.estimate(job, gpus, free, sharded)["efficiency"] == pytest.approx(1.0)
    assert scaling.estimate(job, 2 * gpus, scaling.Machine(), sharded)["efficiency"] <= found["efficiency"] + 1e-9


def test_the_documented_table_is_what_the_code_computes(scaling):
    text = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    assert scaling.estimates(scaling.Machine()) in text


def test_a_fingerprint_is_of_the_text():
    assert runs.fingerprint("a") == runs.fingerprint("a") != runs.fingerprint("b")
