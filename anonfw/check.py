"""Every mistake of a recipe in one go, read off the signatures of what it names. Nothing is built.

Also the verb `check`. Files, sections and overrides are judged before the first target is imported, so a recipe
without a single usable node is refused without loading torch.
"""

from __future__ import annotations

import argparse
import difflib
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Union

from anonfw import recipe as recipes
from anonfw.dialect import join
from anonfw.dotted import resolve, suggest
from anonfw.recipe import PARTIAL, SECTIONS, TARGET, Mistake, Recipe

_SIMPLE = {int: "an int", float: "a number", str: "text", bool: "true or false", list: "a list", dict: "a mapping"}
_CONTAINERS = {list: list, tuple: list, set: list, frozenset: list, dict: dict}


def find_mistakes(recipe: Recipe) -> list[Mistake]:
    """The mistakes that `load` met, then those of each section in the order of the file."""
    found = list(recipe.mistakes)

    def note(key: str, text: str) -> None:
        found.append(Mistake(recipe.where(key), key, text))

    for name, value in recipe.items():
        section = SECTIONS.get(name)
        if section is None:
            note(name, f"unknown section{suggest(name, SECTIONS) or '; there are ' + ', '.join(SECTIONS)}")
        elif section.kind == "value":
            if complaint := mismatch(value, section.annotation):
                note(name, complaint)
        elif value is None:
            continue
        elif section.kind == "node":
            _need_node(name, value, note)
        elif not isinstance(value, dict):
            note(name, f"expected names with a node each, got {value!r}")
        else:
            for key, node in value.items():
                if section.names and key not in section.names:
                    hint = suggest(key, section.names) or "; there are " + ", ".join(section.names)
                    note(join(name, key), f"unknown{hint}")
                elif node is not None:
                    _need_node(join(name, key), node, note)
    for name, value in recipe.items():
        if name in SECTIONS and SECTIONS[name].kind != "value":
            for key, text in _inside(value, name):
                note(key, text)
    order = {name: number for number, name in enumerate(recipe)}
    loaded = len(recipe.mistakes)
    found[loaded:] = sorted(found[loaded:], key=lambda mistake: order.get(mistake.key.split(".")[0], -1))
    return found


def _need_node(key: str, value: Any, note: typing.Callable[[str, str], None]) -> None:
    if not (isinstance(value, dict) and TARGET in value):
        note(key, f"expected a node (a mapping with {TARGET}), got {_shown(value)}")


