"""The comparison of runs: the same numbers from run folders, W&B's files and W&B's server; a page that stands alone."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import re
from pathlib import Path

import pytest
import wandb_server
from hypothesis import given
from hypothesis import strategies as st

from anonfw import __main__ as cli
from anonfw import recipe as recipes
from anonfw.compare import plots, write
from anonfw.compare.differences import ABSENT, differences
from anonfw.compare.experiment import Experiment, curves_of
from anonfw.compare.page import page
from anonfw.compare.sources import find
from anonfw.compare.table import compare, labels_of, letter
from anonfw.errors import AnonfwError
from anonfw.evaluate.intervals import Estimate
from anonfw.evaluate.protocols import Threshold
from anonfw.evaluate.report import Report
from anonfw.training import runs

ROOT = Path(__file__).resolve().parent.parent
RECIPE_FILE = ROOT / "recipes" / "id2face.yaml"
OFFLINE = Path(__file__).parent / "wandb_offline"
LEAK, POSE = "tpr_source@1e-2", "pose_error"


def estimate(value: float, half: float) -> Estimate:
    return Estimate(value, max(value - half, 0.0), value + half, 60, 60, "bootstrap")


def report(leak: float, pose: float, judge: str = "edgeface_s") -> Report:
    rows = {
        "anonymized": {LEAK: estimate(leak, 0.03), POSE: estimate(pose, 0.5)},
        "box": {LEAK: estimate(0.05, 0.03), POSE: Estimate.missing()},
        "random_other": {LEAK: estimate(0.008, 0.008), POSE: estimate(12.5, 0.8)},
    }
    thresholds = [Threshold(0.01, 0.3112, 9000, 90)]
    return Report(
        rows, thresholds, {"name": judge, "sha256": "0" * 64, "licence": "MIT"}, 60, 60, 1, 400, 125, 0.01, {}
    )


def make(
    folder: Path,
    *overrides: str,
    path: Path = RECIPE_FILE,
    table: Report | None = None,
    steps: int = 100,
    done: bool = True,
) -> Path:
    """A run folder as `fit` leaves it, without the training."""
    recipe = recipes.load(path, overrides)
    assert recipe.mistakes == []
    runs.create(recipe.name, recipes.dump(dict(recipe)), folder=folder)
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(19, steps, 20):
            logged = {"train/loss": 1 / (step + 1), "speed/images_per_second": 40.0, "speed/seconds": 0.6 * step}
            file.write(json.dumps({"step": step, **logged}) + "\n")
        file.write(json.dumps({"step": steps - 1, "val/loss": 0.5}) + "\n")
    if table is not None:
        table.save(folder)
    if done:
        runs.finish(folder, seconds=72.0, steps=steps, ranks=1)
    return folder


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Three runs that differ in one value."""
    root = tmp_path_factory.mktemp("runs") / "id2face"
    for guidance, leak, pose in ((1.0, 0.14, 3.6), (2.0, 0.057, 4.2), (3.0, 0.033, 4.8)):
        make(root / f"guidance-{guidance}", f"system.guidance={guidance}", table=report(leak, pose))
    return root


# Differences of recipes.

TREE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(["a", "b"])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(["x", "y", "_target_", "z"]), inner, max_size=3)
    ),
    max_leaves=8,
)
RECIPE = st.dictionaries(st.sampled_from(["seed", "system", "data"]), TREE, max_size=3)


@given(st.lists(RECIPE, min_size=1, max_size=4))
def test_differences_are_found_if_and_only_if_there_are_some(trees):
    found = differences(trees)
    assert bool(found) == (len({json.dumps(tree, sort_keys=True) for tree in trees}) > 1)
    assert all(len(values) == len(trees) for values in found.values())
    assert differences([trees[0], copy.deepcopy(trees[0])]) == {}


def test_only_what_differs_is_shown_and_once():
    base = recipes.load(RECIPE_FILE)
    other = recipes.load(RECIPE_FILE, ["system.beta=1e-3", "trainer.max_steps=50", "data.train.flip=null", "run=here"])
    found = differences([base, other])
    assert found == {
        "system.beta": ["0.0003", "0.001"],
        "data.train.flip": ["0.5", "null"],
        "trainer.max_steps": ["400", "50"],
    }


