"""Recipes: YAML -> `load` -> `check` -> `build`. A recipe is a tree of plain values and of nodes.

A node is a mapping with `_target_`, the dotted path of what to call, and flat keyword arguments beside it. With
`_partial_: true` it builds a `functools.partial`: whoever calls it later supplies the rest. Nodes nest. There is no
registry: the dotted path is the string to grep for, and no class ever sees a recipe.

A recipe may name one parent (`extends: ../id2face.yaml`, relative to its own file). Mappings merge, lists and scalars
replace, `null` stays null; a child node that names another `_target_` replaces the parent's node. Last come
`key=value` overrides: a dotted key (`losses.0.weight=2` for lists) and a value in YAML.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from anonfw.dialect import DialectError, dump, join, parse
from anonfw.dotted import resolve, suggest
from anonfw.errors import RecipeError

TARGET, PARTIAL = "_target_", "_partial_"


class Section(NamedTuple):
    """What may stand at the top of a recipe. kind: a `node`, named `nodes`, or a `value` of type `annotation`."""

    kind: Literal["node", "nodes", "value"]
    help: str
    annotation: Any = None
    names: tuple[str, ...] = ()


SECTIONS = {
    "name": Section("value", "name of the run folder; the file's name without it", str | None),
    "notes": Section("value", "free text", str | None),
    "seed": Section("value", "seed of every random draw", int),
    "init": Section("value", "weights to start from: file, base or parts of one; null is none", str | dict | None),
    "run": Section("value", "run folder to continue", str | None),
    "resume": Section("value", "auto demands an unfinished run of this recipe", Literal["auto"] | None),
    "system": Section("node", "what is trained"),
    "dataset": Section("value", "data set of every loader that names none: a folder, an address, embedded", str | None),
    "data": Section("nodes", "partial loaders", names=("train", "validate", "test")),
    "trainer": Section("node", "lightning.Trainer"),
    "callbacks": Section("nodes", "name -> callback; null removes one of the parent recipe"),
    "loggers": Section("nodes", "name -> logger; null removes one of the parent recipe"),
    "evaluate": Section("node", "the measurement that ends a run and that `validate` repeats"),
}


@dataclass(frozen=True)
class Mistake:
    """One mistake: the file and line (or `command line`), the dotted key, and what is wrong with it."""

    where: str
    key: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.text}" if self.key else f"{self.where}: {self.text}"


class Recipe(dict):
    """A loaded recipe: a plain nested dict that remembers where each key was written.

    Attributes:
        path: the file that was loaded.
        origins: dotted key -> `file:line` or `command line`.
        mistakes: what `load` found wrong; `check` adds the rest.
    """

    def __init__(self, path: Path, tree: Mapping, origins: dict[str, str], mistakes: list[Mistake]) -> None:
        super().__init__(tree)
        self.path, self.origins, self.mistakes = path, origins, mistakes

    @property
    def name(self) -> str:
        """The recipe's `name`, else its file's name."""
        return self.get("name") or self.path.stem

    def where(self, key: str) -> str:
        """Where `key`, or its nearest written ancestor, comes from."""
        while key not in self.origins and key:
            key = key.rpartition(".")[0]
        return self.origins.get(key, str(self.path))

    def yaml(self) -> str:
        """The resolved recipe as text; loading it gives an equal recipe."""
        return dump(dict(self))


def find(path: str | Path) -> Path:
    """`path` as it stands, else the file of that name among the recipes that came with the package.

    Returns:
        A path that may not exist: then it is `path` itself.
    """
    path = Path(path)
    package = Path(__file__).parent
    inside = Path(*path.parts[1:]) if path.parts[:1] == ("recipes",) else path
    places = [path, package / "recipes" / inside, package.parent / "recipes" / inside]
    return next((place for place in places if place.is_file()), path)


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe, merge it onto its parent and apply the `key=value` overrides in order.

    Never raises for a bad recipe: `recipe.mistakes` holds what is wrong, and `check` reports it with everything else.
    """
    path = find(path)
    mistakes: list[Mistake] = []
    tree, origins = _read(path, mistakes)
    parent_name = tree.pop("extends", None)
    if isinstance(parent_name, str):
        parent, parent_origins = _read(path.parent / parent_name, mistakes, asked_by=origins["extends"])
        if "extends" in parent:
            text = "a recipe extends one level; let it extend the grandparent, or copy what it needs"
            mistakes.append(Mistake(parent_origins["extends"], "extends", text))
            del parent["extends"]
        tree = _merge(parent, tree)
        origins = parent_origins | origins
    elif parent_name is not None:
        mistakes.append(Mistake(origins["extends"], "extends", f"expected a file name, got {parent_name!r}"))
    recipe = Recipe(path, tree, origins, mistakes)
    # A new `_target_` replaces its node, so it has to come before the arguments meant for it, however they are typed.
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(TARGET)):
        _override(recipe, override)
    return recipe


def check(recipe: Recipe) -> list[Mistake]:
    """Every mistake in the recipe, in the order of its keys; an empty list for a good one. Builds nothing."""
    from anonfw.check import find_mistakes

    return find_mistakes(recipe)


