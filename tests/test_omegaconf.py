"""Recipes that OmegaConf composed are recipes like any other."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from anonfw import recipe as recipes
from anonfw.errors import RecipeError
from anonfw.omegaconf_recipes import from_config, to_config

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_there_and_back_is_the_same_recipe(path):
    recipe = recipes.load(path)
    again = from_config(to_config(recipe), recipe.name)
    assert again == recipe and again.name == recipe.name and again.yaml() == recipe.yaml()


def test_a_composed_configuration_is_merged_and_resolved():
    base = to_config(recipes.load(ROOT / "recipes" / "id2face.yaml"))
    mine = OmegaConf.create({"name": "mine", "steps": 50, "trainer": {"max_steps": "${steps}"}})
    recipe = from_config(OmegaConf.merge(base, mine), "other")
    assert recipe.name == "mine" and recipe["trainer"]["max_steps"] == 50
    assert recipe["system"]["_target_"] == "anonfw.systems.id2face.ID2Face"
    assert recipe.where("trainer.max_steps") == "OmegaConf"
    (mistake,) = recipes.check(recipe)
    assert (mistake.where, mistake.key) == ("OmegaConf", "steps"), "a key that no section has is a mistake here as well"


def test_what_is_missing_or_leads_nowhere_is_told():
    with pytest.raises(RecipeError, match="OmegaConf: system.lr: a value is missing"):
        from_config(OmegaConf.create({"system": {"lr": "???"}}), "x")
    with pytest.raises(RecipeError, match="OmegaConf: seed: Interpolation key 'nowhere' not found"):
        from_config(OmegaConf.create({"seed": "${nowhere}"}), "x")
