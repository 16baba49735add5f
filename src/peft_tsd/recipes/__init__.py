"""Recipes: what a training run is, as a YAML file that is checked before anything starts."""