def read(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """`load`, then `check`.

    Raises:
        RecipeError: with every mistake.
    """
    recipe = load(path, overrides)
    if mistakes := check(recipe):
        raise RecipeError(mistakes)
    return recipe


def build(node: Any, **given: Any) -> Any:
    """What a piece of a recipe describes. Nodes are built depth first, inside mappings and lists too.

    Args:
        node: a node, or anything else, which is returned with the nodes inside it built.
        given: keyword arguments of the top node that the program supplies; the recipe must not set them too.
    Raises:
        RecipeError: `given` names an argument that the node sets, or the target cannot be found.
    """
    if given and not (isinstance(node, Mapping) and TARGET in node):
        raise TypeError(f"arguments {sorted(given)} for something that is not a node: {node!r}")
    return _build(node, "", given)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The positional arguments of every verb that takes a recipe: `args.recipe` and `args.overrides`."""
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file; recipes/ of the package is searched too")
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="a dotted key and a YAML value, such as trainer.max_steps=100"
    )


def _read(path: Path, mistakes: list[Mistake], asked_by: str = "") -> tuple[dict, dict[str, str]]:
    where = asked_by or str(path)
    try:
        tree, lines = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        others = [entry.name for entry in sorted(path.parent.glob("*.yaml"))]
        text = f"cannot read {path}: {error.strerror}{suggest(path.name, others)}"
        mistakes.append(Mistake(where, "extends" if asked_by else "", text))
        return {}, {}
    except UnicodeDecodeError:
        mistakes.append(Mistake(where, "", f"{path} is not UTF-8 text"))
        return {}, {}
    except DialectError as error:
        mistakes.append(Mistake(f"{path}:{error.line}", "", str(error)))
        return {}, {}
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    if not isinstance(tree, dict):
        mistakes.append(Mistake(f"{path}:1", "", f"a recipe is a mapping of sections, got {tree!r}"))
        return {}, {}
    return tree, origins


def _merge(parent: Any, child: Any) -> Any:
    if not (isinstance(parent, dict) and isinstance(child, dict)):
        return child
    if TARGET in child and child[TARGET] != parent.get(TARGET):
        return child
    return parent | {key: _merge(parent[key], value) if key in parent else value for key, value in child.items()}


def _override(recipe: Recipe, text: str) -> None:
    key, equals, written = text.partition("=")
    origin = "command line"

    def wrong(why: str) -> None:
        recipe.mistakes.append(Mistake(origin, text, why))

    if not equals or not re.fullmatch(r"[^\s.=]+(\.[^\s.=]+)*", key):
        return wrong("an override is a dotted key, '=' and a YAML value, without spaces around '='")
    if not written.strip():
        return wrong(f"no value; write {key}=null for none")
    try:
        value, _ = parse(written)
    except DialectError as error:
        return wrong(str(error))
    *above, last = key.split(".")
    place: Any = recipe
    for depth, part in enumerate(above):
        step = _step(place, part)
        if step is None:
            return wrong(_no_way(place, part, ".".join(above[:depth])))
        value_there = place.get(step) if isinstance(place, dict) else place[step]
        if value_there is None:
            value_there = {}
        # An anchor may share the value with another key: only a copy is changed.
        place[step] = value_there.copy() if isinstance(value_there, dict | list) else value_there
        place = place[step]
    step = _step(place, last)
    if step is None:
        return wrong(_no_way(place, last, ".".join(above)))
    if last == TARGET and isinstance(place, dict) and place.get(TARGET) not in (None, value):
        place.clear()
    place[step] = _merge(place[step] if isinstance(place, list) else place.get(step), value)
    for old in [k for k in recipe.origins if k == key or k.startswith(key + ".")]:
        if not isinstance(value, dict):
            del recipe.origins[old]
    recipe.origins[key] = origin
    return None


def _step(place: Any, part: str) -> str | int | None:
    """The key or index that `part` means in `place`; None where it means nothing."""
    if isinstance(place, dict):
        return part
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return int(part)
    return None


def _no_way(place: Any, part: str, key: str) -> str:
    if isinstance(place, list):
        return f"{key} is a list of {len(place)}: {part!r} is not an index into it"
    return f"{key} is the value {place!r}: nothing can be set inside it"


def _build(node: Any, key: str, given: dict[str, Any]) -> Any:
    if isinstance(node, list | tuple):
        return [_build(value, join(key, index), {}) for index, value in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    written = {name: value for name, value in node.items() if name not in (TARGET, PARTIAL)}
    arguments = {name: _build(value, join(key, name), {}) for name, value in written.items()}
    if TARGET not in node:
        return arguments
    if twice := sorted(arguments.keys() & given.keys()):
        text = f"the program supplies {', '.join(twice)}: take it out of the recipe"
        raise RecipeError([Mistake(node[TARGET], key, text)])
    try:
        target = resolve(node[TARGET])
    except (LookupError, ImportError) as error:
        raise RecipeError([Mistake(node[TARGET], key, str(error))]) from error
    if node.get(PARTIAL):
        return functools.partial(target, **arguments, **given)
    try:
        return target(**arguments, **given)
    except Exception as error:
        error.add_note(f"  while building {key or 'the node'}: {node[TARGET]}")
        raise
