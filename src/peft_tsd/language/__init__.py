"""Language models: from a recipe to a scored adapter."""

from .evaluating import evaluate
from .recipe import Recipe, load_recipe
from .training import Result, train

__all__ = ["Recipe", "Result", "evaluate", "load_recipe", "train"]
