"""Recipes: every choice of a conversion, as data."""