def test_arguments_are_compared_among_equal_targets_only():
    mapper = recipes.load(ROOT / "recipes" / "identity_mapper.yaml")
    trees = [recipes.load(RECIPE_FILE), recipes.load(RECIPE_FILE, ["system.beta=1e-3"]), mapper]
    found = differences(trees)
    assert found["system"] == ["ID2Face", "ID2Face", "IdentityMapper"]
    assert found["system.beta"] == ["0.0003", "0.001", ""]
    assert "system.hidden" not in found and "system.unet" not in found
    assert found["callbacks.ema"] == ["EMA", "EMA", ABSENT]


# What a run is.


def test_cost_counts_every_start_and_every_process():
    clock = [(19, 10.0), (39, 20.0), (59, 30.0), (79, 12.0), (99, 24.0)]  # started twice
    rows = [(step, {"speed/seconds": seconds, "speed/images_per_second": seconds}) for step, seconds in clock]
    experiment = Experiment("r", "r", {}, curves_of(rows), finished={"ranks": 4, "seconds": 25.0})
    assert experiment.hours == pytest.approx((30 + 24) * 4 / 3600)
    assert experiment.images_per_second == 20.0
    assert Experiment("r", "r", {}, {}, finished={"seconds": 36.0}).hours == pytest.approx(0.01)
    assert Experiment("r", "r", {}, {}).hours is None


def test_curves_keep_numbers_in_order_and_the_later_of_two():
    rows = [(5, {"a": 1.0, "text": "x", "_step": 3}), (3, {"a": 2}), (5, {"a": 4.0, "b": math.nan}), (None, {"a": 9})]
    (name,) = (curves := curves_of(rows))
    assert name == "a" and curves["a"][0].tolist() == [3, 5] and curves["a"][1].tolist() == [2.0, 4.0]


def test_letters():
    assert [letter(number) for number in (0, 25, 26, 51, 52)] == ["A", "Z", "AA", "AZ", "BA"]


def test_labels_are_the_fewest_values_that_tell_runs_apart(three, tmp_path):
    experiments = find([str(three)])
    assert labels_of(experiments, differences([e.recipe for e in experiments])) == [
        "A guidance=1.0", "B guidance=2.0", "C guidance=3.0",
    ]  # fmt: skip
    same = [make(tmp_path / f"{'a_name_longer_than_any_legend_wants' * 2}{n}") for n in range(2)]
    experiments = find([str(folder) for folder in same])
    labels = labels_of(experiments, {})
    assert [label[0] for label in labels] == ["A", "B"] and max(map(len, labels)) <= 34
    assert labels[1].endswith("wants1")


# Sources.


def test_run_folders_are_found_in_every_way_and_once(three, tmp_path, monkeypatch):
    names = [f"id2face/guidance-{g}" for g in (1.0, 2.0, 3.0)]
    for words in ([str(three)], [f"{three}/*"], [str(p) for p in sorted(three.iterdir())], [str(three), f"{three}/*"]):
        assert [experiment.name for experiment in find(words)] == names
    monkeypatch.chdir(three.parent)
    assert [e.place for e in find(["id2face/guidance-2.0"])] == ["id2face/guidance-2.0"]


def test_the_table_of_another_measurement_in_the_run(tmp_path):
    folder = make(tmp_path / "run", table=report(0.1, 4.0))
    report(0.3, 5.0, judge="facenet").save(folder / "lfw")
    own, other = find([str(folder), str(folder / "lfw")])
    assert (own.result()[LEAK].value, other.result()[LEAK].value) == (0.1, 0.3)
    assert other.name.endswith("(lfw)")
    (note,) = compare([own, other]).notes
    assert "measured in different ways" in note and "judge facenet" in note
    validated = make(tmp_path / "other")
    report(0.2, 5.0).save(validated / "validate")
    assert find([str(validated)])[0].result()[LEAK].value == 0.2


