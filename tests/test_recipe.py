"""Recipes: reading, merging, overriding, refusing and building them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anonfw import dialect, recipe
from anonfw.errors import RecipeError

HERE = __name__


class Part:
    """A target with every kind of argument that `check` judges."""

    def __init__(
        self,
        size: int,
        rate: float = 0.1,
        mode: Literal["masked", "plain"] = "masked",
        label: str | None = None,
        sizes: list[int] | None = None,
        window: tuple[int, int] = (1, 1),
        weights: dict[str, float] | None = None,
        flag: bool = False,
        inner: Part | None = None,
        folder: Path | None = None,
    ) -> None:
        self.size, self.rate, self.mode, self.label, self.flag, self.inner = size, rate, mode, label, flag, inner
        self.sizes, self.window, self.weights, self.folder = sizes, window, weights, folder


class Other:
    def __init__(self, width: int = 1, **extra: object) -> None:
        self.width, self.extra = width, extra


def fails() -> None:
    raise RuntimeError("cannot")


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "child.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def texts(path: Path, *overrides: str) -> list[str]:
    return [str(mistake) for mistake in recipe.check(recipe.load(path, overrides))]


# What is read.


def test_scalars_mean_what_they_look_like(write):
    text = "notes: off\nseed: 1_000\ndata: null\ncallbacks:\nname: '12'\n"
    loaded = recipe.load(write(text + "trainer: [1e-4, .5, true, 1:30, 2024-01-01, 012, 0x10]"))
    assert loaded == {
        "notes": "off",
        "seed": 1000,
        "data": None,
        "callbacks": None,
        "name": "12",
        "trainer": [1e-4, 0.5, True, "1:30", "2024-01-01", 12, 16],
    }


def test_child_merges_mappings_and_replaces_lists_values_and_retargeted_nodes(write):
    write(
        """
seed: 1
system:
  _target_: a.B
  keep: 1
  losses: [1, 2, 3]
  codec: {_target_: a.Pixels, scale: 2}
  net: {_target_: a.Net, width: 8, depth: 2}
callbacks: {ema: {_target_: a.Ema}, grid: {_target_: a.Grid}}
""",
        "parent.yaml",
    )
    child = write(
        """
extends: parent.yaml
system:
  losses: [9]
  codec: {_target_: a.Latent}
  net: {width: 16}
