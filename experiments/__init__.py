"""Recipes that come with espalier (YAML); ``espalier recipes`` lists them."""
