"""Where recipes differ: the keys that have not the same value in all of them, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from anonfw.compare.experiment import class_of
from anonfw.dialect import join

# What says where a run lies, how it is logged or what somebody thought of it: not what was trained.
NO_DIFFERENCE = ("run", "resume", "notes", "loggers")
ABSENT = "–"


def differences(recipes: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dotted key -> its value in each recipe as short text, ABSENT where there is none, in the order of the recipes.

    Where recipes have different `_target_`s in a place, that is the difference: arguments are compared only among those
    with the same target.
    """
    found: dict[str, list[str]] = {}
    trees = {number: _without(recipe) for number, recipe in enumerate(recipes)}
    _walk("", trees, len(recipes), found)
    return found


def _without(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key not in NO_DIFFERENCE}


def _walk(key: str, values: dict[int, Any], count: int, found: dict[str, list[str]]) -> None:
    """`values` by number of the recipe; recipes that are not in it have been told apart further up."""
    if _all_equal(values.values()):
        return
    nodes = {number: value for number, value in values.items() if isinstance(value, Mapping)}
    if len(nodes) < len(values) or not _all_equal(class_of(node) for node in nodes.values()):
        found[key] = [_short(values[number]) if number in values else "" for number in range(count)]
    for target in dict.fromkeys(class_of(node) for node in nodes.values()):
        alike = {number: node for number, node in nodes.items() if class_of(node) == target}
        for name in dict.fromkeys(name for node in alike.values() for name in node):
            below = {number: node.get(name, ABSENT) for number, node in alike.items()}
            _walk(join(key, name), below, count, found)


def _all_equal(values: Any) -> bool:
    first, *rest = [json.dumps(value, sort_keys=True, default=str) for value in values] or [None]
    return all(value == first for value in rest)


def _short(value: Any) -> str:
    """`null`, `0.3`, `AdamW`, `[1, 2]`, `{yaw, pitch}`."""
    if isinstance(value, str):
        return value
    if (name := class_of(value)) is not None:
        return name
    if isinstance(value, Mapping):
        return "{" + ", ".join(map(str, value)) + "}"
    return json.dumps(value, default=str)
