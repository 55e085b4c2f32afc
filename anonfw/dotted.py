"""Dotted paths to Python objects, and the nearest right word for a wrong one."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any

_USUAL = ("anonfw", "torch", "lightning", "diffusers")


def resolve(dotted: str) -> Any:
    """The object of a dotted path: `anonfw.systems.id2face.ID2Face`, `diffusers.UNet2DConditionModel.from_pretrained`.

    Raises:
        LookupError: there is no such thing; the message says which part is missing.
        ImportError: a module on the way exists and cannot be imported.
    """
    parts = dotted.split(".")
    if not all(part.isidentifier() for part in parts):
        raise LookupError("not a dotted path")
    found: Any = _import(parts[0])
    for depth, part in enumerate(parts[1:], start=2):
        if not hasattr(found, part) and hasattr(found, "__path__"):
            _import(".".join(parts[:depth]))
        if not hasattr(found, part):
            raise LookupError(f"{'.'.join(parts[: depth - 1])} has no {part!r}{suggest(part, _public(found))}")
        found = getattr(found, part)
    return found


def _import(name: str) -> Any:
    """The module `name`. Raises as `resolve` does."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise ImportError(f"{name} needs a module that is not installed: {error.name}") from error
        parent, _, last = name.rpartition(".")
        if not parent:
            raise LookupError(f"no module {name!r}{suggest(name, _USUAL)}") from None
        package = importlib.import_module(parent)
        names = {entry.name for entry in pkgutil.iter_modules(package.__path__)} | set(_public(package))
        raise LookupError(f"{parent} has no {last!r}{suggest(last, names)}") from None


def _public(thing: Any) -> list[str]:
    return [name for name in dir(thing) if not name.startswith("_")]


def suggest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no candidate is near."""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