callbacks: {grid: null}
"""
    )
    assert recipe.load(child) == {
        "seed": 1,
        "system": {
            "_target_": "a.B",
            "keep": 1,
            "losses": [9],
            "codec": {"_target_": "a.Latent"},
            "net": {"_target_": "a.Net", "width": 16, "depth": 2},
        },
        "callbacks": {"ema": {"_target_": "a.Ema"}, "grid": None},
    }


def test_origin_names_the_file_that_wrote_a_key(write):
    parent = write("seed: 1\nsystem:\n  _target_: a.B\n  rate: 2\n", "parent.yaml")
    child = write("extends: parent.yaml\nsystem:\n  size: 3\n")
    loaded = recipe.load(child, ["system.rate=5"])
    assert loaded.where("seed") == f"{parent}:1"
    assert loaded.where("system.size") == f"{child}:3"
    assert loaded.where("system.rate") == "command line"
    assert loaded.where("system.missing.deeper") == f"{child}:2"


def test_two_levels_of_extends_are_refused(write):
    write("seed: 1", "grand.yaml")
    write("extends: grand.yaml", "parent.yaml")
    (mistake,) = texts(write("extends: parent.yaml"))
    assert "one level" in mistake and "parent.yaml:1" in mistake


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 1\nseed: 2", "child.yaml:2: seed: written twice"),
        ("seed: 1\nsystem: [", "child.yaml:2: not YAML"),
        ("- 1", "child.yaml:1: a recipe is a mapping"),
        ("", "child.yaml:1: a recipe is a mapping"),
        ("seed: !!python/name:os.system x", "not YAML"),
        ("system: &a {_target_: x, me: *a}", "contains itself"),
        ("callbacks: {1: 2}", "a key must be text"),
        ("extends: gone.yaml", "extends: cannot read"),
        ("extends: 3", "expected a file name"),
        ("\x00", "not YAML"),
    ],
)
def test_unreadable_files_are_one_mistake_each(write, text, expected):
    (mistake,) = texts(write(text))
    assert expected in mistake


def test_missing_file_suggests_its_neighbour(write):
    write("seed: 1", "id2face.yaml")
    (mistake,) = texts(write("seed: 1").parent / "id2fase.yaml")
    assert "did you mean 'id2face.yaml'" in mistake


# Overrides.

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1), inner, max_size=3)
)


@given(values)
def test_dump_then_parse_is_the_same_value(value):
    assert dialect.parse(dialect.dump(value))[0] == value


@given(values, st.lists(st.from_regex(r"[a-z]{1,5}", fullmatch=True), min_size=1, max_size=4))
def test_override_sets_exactly_what_was_typed(tmp_path_factory, value, parts):
    path = tmp_path_factory.getbasetemp() / "override.yaml"
    path.write_text("seed: 1\n")
    key = ".".join(["system", *parts])
    loaded = recipe.load(path, [f"{key}={dialect.dump(value)}"])
    assert loaded.mistakes == []
    assert functools.reduce(lambda place, part: place[part], key.split("."), loaded) == value
    assert loaded["seed"] == 1
    path.write_text(loaded.yaml())
    assert recipe.load(path) == loaded


@given(st.text(max_size=40))
def test_no_override_text_raises(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text("seed: 1\nsystem: {losses: [1]}\n")
    recipe.load(path, [text])


@given(st.text(max_size=60))
def test_no_file_text_raises(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "text.yaml"
    path.write_text(text, encoding="utf-8")
    recipe.check(recipe.load(path))


def test_override_reaches_into_lists_and_removes_with_null(write):
    path = write("system: {losses: [{weight: 1}, {weight: 2}]}\ncallbacks: {grid: {_target_: a.B}}")
    loaded = recipe.load(path, ["system.losses.1.weight=5", "callbacks.grid=null"])
    assert loaded == {"system": {"losses": [{"weight": 1}, {"weight": 5}]}, "callbacks": {"grid": None}}


def test_override_of_a_target_replaces_the_node_and_keeps_its_new_arguments(write):
    path = write("system: {_target_: a.B, old: 1}")
    loaded = recipe.load(path, ["system.new=2", "system._target_=a.C"])
    assert loaded["system"] == {"_target_": "a.C", "new": 2}


def test_override_leaves_an_anchored_twin_alone(write):
    path = write("data: {train: &t {_target_: a.B, size: 1, inner: [{x: 1}]}, validate: *t}")
    loaded = recipe.load(path, ["data.train.size=2", "data.train.inner.0.x=2"])
    assert loaded["data"]["train"] == {"_target_": "a.B", "size": 2, "inner": [{"x": 2}]}
    assert loaded["data"]["validate"] == {"_target_": "a.B", "size": 1, "inner": [{"x": 1}]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", "an override is a dotted key"),
        ("=3", "an override is a dotted key"),
        ("a..b=3", "an override is a dotted key"),
        ("seed=", "write seed=null"),
        ("seed=[1", "not YAML"),
        ("seed.x=1", "seed is the value 1"),
        ("system.losses.7=1", "list of 1: '7' is not an index"),
        ("sede=3", "did you mean 'seed'"),
        ("seed=three", "expected an int, got 'three'"),
    ],
)
def test_bad_overrides_name_the_command_line(write, override, expected):
    path = write(f"seed: 1\nsystem: {{_target_: {HERE}.Other, losses: [1]}}")
    (mistake,) = texts(path, override)
    assert mistake.startswith("command line: ") and expected in mistake


# What is refused.


def test_three_planted_mistakes_are_told_at_once_with_suggestions(write):
    path = write(
        f"""
seed: 1
system:
  _target_: {HERE}.Part
  siez: 3
  size: 2
  inner: {{_target_: {HERE}.Prt}}
