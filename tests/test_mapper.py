"""The identity mapper: networks, training from sidecars, what is kept of it, and its measurement."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiny_training as tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from anonfw import __main__ as cli
from anonfw import recipe as recipes
from anonfw.batch import FaceBatch
from anonfw.errors import AnonfwError
from anonfw.evaluate import verification
from anonfw.evaluate.mapping import MappingEvaluation, collect, majority, other_photos
from anonfw.identity.bank import IdentityBank
from anonfw.nets.mapper import Ensemble, Mapper
from anonfw.system import System
from anonfw.training.load import build_system, load_system, load_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*")

RECIPE = tiny.ROOT / "recipes" / "identity_mapper.yaml"
STATISTICS = "mapper.layers.1.running_var"


class Named(nn.Module):
    """A recogniser of that name and width, which counts how often it is asked."""

    def __init__(self, name: str, dim: int, size: int = 4) -> None:
        super().__init__()
        self.name, self.dim, self.size, self.asked = name, dim, size, 0
        self.norm = nn.BatchNorm1d(dim).requires_grad_(False)

    def crop(self, images: Tensor, alignment: str) -> Tensor:
        assert alignment == "portrait"
        return images

    def forward(self, images: Tensor) -> Tensor:
        self.asked += 1
        return nn.functional.normalize(images.flatten(1)[:, : self.dim] + 1.5, dim=1)


def batch_of(count: int, embeddings: dict[str, int], side: int = 0) -> FaceBatch:
    generator = torch.Generator().manual_seed(count)
    return FaceBatch(
        image=torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8),
        identity=torch.arange(count) // 2,
        index=torch.arange(count),
        key=[f"k{i}" for i in range(count)],
        landmarks=torch.zeros(count, 5, 2),
        embeddings={
            name: nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=1)
            for name, dim in embeddings.items()
        },
    )


# Networks


def test_the_ensemble_joins_sidecars_in_its_own_order():
    ensemble = Ensemble([Named("b", 6), Named("a", 4)])
    batch = batch_of(5, {"a": 4, "b": 6, "unused": 3})
    v = ensemble(batch)
    assert (ensemble.dim, v.shape) == (10, (5, 10))
    torch.testing.assert_close(v, torch.cat([batch.embeddings["b"], batch.embeddings["a"]], 1) / 2**0.5)
    assert not any(recognizer.asked for recognizer in ensemble.recognizers)


def test_the_ensemble_asks_the_recogniser_where_there_is_no_sidecar():
    ensemble = Ensemble([Named("a", 4), Named("b", 6)])
    batch = batch_of(5, {"a": 4}, side=4)
    parts = ensemble.parts(batch)
    assert [recognizer.asked for recognizer in ensemble.recognizers] == [0, 1]
    torch.testing.assert_close(parts["b"].norm(dim=1), torch.ones(5))
    with pytest.raises(AnonfwError, match="no b embeddings and no pictures.*decode: true"):
        ensemble(batch_of(5, {"a": 4}))


def test_the_ensemble_refuses_what_does_not_fit():
    with pytest.raises(AnonfwError, match="the a embeddings are 5 wide, a gives 4"):
        Ensemble([Named("a", 4)])(batch_of(2, {"a": 5}))
    for wrong in ([], [Named("a", 4), Named("a", 4)]):
        with pytest.raises(ValueError, match="each another one"):
            Ensemble(wrong)


def test_the_papers_mlp():
    mapper = Mapper(3 * 512)
    widths = [tuple(layer.weight.shape) for layer in mapper.layers if isinstance(layer, nn.Linear)]
    assert widths == [(2048, 1536), (1024, 2048), (512, 1024)]
    z = mapper(nn.functional.normalize(torch.randn(4, 1536, generator=torch.Generator().manual_seed(0)), dim=1))
    assert z.shape == (4, 512) and torch.allclose(z.norm(dim=1), torch.ones(4))
    assert mapper.skip is None
    # Unit-norm inputs arrive in the first layer with unit variance, whatever the width.
    assert mapper.scale == 1536**0.5


def test_with_the_skip_it_begins_as_a_projection():
    v = nn.functional.normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide, narrow = (Mapper(24, (16,), dim, skip=True) for dim in (24, 12))
    torch.testing.assert_close(wide(v) @ wide(v).T, v @ v.T, atol=1e-5, rtol=0)
    weight = narrow.skip.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(12), atol=1e-5, rtol=0)
    assert Mapper(24, (), 12)(v).shape == (64, 12)


# What is kept of a training


class Parts(System):
    def __init__(self) -> None:
        super().__init__({}, torch.optim.SGD)
        self.trained = nn.BatchNorm1d(3)
        self.frozen = nn.BatchNorm1d(3).requires_grad_(False)
        self.plain = nn.Linear(3, 2)
        self.plain.register_buffer("kept", torch.ones(1))
        self.plain.register_buffer("made_anew", torch.ones(1), persistent=False)
        self.alone = nn.Module()
        self.alone.register_buffer("constant", torch.ones(1))


def test_trained_state_is_parameters_and_the_buffers_beside_them():
    system = Parts()
    assert system.trained_names() == {
        "trained.weight", "trained.bias", "trained.running_mean", "trained.running_var", "trained.num_batches_tracked",
        "plain.weight", "plain.bias", "plain.kept",
    }  # fmt: skip
    assert system.trained_names() <= system.state_dict().keys()


@pytest.fixture(scope="module")
def small(tiny_faces):
    """Overrides that make the recipe a matter of seconds."""

    def make(*more: str) -> recipes.Recipe:
        data = [f"data.{part}.dataset={tiny_faces}" for part in ("train", "validate", "test")]
        changes = [
            "system.hidden=[32,16]", "system.dim=8", "data.train.batch_size=8", "data.train.per_identity=2",
            "data.validate.batch_size=8", "data.validate.per_identity=2", "trainer.max_steps=6",
            "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "trainer.precision=32-true",
            "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "callbacks.checkpoint.every=1",
        ]  # fmt: skip
        return recipes.read(RECIPE, [*data, *changes, *more])

    return make


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """A finished run, with its table."""
    return tiny.train(small(f"run={tmp_path_factory.mktemp('mapper') / 'run'}"))


def test_a_run_ends_with_table_and_bank(run, capsys):
    text = (run / "table.txt").read_text()
    for name in ("mapper", "joined", "arcface_mbf", "edgeface_s"):
        assert f"\n{name} " in text
    assert "8 people" in text and "mapper minus arcface_mbf" in text and "joined minus edgeface_s" in text
    assert sorted(path.name for path in run.glob("table.*")) == ["table.csv", "table.json", "table.md", "table.txt"]
    table = json.loads((run / "table.json").read_text())
    assert table["bank"] == 12 and table["settings"]["bank"]["split"] == "train"
    system, _ = load_system(run)
    bank = IdentityBank.load(run / "bank.safetensors")
    bank.require(system.embedding_name())
    assert (len(bank), bank.dim) == (12, 8)
    assert {"val/loss", "train/triplet"} <= {name for entry in tiny.metrics(run) for name in entry}


def test_the_bank_knows_sex_and_age_where_asked(run, tmp_path, monkeypatch):
    seen = []

    class Estimator:
        """Stands in for the networks: light pictures are of old women."""

        def __call__(self, images, alignment):
            seen.append((tuple(images.shape[1:]), images.dtype, alignment))
            light = images.float().mean((1, 2, 3)) / 255
            return {"age": 100 * light, "female": light}

    monkeypatch.setattr("anonfw.demographics.Demographics", Estimator)
    system, recipe = load_system(run)
    MappingEvaluation(min_photos=2, attributes=True).measure(system, recipe, tmp_path)
    bank = IdentityBank.load(tmp_path / "bank.safetensors")
    assert set(seen) == {((3, 112, 112), torch.uint8, "portrait")}
    assert torch.allclose(bank.attributes["age"], 100 * bank.attributes["female"])
    assert bank.attributes["age"].std() > 1 and len(bank) == 12
    assert IdentityBank.load(run / "bank.safetensors").attributes == {}
    z = system.embed(next(iter(recipes.build(recipe["data"]["test"])(shuffle=False))))
    like = {name: torch.full((len(z),), values[3].item()) for name, values in bank.attributes.items()}
    assert (bank.attributes["age"][bank.nearest(z, like=like)] - bank.attributes["age"][3]).abs().max() < 10


def test_the_statistics_are_kept_in_all_files(run):
    system, recipe = load_system(run)
    trained = load_file(run / "model.safetensors")
    assert trained.keys() == system.trained_names()
    assert not any(name.startswith("ensemble.") for name in trained), "a frozen network is inside"
    assert int(trained["mapper.layers.1.num_batches_tracked"]) == 6
    assert not torch.allclose(trained[STATISTICS], torch.ones(32), atol=1e-3), "the statistics never moved"
    from_checkpoint, _ = load_system(run / "checkpoints" / "last.ckpt")
    assert tiny.differences(dict(from_checkpoint.trained_state()), dict(system.trained_state())) == []
    loader = recipes.build(recipe["data"]["test"])(shuffle=False)
    batch = next(iter(loader))
    with torch.no_grad():
        assert torch.equal(system.embed(batch), from_checkpoint.embed(batch))
        alone = system.embed(batch.select([0]))
    torch.testing.assert_close(alone, system.embed(batch)[:1], atol=1e-5, rtol=1e-4)


def test_cut_and_resumed_is_bitwise_the_same(run, small, tmp_path, monkeypatch):
    recipe = small(f"run={tmp_path / 'run'}")
    plain = System.training_step

    def training_step(self, *arguments):
        if self.batches_seen == 4:
            raise KeyError("cut")
        return plain(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(System, "training_step", training_step)
        tiny.train(recipe)
    folder = tiny.train(recipe)
    for part in ("state_dict", "optimizer_states", "batches_seen"):
        assert tiny.differences(tiny.checkpoint(folder)[part], tiny.checkpoint(run)[part]) == []
    assert (folder / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()
    assert tiny.curve(folder) == tiny.curve(run)
    assert (folder / "table.txt").read_text() == (run / "table.txt").read_text()


def test_training_with_an_average_keeps_average_and_statistics(small, tmp_path):
    more = ("callbacks.ema={_target_: anonfw.training.ema.EMA, decay: 0.5}", "evaluate=null")
    folder = tiny.train(small(f"run={tmp_path / 'run'}", *more))
    saved, kept = tiny.checkpoint(folder), load_file(folder / "model.safetensors")
    (average,) = [state["average"] for state in saved["callbacks"].values() if "average" in state]
    assert torch.equal(kept["mapper.layers.0.weight"], average["mapper.layers.0.weight"])
    assert torch.equal(kept[STATISTICS], saved["state_dict"][STATISTICS])
    from_checkpoint, _ = load_system(folder / "checkpoints" / "last.ckpt")
    assert tiny.differences(dict(from_checkpoint.trained_state()), dict(load_system(folder)[0].trained_state())) == []


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_exported_and_loaded(run, tmp_path, dtype):
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--dtype", dtype]) == 0
    ours, _ = load_system(run)
    theirs, _ = load_system(tmp_path / "out")
    for name, value in ours.trained_state().items():
        other = theirs.trained_state()[name]
        assert other.dtype == value.dtype
        torch.testing.assert_close(
            other, value, atol=0 if dtype == "fp32" else 1e-3, rtol=0 if dtype == "fp32" else 1e-3
        )
    card = (tmp_path / "out" / "card.md").read_text()
    assert "measures no anonymization" in card and "mapper minus" in card


def test_weights_without_statistics_are_refused(run, tmp_path):
    weights = load_file(run / "model.safetensors")
    del weights[STATISTICS]
    save_file(weights, tmp_path / "half.safetensors")
    system, _ = load_system(run)
    with pytest.raises(AnonfwError, match=f"1 parameters missing.*{STATISTICS}"):
        load_weights(system, tmp_path / "half.safetensors")


def test_a_mapper_of_other_recognisers_does_not_load(run, small):
    with pytest.raises(AnonfwError, match="of another shape"):
        load_system(run, ["system.recognizers=[{_target_: anonfw.identity.ArcFace}]"])


def test_validate_again_on_other_people(run, tmp_path, capsys):
    out = tmp_path / "again"
    assert cli.main(["validate", str(run), "data.test.split=val", "--out", str(out), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "bank.safetensors" in printed and "8 people" in printed
    assert (out / "bank.safetensors").read_bytes() == (run / "bank.safetensors").read_bytes()
    assert cli.main(["validate", str(run), "evaluate.min_photos=9", "--out", str(out), "--device", "cpu"]) == 2
    assert "0 people with 9 photos or more" in capsys.readouterr().err


def test_the_papers_recipe_with_recognisers_that_can_be_had():
    names = ("arcface_r50", "farl_ep64", "facenet_vggface2")
    nodes = ", ".join(f"{{_target_: test_mapper.Named, name: {name}, dim: 512}}" for name in names)
    recipe = recipes.read(tiny.ROOT / "recipes" / "paper" / "identity_mapper.yaml", [f"system.recognizers=[{nodes}]"])
    assert all(recipe["data"][part]["sidecars"] == list(names) for part in ("train", "validate", "test"))
    system = build_system(recipe)
    assert system.mapper.layers[0].weight.shape == (2048, 1536) and system.mapper.skip is None
    batch = batch_of(8, dict.fromkeys(names, 512))
    optimizer = system.configure_optimizers()["optimizer"]
    losses = []
    for step in range(30):
        loss, _ = system.total(batch, system.rng("train", step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    # 50 times 500,000 photos.
    assert recipe["trainer"]["max_steps"] * recipe["data"]["train"]["batch_size"] == pytest.approx(25e6, rel=1e-3)


# The measurement


def unit(values: np.ndarray) -> np.ndarray:
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


who_and_where = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=24)


@given(who_and_where)
def test_majority_by_counting(photos: list[tuple[int, int]]):
    person, mapped = np.array(photos).T
    found = majority(mapped, person)
    for who in set(person.tolist()):
        count = Counter(mapped[person == who].tolist())
        best = min(count, key=lambda identity: (-count[identity], identity))
        assert set(found[person == who].tolist()) == {best}


@given(st.integers(0, 10**6), st.integers(4, 20))
def test_other_photos_leave_the_own_one_out(seed: int, count: int):
    rng = np.random.default_rng(seed)
    e, person = unit(rng.standard_normal((count, 5))), np.repeat(np.arange(count), 2)[:count] * 7
    found = other_photos(torch.from_numpy(e), person)
    for row in range(count):
        others = [i for i in range(count) if person[i] == person[row] and i != row]
        if others:
            torch.testing.assert_close(
                found[row], torch.from_numpy(unit(e[others].sum(0)[None])[0]), atol=1e-5, rtol=1e-4
            )


@given(st.lists(st.integers(-2, 4), min_size=1, max_size=20))
def test_genuine_pairs_are_all_pairs(identity: list[int]):
    first, second = verification.genuine_pairs(identity)
    expected = {(i, j) for i in range(len(identity)) for j in range(i) if identity[i] == identity[j]}
    assert {(max(a, b), min(a, b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)} == expected
    assert len(first) == len(expected)


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20))
def test_best_threshold_is_no_worse_than_any(pairs: list[tuple[int, bool]]):
    scores, same = np.array([s for s, _ in pairs], float), np.array([b for _, b in pairs])
    found = verification.best_threshold(scores, same)

    def right(threshold: float) -> int:
        return int(((scores > threshold) == same).sum())

    assert right(found) == max(right(t) for t in [-np.inf, *scores.tolist()])


def test_fold_accuracy_of_perfect_random_and_hopeless_embeddings():
    person = np.repeat(np.arange(40), 4)
    perfect = np.eye(40, dtype=np.float32)[person]
    right, who, folds = verification.fold_accuracy(perfect, person)
    assert folds == 10 and right.mean() == 1 and len(right) == 2 * 40 * 6 and set(who) == set(range(40))
    noise = unit(np.random.default_rng(0).standard_normal((160, 16)))
    assert 0.4 < verification.fold_accuracy(noise, person)[0].mean() < 0.6
    assert verification.fold_accuracy(np.ones((160, 4), np.float32) / 2, person)[0].mean() == 0.5
    assert verification.fold_accuracy(perfect, person, folds=10)[0].tolist() == right.tolist(), "drawn from the seed"
    assert verification.fold_accuracy(perfect[:12], person[:12])[2] == 0, "three people are not two folds of two"


def measured(spaces: dict[str, np.ndarray], person: np.ndarray, banks: dict[str, np.ndarray], **arguments):
    names = [str(number) for number in range(len(next(iter(banks.values()))))]
    made = {name: IdentityBank(torch.from_numpy(centres), names, name) for name, centres in banks.items()}
    tensors = {name: torch.from_numpy(e) for name, e in spaces.items()}
    return MappingEvaluation(**arguments).run(tensors, torch.from_numpy(person), made)


def test_consistent_collapsed_and_random_embeddings():
    rng = np.random.default_rng(1)
    person = np.repeat(np.arange(30), 5)
    perfect = unit(rng.standard_normal((30, 32)))[person]
    collapsed = unit(np.ones((150, 32)) + 0.01 * rng.standard_normal((150, 32)))
    random = unit(rng.standard_normal((150, 32)))
    centres = unit(rng.standard_normal((500, 32)))
    centres[0] = collapsed.mean(0)
    report = measured(
        {"mapper": perfect, "collapsed": collapsed, "random": random},
        person,
        {"mapper": centres, "collapsed": unit(centres), "random": unit(centres)},
    )
    for name in ("centre", "majority", "pairs", "recall1", "accuracy", "tpr@1e-2"):
        assert report.value("mapper", name).value == 1.0
    for name in ("centre", "majority", "pairs"):
        assert report.value("collapsed", name).value == 1.0, "consistency alone can be had for nothing"
    assert report.value("collapsed", "distinct").value == pytest.approx(1 / 30), "and the last columns say so"
    assert report.value("collapsed", "strangers").value == 1.0
    assert report.value("mapper", "distinct").value > 0.85
    assert report.value("random", "pairs").value < 0.05 and 0.2 <= report.value("random", "majority").value < 0.35
    assert report.differences["mapper minus random"].low > 0.8
    text = report.text()
    assert "mapper minus random" in text and text.count("better") and "500 synthetic identities" in text


@given(st.integers(0, 10**6))
def test_measures_by_loops(seed: int):
    rng = np.random.default_rng(seed)
    person = rng.permutation(np.repeat(np.arange(6), [2, 2, 3, 4, 5, 7]))
    e, centres = unit(rng.standard_normal((len(person), 3))), unit(rng.standard_normal((7, 3)))
    report = measured({"mapper": e}, person, {"mapper": centres})
    mapped = (e @ centres.T).argmax(1)
    agree, hit = [], []
    for i in range(len(person)):
        others = [j for j in range(len(person)) if person[j] == person[i] and j != i]
        agree += [mapped[i] == mapped[j] for j in others]
        hit.append((e[others].sum(0) @ centres.T).argmax() == mapped[i])
    assert report.value("mapper", "pairs").value == pytest.approx(np.mean(agree))
    assert report.value("mapper", "centre").value == pytest.approx(np.mean(hit))
    apart = [(i, j) for i in range(len(person)) for j in range(i) if person[i] != person[j]]
    expected = np.mean([mapped[i] == mapped[j] for i, j in apart])
    assert report.value("mapper", "strangers").value == pytest.approx(expected)
    wholes = {(e[person == who].sum(0) @ centres.T).argmax() for who in range(6)}
    assert report.value("mapper", "distinct").value == pytest.approx(len(wholes) / 6)


def test_choice_of_photos():
    identity = np.array([3, 1, 3, 3, 1, 2, 3, 9, 9, 9])
    assert MappingEvaluation(photos_per_person=3).choose(identity).tolist() == [0, 1, 2, 3, 4, 7, 8, 9]
    assert MappingEvaluation(min_photos=3, photos_per_person=3).choose(identity).tolist() == [0, 2, 3, 7, 8, 9]
    for wrong in ({"min_photos": 1}, {"min_photos": 5, "photos_per_person": 4}):
        with pytest.raises(ValueError, match="min_photos"):
            MappingEvaluation(**wrong)


def test_the_mapper_is_another_space_after_each_training_step(run):
    system, _ = load_system(run)
    name = system.embedding_name()
    assert name.startswith("arcface_mbf+edgeface_s > E_I ") and name == system.embedding_name()
    with torch.no_grad():
        system.mapper.layers[1].running_mean[0] += 1e-3
    assert system.embedding_name() != name
    assert system.recognizer_names() == {"arcface_mbf", "edgeface_s"}


def test_a_split_without_a_usable_photo():
    with pytest.raises(AnonfwError, match="no photo of this split can be used"):
        collect(None, [])
