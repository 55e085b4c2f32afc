"""From files back to a system: checkpoints, exported weights and the bases that come with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anonfw import recipe as recipes
from anonfw.data.files import sha256_of
from anonfw.errors import AnonfwError
from anonfw.training import runs, storage

BASES = Path(__file__).parent.parent / "bases"


def build_system(recipe: Mapping[str, Any]) -> Any:
    """The recipe's system with freshly drawn parameters, which are a function of its seed alone."""
    seed = recipe.get("seed", 0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return recipes.build(recipe["system"], seed=seed)


def read_weights(source: str | Path) -> dict[str, Tensor]:
    """Trained state by name, floats as float32: of a checkpoint (averaged), a safetensors file or a base's name.

    A file of another project (`.bin`, `.pt`: mappings of tensors, possibly nested) gives its own names, joined by dots.

    Raises:
        AnonfwError: no such file or base, or one that holds no tensors.
    """
    from safetensors.torch import load_file

    path = Path(source)
    if not path.suffix:
        path = BASES / f"{source}.safetensors"
    if not path.exists():
        there = ", ".join(sorted(base.stem for base in BASES.glob("*.safetensors"))) or "none"
        raise AnonfwError(
            f"init: no weights at {path}; give a .safetensors or .ckpt file, or a base ({there}), or null"
        )
    if path.suffix == ".safetensors":
        return {name: value.float() if value.is_floating_point() else value for name, value in load_file(path).items()}
    checkpoint = storage.read(path)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or "callbacks" not in checkpoint:
        if not (tensors := _flat(checkpoint)):
            raise AnonfwError(f"{path} is no checkpoint of a run, and holds no tensors by name")
        return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    averages = [state["average"] for state in checkpoint["callbacks"].values() if "average" in state]
    return {**checkpoint["state_dict"], **(averages[0] if averages else {})}


def _flat(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors of nested mappings by their dotted names."""
    if isinstance(tree, Tensor):
        return {name: tree}
    if not isinstance(tree, Mapping):
        return {}
    flat = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{name}.{key}" if name else str(key))
    return flat


def load_weights(system: Any, source: str | Path) -> None:
    """Copies trained parameters, and the running statistics beside them, into a system.

    A system that others exchange files with offers `from_interchange`, which translates their names.

    Raises:
        AnonfwError: one of them is missing, left over or of another shape; nothing has been copied then.
    """
    weights = read_weights(source)
    if hasattr(system, "from_interchange"):
        weights = system.from_interchange(weights)
    parameters = system.trained_state()
    missing, extra = sorted(parameters.keys() - weights.keys()), sorted(weights.keys() - parameters.keys())
    shapes = [n for n in parameters.keys() & weights.keys() if parameters[n].shape != weights[n].shape]
    if missing or extra or shapes:
        first = (missing or extra or sorted(shapes))[0]
        raise AnonfwError(
            f"{source} does not fit this recipe's network: {len(missing)} parameters missing, {len(extra)} left over, "
            f"{len(shapes)} of another shape (first: {first}). Change the network back, or begin anew: init=null"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])


def start_from(system: Any, init: str | Mapping[str, Any]) -> None:
    """What a recipe's `init` says: all weights of a file or a base, or parts of those of another system.

    Args:
        init: a source of `read_weights`, or `{from: SOURCE, parts: {OURS: THEIRS}}`: what is called OURS.* here and
            THEIRS.* there, in the same shape, is copied; the rest stays as it was drawn.
    Raises:
        AnonfwError: as `load_weights`; for parts: another form than this, or a part of which nothing fits.
    """
    if isinstance(init, str):
        return load_weights(system, init)
    if init.keys() != {"from", "parts"} or not isinstance(init["parts"], Mapping):
        raise AnonfwError(f"init is a file, a base or {{from: SOURCE, parts: {{OURS: THEIRS}}}}, not {dict(init)}")
    weights, parameters = read_weights(init["from"]), system.trained_state()
    for ours, theirs in init["parts"].items():
        inside = [name for name in parameters if name.startswith(f"{ours}.")]
        pairs = [(name, theirs + name.removeprefix(ours)) for name in inside]
        fit = [(a, b) for a, b in pairs if b in weights and weights[b].shape == parameters[a].shape]
        if not fit:
            raise AnonfwError(f"init: nothing in {theirs} of {init['from']} has name and shape of something in {ours}")
        with torch.no_grad():
            for name, other in fit:
                parameters[name].copy_(weights[other])
        print(f"init   {ours}: {len(fit)} of {len(inside)} parameters from {init['from']}", flush=True)
    return None


def run_files(place: str | Path) -> tuple[Path, Path]:
    """(folder, file of weights) of a run folder or an export, or of a file of weights inside one.

    A finished run has `model.safetensors`; of another one it is the newest checkpoint.

    Raises:
        AnonfwError: no run there, or none that has weights.
    """
    place = Path(place)
    if place.is_dir() and not (place / storage.STRUCTURE).exists():  # a checkpoint of shards is a folder, too
        folder = place
    else:
        folder = next((parent for parent in place.parents if (parent / "recipe.yaml").exists()), place.parent)
    if not (folder / "recipe.yaml").exists():
        raise AnonfwError(f"{place} is no run folder: there is no recipe.yaml in it")
    if place != folder:
        return folder, place
    weights = folder / "model.safetensors"
    if not weights.exists():
        weights = runs.newest(folder)
        if weights is None:
            raise AnonfwError(f"{folder} has no weights yet: it was stopped before its first checkpoint")
    return folder, weights


def load_system(place: str | Path, overrides: Sequence[str] = ()) -> tuple[Any, Any]:
    """(system with averaged weights, its recipe) of a run folder, of a checkpoint inside one, or of an export.

    Raises:
        AnonfwError: no run there, or an export that was damaged. RecipeError: the overrides do not fit the recipe.
    """
    folder, weights = run_files(place)
    if (folder / "export.json").exists():
        expected = json.loads((folder / "export.json").read_text())["sha256"]
        if weights.name == "model.safetensors" and sha256_of(weights) != expected:
            raise AnonfwError(f"{weights} is not the file that was exported (sha256 differs): copy it again")
    recipe = recipes.read(folder / "recipe.yaml", list(overrides))
    system = build_system(recipe)
    load_weights(system, weights)
    return system.eval(), recipe
