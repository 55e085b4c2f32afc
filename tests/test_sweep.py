"""Sweeps: one run a combination, none twice, and mistakes told before the first."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anonfw import __main__ as cli
from anonfw import recipe as recipes
from anonfw import sweep
from anonfw.errors import AnonfwError
from anonfw.training import runs
from anonfw.training.fit import PLACE

RECIPE = str(Path(__file__).resolve().parent.parent / "recipes" / "id2face.yaml")


def test_every_combination_once_the_last_key_fastest():
    lines = sweep.combinations(RECIPE, ["system.guidance=1,2", "trainer.max_steps=100", "system.beta=1e-3,1e-4"])
    assert lines == [
        ["system.guidance=1", "trainer.max_steps=100", "system.beta=1e-3"],
        ["system.guidance=1", "trainer.max_steps=100", "system.beta=1e-4"],
        ["system.guidance=2", "trainer.max_steps=100", "system.beta=1e-3"],
        ["system.guidance=2", "trainer.max_steps=100", "system.beta=1e-4"],
    ]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=1,2", ["1", "2"]),
        ("a=[1,2],[3]", ["[1,2]", "[3]"]),
        ("a={x: 1, y: [2,3]},null", ["{x: 1, y: [2,3]}", "null"]),
        ("a='x,y',z", ["'x,y'", "z"]),
        ('a="it\'s, so",b', ['"it\'s, so"', "b"]),
        ("a=1,", ["1", ""]),
    ],
)
def test_commas_inside_brackets_and_quotes_belong_to_a_value(text, values):
    assert sweep._choices(text) == [f"a={value}" for value in values]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=4))
def test_lists_of_any_length_are_split_where_they_end(lists):
    text = "a.b=" + ",".join(map(json.dumps, lists))
    assert [json.loads(choice.partition("=")[2]) for choice in sweep._choices(text)] == lists


def test_the_runs_are_one_group_on_wandb(root):
    for line in sweep.combinations(RECIPE, ["system.guidance=1,2"], group="my-group"):
        node = recipes.read(RECIPE, line)["loggers"]["wandb"]
        assert node == {"_target_": "anonfw.training.loggers.wandb", "_partial_": True, "group": "my-group"}
    paper = str(root / "recipes" / "paper" / "id2face.yaml")
    (first, _) = sweep.combinations(paper, ["system.guidance=1,2"])
    node = recipes.read(paper, first)["loggers"]["wandb"]
    assert node["group"] == "id2face-guidance" and node["project"] == "anonfw"


def test_the_list_is_what_a_shell_and_an_array_job_read(capsys):
    words = ["sweep", RECIPE, "system.guidance=1,2", "notes='a, b'", "--group", "it's one"]
    assert cli.main([*words, "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    read = [shlex.split(line) for line in lines]
    assert [line[0] for line in read] == ["system.guidance=1", "system.guidance=2"]
    assert recipes.read(RECIPE, read[0])["notes"] == "a, b"
    assert recipes.read(RECIPE, read[1])["loggers"]["wandb"]["group"] == "it's one"
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\n' {lines[1]}"], capture_output=True, text=True, check=True)
    assert echoed.stdout.splitlines() == read[1]


def test_mistakes_are_told_before_the_first_run(capsys, monkeypatch):
    monkeypatch.setattr(sweep, "train", lambda *_: pytest.fail("a run was started"))
    assert cli.main(["sweep", RECIPE, "system.guidence=1,2", "trainer.max_steps=10,ten"]) == 2
    error = capsys.readouterr().err
    assert "did you mean 'guidance'" in error and "'ten'" in error and error.count("has no argument") == 1
    for words, expected in (
        (["system.guidance=1"], "nothing to sweep"),
        (["system.guidance=1,2", "system.guidance=3"], "written twice"),
        (["guidance"], "is no override"),
        (["system.guidance=1,"], "no value"),
    ):
        assert cli.main(["sweep", RECIPE, *words]) == 2
        assert expected in capsys.readouterr().err


def test_a_killed_sweep_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """`fit` is replaced by what it leaves behind; the second of three fails the first time."""
    monkeypatch.chdir(tmp_path)
    started: list[str] = []
    broken = True

    def fit(recipe: str, overrides: list[str]) -> int:
        started.extend(overrides)
        if broken and overrides == ["system.guidance=2"]:
            return 1
        text = recipes.dump({k: v for k, v in recipes.load(recipe, overrides).items() if k not in PLACE})
        runs.finish(runs.create("id2face", text), 1.0, 400, 1)
        return 0

    monkeypatch.setattr(sweep, "train", fit)
    assert cli.main(["sweep", RECIPE, "system.guidance=1,2,3"]) == 1
    shown = capsys.readouterr()
    assert started == ["system.guidance=1", "system.guidance=2", "system.guidance=3"]
    assert "failed:\nrun 2 (exit code 1): system.guidance=2" in shown.err
    broken = False
    assert cli.main(["sweep", RECIPE, "system.guidance=1,2,3,4"]) == 0
    assert started[3:] == ["system.guidance=2", "system.guidance=4"]
    shown = capsys.readouterr().out
    assert shown.count("finished already: runs/id2face/") == 2
    compare = next(line for line in shown.splitlines() if line.startswith("compare them: "))
    assert len(compare.split()) == 6 + 4 and compare.count("runs/id2face/") == 4


def test_an_interrupt_ends_the_sweep(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = iter([130])
    monkeypatch.setattr(sweep, "train", lambda *_: next(codes))
    assert cli.main(["sweep", RECIPE, "system.guidance=1,2"]) == 130


def test_a_value_may_not_be_missing():
    with pytest.raises(AnonfwError, match="no override"):
        sweep.combinations(RECIPE, ["=1,2"])