def test_offline_files_of_wandb(capsys, tmp_path):
    """Two processes of one run: one experiment with the result that the second one left."""
    for place in (OFFLINE, OFFLINE / "offline-run-*"):
        experiments = find([str(place)])
        last = experiments[-1]
        assert (last.system, last.dataset, last.state) == ("ID2Face", "embedded", "finished")
        assert last.result()[LEAK] == Estimate(0.05, 0.01, 0.14, 60, 60, "bootstrap")
        assert last.recipe["system"]["guidance"] == 1.0 and "anonfw" not in last.recipe
    (run,) = find([str(OFFLINE)])
    assert run.curves["train/loss"][0].tolist() == list(range(0, 60, 5))
    assert run.steps == 60 and run.begun["commit"] == "0" * 40


@pytest.fixture
def wandb_login(monkeypatch):
    """wandb's real client, against a server on this machine."""
    import wandb

    with wandb_server.server() as address:
        monkeypatch.setenv("WANDB_BASE_URL", address)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_MODE", "online")
        wandb.teardown()
        yield
        wandb.teardown()


@pytest.mark.slow
def test_runs_on_the_server_through_the_real_client(wandb_login, tmp_path):
    experiments = find(["id2face-guidance"], project="team/anonfw")
    assert [e.place for e in experiments] == [f"wandb:team/anonfw/aaaa000{n}" for n in (1, 2, 3)]
    first, _, crashed = experiments
    assert first.result()[LEAK] == Estimate(0.14, 0.11, 0.17, 60, 60, "bootstrap")
    assert first.curves["train/loss"][0].tolist() == [19, 39, 59, 79, 99] and first.curves["val/loss"][0].tolist() == [
        59
    ]
    assert first.hours == pytest.approx(0.6 * 99 / 3600, abs=1e-4) and first.begun["commit"].startswith("0123456789")
    assert crashed.state == "unfinished, 60 of 100 steps" and crashed.result() == {}
    for word in ("aaaa0002", "id2face/2026-01-02_03-01-05"):
        assert [e.place[-8:] for e in find([word], project="team/anonfw")] == ["aaaa0002"]
    for word in ("team/anonfw/aaaa0002", "https://wandb.example/team/anonfw/runs/aaaa0002?nw=1"):
        assert [e.place[-8:] for e in find([word])] == ["aaaa0002"]
    table = write(experiments, tmp_path)
    assert list(table.recipe) == ["system.guidance"]
    assert "A guidance=1.0" in (tmp_path / "comparison.html").read_text()
    with pytest.raises(AnonfwError, match="has no run with the id, name or group 'nothing'"):
        find(["nothing"], project="team/anonfw")
    with pytest.raises(AnonfwError, match="cannot read team/other from W&B"):
        find(["aaaa0001"], project="team/other")


def test_what_cannot_be_read_is_told_in_a_line(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path / "nothing")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("anonfw: no run at ") and error.count("\n") == 1 and "--project" in error
    folder = make(tmp_path / "run")
    (folder / "table.json").write_text("{")
    assert cli.main(["compare", str(folder)]) == 2
    assert "table.json is damaged" in capsys.readouterr().err
    (folder / "recipe.yaml").write_text("a: [")
    assert cli.main(["compare", str(folder)]) == 2
    assert "recipe.yaml is no recipe" in capsys.readouterr().err


# The table and the page.


@pytest.fixture(scope="module")
def written(three, tmp_path_factory) -> tuple[Path, str]:
    """What the verb wrote of three runs, and what it printed."""
    out = tmp_path_factory.mktemp("out")
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        assert cli.main(["compare", str(three), "--out", str(out)]) == 0
    return out, shown.getvalue()


def test_the_table_has_the_numbers_of_the_runs(three, written):
    out, shown = written
    assert "A guidance=1.0" in shown and "14.0 [11,17]" in shown and "random_other" in shown
    assert "system.guidance: A 1.0, B 2.0, C 3.0" in shown and "1.0 device minutes" in shown
    assert sorted(path.name for path in out.iterdir()) == [
        "comparison.html", "leakage_utility.png", "learning_curves.png",
        "table.csv", "table.json", "table.md", "table.txt",
    ]  # fmt: skip
    table = json.loads((out / "table.json").read_text())
    for name, folder in (("A guidance=1.0", "guidance-1.0"), ("C guidance=3.0", "guidance-3.0")):
        assert table["rows"][name] == json.loads((three / folder / "table.json").read_text())["rows"]["anonymized"]


