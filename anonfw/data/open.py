"""From a recipe to a loader: the one place that knows where a recipe says which data set a loader reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from anonfw import recipe as recipes


def open_loader(recipe: Mapping[str, Any], name: str, **given: Any) -> Any:
    """The loader `data.NAME`. It reads the data set that it names, else the recipe's `dataset`.

    Args:
        given: further arguments of the loader, which the recipe's node leaves open or which replace its own.
    """
    node = recipe["data"][name]
    if recipe.get("dataset") is not None and "dataset" not in node:
        given["dataset"] = recipe["dataset"]
    return recipes.build(node)(**given)