def _inside(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """(key, text) of each mistake in a value, nodes and what is inside them."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _inside(item, join(key, index))
    if not isinstance(value, dict):
        return
    if TARGET in value:
        yield from _node(value, key)
    elif stray := sorted(name for name in value if name.startswith("_")):
        yield join(key, stray[0]), f"a key with an underscore and no {TARGET} beside it{suggest_target(stray[0])}"
    for name, item in value.items():
        yield from _inside(item, join(key, name))


def suggest_target(word: str) -> str:
    """Like `suggest`, for the two keys that start with an underscore."""
    near = difflib.get_close_matches(word, [TARGET, PARTIAL], n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _node(node: dict, key: str) -> Iterator[tuple[str, str]]:
    partial = node.get(PARTIAL, False)
    if not isinstance(partial, bool):
        yield join(key, PARTIAL), f"expected true or false, got {partial!r}"
    dotted = node[TARGET]
    if not isinstance(dotted, str):
        yield join(key, TARGET), f"expected a dotted path, got {dotted!r}"
        return
    try:
        target = resolve(dotted)
    except (LookupError, ImportError, SyntaxError) as error:
        yield join(key, TARGET), f"{dotted}: {error.args[0]}"
        return
    if not callable(target):
        yield join(key, TARGET), f"{dotted} is {_shown(target)}: it cannot be called"
        return
    try:
        parameters = inspect.signature(target).parameters
    except ValueError:  # some compiled functions tell no signature
        return
    hints = _hints(target)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    for name, value in node.items():
        if name in (TARGET, PARTIAL):
            continue
        if name in named:
            if complaint := mismatch(value, hints.get(name, Any)):
                yield join(key, name), complaint
        elif not open_ended:
            hint = suggest_target(name) if name.startswith("_") else suggest(name, named)
            yield join(key, name), f"{dotted} has no argument {name!r}{hint or _list(named)}"
    if partial is True:
        return
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in node:
            yield key, f"{dotted} needs the argument {name!r}"


def mismatch(value: Any, annotation: Any) -> str:
    """Why a value of a recipe cannot be an argument annotated so; empty where it can, or where nobody can tell."""
    return "" if _fits(value, annotation) else f"expected {_named(annotation)}, got {_shown(value)}"


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is None or annotation is type(None):
        return value is None
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in inner)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner)
    if origin is typing.Annotated:
        return _fits(value, inner[0])
    if isinstance(value, Mapping) and TARGET in value:
        return _node_fits(value, annotation, origin)
    if origin is not None:
        return _container_fits(value, origin, inner)
    if annotation in (Any, object) or not isinstance(annotation, type) or getattr(annotation, "_is_protocol", False):
        return True  # type variables and protocols as well: not ours to judge (Any is a class since Python 3.11)
    if annotation is bool or isinstance(value, bool):
        return isinstance(value, bool) and annotation is bool
    if annotation is float:
        return isinstance(value, int | float)
    if annotation in (tuple, set, frozenset):
        return isinstance(value, list)
    if isinstance(value, str) and hasattr(annotation, "__fspath__"):
        return True
    return isinstance(value, annotation)


def _container_fits(value: Any, origin: Any, inner: tuple) -> bool:
    if not isinstance(origin, type):
        return True
    if issubclass(dict, origin) and not issubclass(list, origin):
        if not isinstance(value, dict):
            return False
        return all(_fits(item, inner[1]) for item in value.values()) if len(inner) == 2 else True
    if origin in _CONTAINERS or issubclass(list, origin):
        if not isinstance(value, list):
            return isinstance(value, dict) and issubclass(dict, origin)
        if origin is tuple and not (len(inner) == 2 and inner[1] is Ellipsis):
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return all(_fits(item, inner[0]) for item in value) if inner else True
    # type[X], Callable[...]: only a node can make one, and nodes were judged before.
    return False


def _node_fits(node: Mapping, annotation: Any, origin: Any) -> bool:
    """Whether what a node builds can be such an argument: a class is one if it inherits, a function nobody can tell."""
    wanted = origin or annotation
    if node.get(PARTIAL) is True:
        return wanted not in _SIMPLE
    if not isinstance(wanted, type) or getattr(wanted, "_is_protocol", False) or not isinstance(node[TARGET], str):
        return True
    try:
        made = resolve(node[TARGET])
    except (LookupError, ImportError, SyntaxError):
        return True  # said once, at its own key
    return not isinstance(made, type) or issubclass(made, wanted)


def _hints(target: Any) -> dict[str, Any]:
    """Resolved annotations of what is called; empty where they name something that cannot be found."""
    function = target.__init__ if isinstance(target, type) else target
    try:
        return typing.get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError, AttributeError):
        return {}


def _named(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "null"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_named(choice) for choice in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in _CONTAINERS and inner:
        return str(annotation).replace("typing.", "")
    return _SIMPLE.get(annotation) or getattr(annotation, "__name__", str(annotation).replace("typing.", ""))


def _shown(value: Any) -> str:
    if isinstance(value, Mapping) and TARGET in value:
        return f"a {value[TARGET]}"
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _list(named: Mapping[str, Any]) -> str:
    names = list(named)
    return f"; it takes {', '.join(names)}" if 0 < len(names) <= 12 else ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    recipes.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print the resolved recipe (0) or every mistake (1)."""
    recipe = recipes.load(args.recipe, args.overrides)
    mistakes = recipes.check(recipe)
    if mistakes:
        for mistake in mistakes:
            print(mistake, file=sys.stderr)
        print(f"{len(mistakes)} mistake{'s' if len(mistakes) != 1 else ''}", file=sys.stderr)
        return 1
    print(recipe.yaml(), end="")
    return 0
