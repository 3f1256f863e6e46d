"""Formerly `irc.stage_recipes`; now `irc.recipe.stages`."""

from irc.recipe.stages import LffRecipe, LoraRecipe, RouterRecipe

__all__ = ["LffRecipe", "LoraRecipe", "RouterRecipe"]
