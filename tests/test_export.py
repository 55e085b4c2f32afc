"""Export and back: the folder, the base, the card, and weights as a beginning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_training as tiny
import torch
import yaml
from safetensors.torch import load_file

from anonfw import __main__ as cli
from anonfw import export as exporting
from anonfw import recipe as recipes
from anonfw.data.card import Card
from anonfw.data.files import sha256_of
from anonfw.data.open import open_loader
from anonfw.errors import AnonfwError
from anonfw.model_card import without_paths
from anonfw.training import load, runs
from anonfw.training.load import load_system, load_weights, read_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*")


@pytest.fixture(scope="module")
def run(tiny_faces, tmp_path_factory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("export") / "run"
    return tiny.train(tiny.recipe(tiny_faces, "trainer.max_steps=2", "system.steps=2", f"run={folder}"))


@pytest.fixture(scope="module")
def photos(tiny_faces):
    loader = open_loader(tiny.recipe(tiny_faces), "test", shuffle=False)
    batch = next(iter(loader))
    loader.close()
    return batch


@pytest.fixture
def judged(run, tmp_path) -> Path:
    """A copy of the run with a result table."""
    from anonfw.evaluate.intervals import Estimate
    from anonfw.evaluate.protocols import Threshold
    from anonfw.evaluate.report import Report

    def row(rate: float) -> dict[str, Estimate]:
        estimate = Estimate(rate, rate / 2, min(1.0, 2 * rate), 40, 8, "bootstrap")
        names = ("tpr_source", "tpr_other")
        return {f"{name}@{fpr}": estimate for name in names for fpr in ("1e-2", "1e-3")}

    folder = shutil.copytree(run, tmp_path / "judged")
    thresholds = [Threshold(fpr=fpr, value=v, accepted=3, pairs=3000) for fpr, v in ((1e-2, 0.25), (1e-3, 0.375))]
    judge = {"name": "edgeface_s", "sha256": "ab" * 32, "licence": "for judging only"}
    report = Report(
        rows={"anonymized": row(0.0125), "original": row(0.9375)},
        thresholds=thresholds,
        judge=judge,
        people=8,
        photos=40,
        draws=3,
        gallery=40,
        gallery_people=8,
        chance_top1=0.1,
        spread={},
    )
    report.save(folder)
    return folder


def trained(system) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in system.named_parameters() if p.requires_grad}


def test_fp32_comes_back_bitwise(run, photos, tmp_path):
    out = exporting.export(run, tmp_path / "out", dtype="fp32")
    system, recipe = load_system(out)
    own, _ = load_system(run)
    assert tiny.differences(trained(system), trained(own)) == []
    assert torch.equal(system.anonymize(photos, 1), own.anonymize(photos, 1))
    assert recipe.name == "id2face"
    assert dict(recipe) == {"name": "id2face", **recipes.load(run / "recipe.yaml")}
    assert not system.training


def test_fp16_is_half_as_large_and_close(run, photos, tmp_path):
    out = exporting.export(run, tmp_path / "out")
    tensors = load_file(out / "model.safetensors")
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert not [name for name in tensors if name.startswith("identity.")], "frozen networks are not exported"
    assert (out / "model.safetensors").stat().st_size < 0.51 * (run / "model.safetensors").stat().st_size
    system, own = load_system(out)[0], load_system(run)[0]
    assert {p.dtype for p in system.parameters()} == {torch.float32}
    assert (system.anonymize(photos) - own.anonymize(photos)).abs().mean() < 0.01


def test_a_checkpoint_exports_its_average(run, tmp_path):
    checkpoint = run / "checkpoints" / "last.ckpt"
    out = exporting.export(checkpoint, tmp_path / "out", dtype="fp32")
    assert tiny.differences(load_file(out / "model.safetensors"), read_weights(checkpoint)) == []
    facts = json.loads((out / "export.json").read_text())
    assert facts["steps"] == 2 and facts["from"]["file"] == "last.ckpt"
    assert sha256_of(out / "model.safetensors") == facts["sha256"]


def test_the_facts(run, tmp_path):
    out = exporting.export(run, tmp_path / "out")
    facts = json.loads((out / "export.json").read_text())
    assert facts["sha256"] == sha256_of(out / "model.safetensors")
    assert facts["bytes"] == (out / "model.safetensors").stat().st_size
    assert facts["parameters"] == sum(value.numel() for value in load_file(out / "model.safetensors").values())
    assert facts["from"] == {"file": "model.safetensors", "sha256": sha256_of(run / "model.safetensors")}
    assert (facts["steps"], facts["ranks"], facts["dtype"], facts["name"]) == (2, 1, "fp16", "id2face")
    assert facts["commit"] == json.loads((run / "run.json").read_text())["commit"]
    assert sorted(path.name for path in out.iterdir()) == ["card.md", "export.json", "model.safetensors", "recipe.yaml"]
    again = exporting.export(out, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    kept = json.loads((again / "export.json").read_text())
    assert {key: kept[key] for key in ("steps", "ranks", "commit", "command", "name")} == {
        key: facts[key] for key in ("steps", "ranks", "commit", "command", "name")
    }


def test_a_damaged_export_is_refused(run, tmp_path):
    out = exporting.export(run, tmp_path / "out")
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)
    with pytest.raises(AnonfwError, match="sha256 differs"):
        load_system(out)


def test_the_card(judged, tiny_faces, tmp_path):
    out = exporting.export(judged, tmp_path / "out")
    text = (out / "card.md").read_text()
    data, facts = Card.load(tiny_faces), json.loads((out / "export.json").read_text())
    shards = data.of_split("train")
    assert text.startswith("# id2face\n")
    for part in (
        data.source,
        data.licence,
        f"{sum(s.identities for s in shards)} people, {sum(s.samples for s in shards)} photos of 112 px",
        "steps: 2, 16 images seen",  # four pairs a step
        "python -m anonfw",
        facts["sha256"],
        facts["commit"] or "unknown",
        "Recogniser: edgeface_s (sha256 abababab",
        "8 people and 40 photos never trained on, 3 anonymizations",
        "cosine > 0.2500 (false positive rate 1e-2)",
        "1.2 % [0.6, 2.5]",
        "cosine > 0.3750 (false positive rate 1e-3)",
        "93.8 % [46.9, 100.0]",
        "insightface model zoo, non-commercial research",
        "for judging only",
        (judged / "table.md").read_text().strip(),
        "## Out of scope",
        "## Intended use",
        "started from: scratch",
    ):
        assert part in text, part
    assert str(tmp_path) not in text and str(tiny_faces.parent) not in text, "a path of this machine"
    assert str(tmp_path) not in (out / "export.json").read_text()
    for kind in ("json", "csv", "md", "txt"):
        assert (out / f"table.{kind}").read_bytes() == (judged / f"table.{kind}").read_bytes()
    assert (exporting.export(out, tmp_path / "again") / "table.md").exists()


def test_a_table_of_other_weights_is_not_shown(judged, tmp_path):
    old = (judged / "model.safetensors").stat().st_mtime + 100
    (judged / "model.safetensors").touch()
    import os

    os.utime(judged / "model.safetensors", (old, old))
    text = (exporting.export(judged, tmp_path / "one") / "card.md").read_text()
    assert "Not measured" in text and "edgeface" not in text
    text = (exporting.export(judged, tmp_path / "two", table=judged) / "card.md").read_text()
    assert "Recogniser: edgeface_s" in text
    with pytest.raises(AnonfwError, match="no result table in"):
        exporting.export(judged, tmp_path / "three", table=tmp_path)
    assert not (tmp_path / "three").exists()


def test_a_card_without_its_data_says_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    recipe["dataset"] = "/somewhere/else/faces"
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (copy / "finished.json").unlink()
    text = (exporting.export(copy, tmp_path / "out") / "card.md").read_text()
    assert "`faces`, split train. Its card could not be read" in text and "/somewhere" not in text
    assert "16 images seen by each process" in text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("data.train.dataset=/a/b/faces", "data.train.dataset=faces"),
        ("/a/b c=/d/e,/f/g.yaml", "b c=e,g.yaml"),
        ("~/runs/x", "x"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("recipes/id2face.yaml and 1/2", "recipes/id2face.yaml and 1/2"),
    ],
)
def test_paths_are_cut(text, clean):
    assert without_paths(text) == clean


def test_nothing_is_overwritten_unasked(run, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    exporting.export(run, out)  # an empty folder is no obstacle
    before = sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir())
    with pytest.raises(AnonfwError, match="not empty"):
        exporting.export(run, out)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in out.iterdir()) == before
    (out / "extra").touch()
    exporting.export(run, out, dtype="fp32", overwrite=True)
    assert json.loads((out / "export.json").read_text())["dtype"] == "fp32" and not (out / "extra").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("keep me")
    with pytest.raises(AnonfwError, match="no earlier export"):
        exporting.export(run, mine, overwrite=True)
    with pytest.raises(AnonfwError, match="is a file"):
        exporting.export(run, mine / "letter.txt", overwrite=True)
    assert (mine / "letter.txt").read_text() == "keep me"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"], "no temporary folder is left"


def test_a_failure_in_the_middle_leaves_the_old_export(run, tmp_path, monkeypatch):
    out = exporting.export(run, tmp_path / "out")
    before = (out / "export.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("anonfw.data.files.write_json", fail)
    with pytest.raises(OSError, match="disk full"):
        exporting.export(run, out, dtype="fp32", overwrite=True)
    assert (out / "export.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_exported(run, tmp_path):
    with pytest.raises(AnonfwError, match="no run folder"):
        exporting.export(tmp_path, tmp_path / "out")
    empty = tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    shutil.copy(run / "recipe.yaml", empty)
    with pytest.raises(AnonfwError, match="no weights yet"):
        exporting.export(empty, tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "dtype", "words"), [(1e5, "fp16", "too much for fp16"), (float("nan"), "fp32", "not finite")]
)
def test_a_value_that_does_not_fit_is_named(value, dtype, words):
    with pytest.raises(AnonfwError, match=f"layer.weight.*{words}"):
        exporting._cast("layer.weight", torch.tensor([1.0, value]), dtype)


# A base and `init`.


def test_a_base_is_a_beginning(run, tiny_faces, tmp_path, monkeypatch):
    folder = tmp_path / "bases"
    file = exporting.export_base(run, folder, "tiny")
    assert sorted(path.name for path in folder.iterdir()) == ["tiny.md", "tiny.safetensors"]
    assert "`init: tiny`" in (folder / "tiny.md").read_text() and str(tmp_path) not in (folder / "tiny.md").read_text()
    with pytest.raises(AnonfwError, match="--overwrite"):
        exporting.export_base(run, folder, "tiny")
    exporting.export_base(run, folder, "tiny", overwrite=True)
    with pytest.raises(AnonfwError, match="name"):
        exporting.export_base(run, folder, "../tiny")
    monkeypatch.setattr(load, "BASES", folder)
    own = trained(load_system(run)[0])
    for source in ("tiny", str(file)):
        recipe = tiny.recipe(tiny_faces, f"init={source}", "trainer.max_steps=1", "system.optimizer.lr=0.0",
                             f"run={tmp_path / Path(source).name}")  # fmt: skip
        started = trained(load_system(tiny.train(recipe))[0])
        assert all(torch.equal(started[name], own[name].half().float()) for name in own), "training began there"
    with pytest.raises(AnonfwError, match="a base \\(tiny\\)"):
        read_weights("tyni")


def test_a_base_is_small(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "BASE_BYTES", 1_000_000)
    with pytest.raises(AnonfwError, match="at most 1"):
        exporting.export_base(run, tmp_path / "bases", "tiny")
    assert not (tmp_path / "bases").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("system.latent_dim=9", "of another shape"),
        ("system.unet.blocks=2", "missing"),
        ("system.landmarks=true", "shape"),
    ],
)
def test_weights_of_another_network_are_refused_whole(run, tiny_faces, change, words):
    system = load.build_system(tiny.recipe(tiny_faces, change))
    before = {name: value.clone() for name, value in trained(system).items()}
    with pytest.raises(AnonfwError, match=words):
        load_weights(system, run / "model.safetensors")
    assert tiny.differences(before, trained(system)) == []


def test_what_is_no_checkpoint(tmp_path):
    torch.save({"something": 1}, tmp_path / "other.ckpt")
    with pytest.raises(AnonfwError, match="no checkpoint of a run"):
        read_weights(tmp_path / "other.ckpt")
    assert runs.step_of(tmp_path / "other.ckpt") is None


def test_the_verb(run, tmp_path, capsys):
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'out' / 'card.md'}" in shown and "load_system" in shown
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "not empty" in capsys.readouterr().err
    assert cli.main(["export", str(run), str(tmp_path / "bases"), "--as-base", "mine"]) == 0
    shown = capsys.readouterr().out
    assert "init: mine" in shown and (tmp_path / "bases" / "mine.safetensors").exists()