def test_the_page_fetches_nothing_and_runs_nothing(written):
    text = (written[0] / "comparison.html").read_text()
    assert "<script" not in text and "@import" not in text
    assert re.findall(r"\s(?:src|srcset|action|data)=", text) == []
    assert [link for link in re.findall(r"(?:xlink:)?href=\"([^\"]*)\"", text) if not link.startswith("#")] == []
    assert [link for link in re.findall(r"url\(([^)]*)\)", text) if not link.startswith("#")] == []
    assert text.count("<svg") > 2 and text.count("<h2>") == 6


def test_equal_runs_give_equal_drawings(three):
    experiments = find([str(three)])
    one, other = (plots.svg(plots.leakage_utility(experiments, ["A", "B", "C"])) for _ in range(2))
    assert one == other and one.startswith("<svg") and "Date" not in one


def test_names_are_text_not_markup(three):
    (experiment, *_) = find([str(three)])
    experiment.name = '<img src="x" onerror="alert(1)">'
    text = page(compare([experiment]), [])
    assert "<img" not in text and "&lt;img" in text


def test_runs_of_several_systems_unfinished_and_without_measures(three, tmp_path):
    mapper = make(tmp_path / "mapper", path=ROOT / "recipes" / "identity_mapper.yaml", done=False)
    (tmp_path / "begun").mkdir()
    make(tmp_path / "begun" / "run", steps=1, done=False)
    (tmp_path / "begun" / "run" / "metrics.jsonl").unlink()
    old = make(tmp_path / "old", "system.guidance=9")
    (old / "table.json").write_text(json.dumps({"rows": {"anonymized": {LEAK: {"value": 0.5}}}}))
    experiments = find([str(three), str(mapper), str(tmp_path / "begun"), str(old)])
    table = write(experiments, tmp_path / "out")
    text = (tmp_path / "out" / "comparison.html").read_text()
    assert [run["letter"] for run in table.runs] == list("ABCDEF")
    assert "unfinished, 100 of 100 steps" in text and "unfinished, 0 of 400 steps" in text
    assert "No result table: D, E" in text
    assert "Measures" in text, "a table that does not name its columns shows them all"
    assert "Measured in different ways" in text
    assert (tmp_path / "out" / "leakage_utility.png").exists()


def test_one_run_without_anything_has_a_page_without_pictures(tmp_path):
    folder = make(tmp_path / "run", steps=1, done=False)
    (folder / "metrics.jsonl").unlink()
    out = tmp_path / "out"
    out.mkdir()
    (out / "learning_curves.png").write_bytes(b"of an earlier comparison")
    write(find([str(folder)]), out)
    assert not list(out.glob("*.png"))
    assert "1 run compared" in (out / "comparison.html").read_text()


def test_twelve_runs_have_twelve_looks(tmp_path):
    for number in range(12):
        make(
            tmp_path / "id2face" / f"{number:02}", f"system.guidance={number}", table=report(0.02 + 0.01 * number, 4.0)
        )
    experiments = find([str(tmp_path / "id2face")])
    table = compare(experiments)
    labels = list(table.rows)[:12]
    assert labels[11] == "L guidance=11"
    looks = {(plots.colour(n), plots._dash(n), plots.MARKERS[n]) for n in range(12)}
    assert len(looks) == 12
    figure = plots.leakage_utility(experiments, labels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    axes = figure.axes[0]
    assert -1 < axes.get_xlim()[0] < 0 and axes.get_xlim()[1] >= 100 * 0.16
    points = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() in plots.MARKERS]
    assert len(points) == 12 and points[3] == (pytest.approx(5.0),)


def test_curves_of_very_different_length_share_a_logarithmic_axis(tmp_path):
    experiments = find([str(make(tmp_path / "a", steps=100)), str(make(tmp_path / "b", steps=3000))])
    figure = plots.learning_curves(experiments, ["A a", "B b"])
    by_title = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert list(by_title) == ["val/loss", "train/loss"]
    assert by_title["train/loss"].get_xscale() == "log"
    equal = plots.learning_curves(experiments[:1], ["A a"])
    assert {axes.get_xscale() for axes in equal.axes} == {"linear"}
