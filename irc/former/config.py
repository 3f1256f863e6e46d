"""Formerly `irc.config`; now `irc.recipe.recipe`."""

from irc.recipe.recipe import Recipe, load_recipe

__all__ = ["Recipe", "load_recipe"]
