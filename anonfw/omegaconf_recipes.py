"""Recipes from and for OmegaConf: for labs that compose their configurations with it, or with Hydra.

Recipe files are read without it (`anonfw.dialect`): a mistake has to name its file and line, which OmegaConf does not
keep. No class of this project ever sees a configuration object.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from anonfw.dialect import join
from anonfw.errors import RecipeError
from anonfw.recipe import Mistake, Recipe

if TYPE_CHECKING:
    from omegaconf import DictConfig

ORIGIN = "OmegaConf"


def from_config(config: DictConfig, name: str) -> Recipe:
    """A recipe, ready for `anonfw.recipe.check` and `anonfw.training.fit.fit`; every key's origin is ORIGIN.

    Args:
        config: composed elsewhere. Interpolations are resolved.
        name: of the recipe, where `config` has no `name`.
    Raises:
        RecipeError: a value is missing (`???`) or an interpolation leads nowhere.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        missing = sorted(OmegaConf.missing_keys(config))
        tree = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise RecipeError([Mistake(ORIGIN, error.full_key or "", str(error).splitlines()[0])]) from error
    if missing:
        raise RecipeError([Mistake(ORIGIN, key, "a value is missing (???)") for key in missing])
    return Recipe(Path(f"{name}.yaml"), tree, dict.fromkeys(_keys(tree, ""), ORIGIN), [])


def to_config(recipe: Recipe) -> DictConfig:
    """The resolved recipe as a configuration of OmegaConf's, to be merged or composed further."""
    from omegaconf import OmegaConf

    return OmegaConf.create(dict(recipe))


def _keys(tree: Any, prefix: str) -> list[str]:
    if isinstance(tree, dict):
        entries = list(tree.items())
    elif isinstance(tree, list):
        entries = list(enumerate(tree))
    else:
        return []
    found = []
    for name, value in entries:
        found += [join(prefix, name), *_keys(value, join(prefix, name))]
    return found