trainr: {{_target_: lightning.Trainer}}
"""
    )
    assert texts(path) == [
        f"{path}:5: system.siez: {HERE}.Part has no argument 'siez'; did you mean 'size'?",
        f"{path}:7: system.inner._target_: {HERE}.Prt: {HERE} has no 'Prt'; did you mean 'Part'?",
        f"{path}:8: trainr: unknown section; did you mean 'trainer'?",
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("size: 2.5", "expected an int, got 2.5"),
        ("size: true", "expected an int, got true"),
        ("size: '2'", "expected an int, got '2'"),
        ("size: 2, rate: fast", "expected a number, got 'fast'"),
        ("size: 2, rate: null", "expected a number, got null"),
        ("size: 2, mode: maskd", "expected one of 'masked', 'plain', got 'maskd'"),
        ("size: 2, label: 3", "expected text or null, got 3"),
        ("size: 2, sizes: [1, x]", "expected list[int] or null, got [1, 'x']"),
        ("size: 2, sizes: 1", "expected list[int] or null, got 1"),
        ("size: 2, window: [1, 2, 3]", "expected tuple[int, int], got [1, 2, 3]"),
        ("size: 2, weights: {a: b}", "expected dict[str, float] or null"),
        ("size: 2, flag: off", "expected true or false, got 'off'"),
        ("size: 2, flag: 1", "expected true or false, got 1"),
        ("size: 2, inner: big", "expected Part or null, got 'big'"),
        (f"size: 2, inner: {{_target_: {HERE}.Other}}", f"expected Part or null, got a {HERE}.Other"),
        (f"size: {{_target_: {HERE}.Other}}", "expected an int, got a"),
        ("rate: 1", "needs the argument 'size'"),
        ("size: 2, _partail_: true", "did you mean '_partial_'"),
        ("size: 2, _partial_: 1", "expected true or false, got 1"),
        ("size: 2, inner: {_traget_: x}", "did you mean '_target_'"),
    ],
)
def test_wrong_arguments(write, arguments, expected):
    found = texts(write(f"system: {{_target_: {HERE}.Part, {arguments}}}"))
    assert any(expected in mistake for mistake in found), found


@pytest.mark.parametrize(
    "arguments",
    [
        "size: 2, rate: 1",
        "size: 2, label: null, sizes: [], window: [3, 4], weights: {a: 1}, flag: true, folder: some/where",
        f"size: 2, inner: {{_target_: {HERE}.Part, size: 3}}",
        "_partial_: true",
        "_partial_: true, rate: 1.5",
    ],
)
def test_right_arguments(write, arguments):
    assert texts(write(f"system: {{_target_: {HERE}.Part, {arguments}}}")) == []


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("anonfw.recipes.load", "did you mean 'recipe'"),
        ("anonfw.recipe.lod", "did you mean 'load'"),
        ("anonfv.recipe", "did you mean 'anonfw'"),
        ("anonfw.recipe.SECTIONS", "cannot be called"),
        ("not a path", "not a dotted path"),
        ("[1]", "expected a dotted path"),
        ("torch.nn.Linea", "did you mean 'Linear'"),
    ],
)
def test_unresolvable_targets(write, target, expected):
    (mistake,) = texts(write(f"system: {{_target_: {target}}}"))
    assert "system._target_" in mistake and expected in mistake


def test_a_module_that_lacks_its_dependency_says_which(write, tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import surely_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    (mistake,) = texts(write("system: {_target_: needs_more.Thing}"))
    assert "not installed: surely_not_installed" in mistake


def test_sections_are_judged_by_their_kind(write):
    found = texts(write("system: 3\ndata: {trian: 1, train: 2}\ncallbacks: [1]\nseed: null\nrun: 5"))
    for expected in (
        "system: expected a node",
        "data.trian: unknown; did you mean 'train'",
        "data.train: expected a node",
    ):
        assert any(expected in mistake for mistake in found), expected
    for expected in (
        "callbacks: expected names",
        "seed: expected an int, got null",
        "run: expected text or null, got 5",
    ):
        assert any(expected in mistake for mistake in found), expected
    assert len(found) == 6


def test_signature_of_the_trainer_is_known(write):
    (mistake,) = texts(write("trainer: {_target_: lightning.Trainer, max_step: 3}"))
    assert "did you mean 'max_steps'" in mistake


# What is built.


def test_build_nests_and_hands_over_plain_values(write):
    path = write(
        f"""
system:
  _target_: {HERE}.Other
  width: 3
  parts: [{{_target_: {HERE}.Part, size: 1}}, 5]
  named: {{a: {{_target_: {HERE}.Part, size: 2}}, b: null}}
  later: {{_target_: {HERE}.Part, _partial_: true, rate: 2}}
"""
    )
    built = recipe.build(recipe.read(path)["system"], supplied="by the caller")
    assert isinstance(built, Other) and built.width == 3
    assert built.extra["parts"][0].size == 1 and built.extra["parts"][1] == 5
    assert built.extra["named"]["a"].size == 2 and built.extra["named"]["b"] is None
    assert built.extra["supplied"] == "by the caller"
    later = built.extra["later"](size=7)
    assert (later.size, later.rate) == (7, 2)


def test_build_refuses_what_the_program_supplies():
    with pytest.raises(RecipeError, match="take it out of the recipe"):
        recipe.build({"_target_": f"{HERE}.Part", "size": 1}, size=2)


def test_build_says_where_a_constructor_failed():
    with pytest.raises(RuntimeError, match="cannot") as caught:
        recipe.build({"_target_": f"{HERE}.Other", "inner": [{"_target_": f"{HERE}.fails"}]})
    assert any("inner.0" in note for note in caught.value.__notes__)


def test_read_raises_every_mistake(write):
    with pytest.raises(RecipeError) as caught:
        recipe.read(write("sede: 1\ntrainr: 2"))
    assert len(caught.value.mistakes) == 2
    assert "2 mistakes" in str(caught.value)
