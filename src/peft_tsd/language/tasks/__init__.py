"""Tasks: from data to prompts to a metric.

A recipe's own data come from `sources`: files, hub datasets and generators become examples. The suites, which bring
their data sets with them, are `commonsense` and `math_problems` (both in the form of `instructions`) and `glue`.

A task family knows how an example becomes a row of tokens, how rows become a batch, and how a model is scored:
`generation`, `chat`, `classification` and `glue` have the same verbs. `decoding` writes answers, `likelihood` picks
them.
"""

from __future__ import annotations

from ..recipe import Recipe
from .chat import Chat, load_conversations
from .classification import Classification
from .commonsense import COMMONSENSE
from .generation import Generation
from .glue import Glue, glue_task, load_glue
from .instructions import load_suite
from .material import Material, hold_out
from .math_problems import MATH
from .sources import Example, load_examples

__all__ = [
    "Chat",
    "Classification",
    "Example",
    "Family",
    "Generation",
    "Glue",
    "Material",
    "load_examples",
    "load_task",
]

Family = Generation | Classification | Glue | Chat


def load_task(recipe: Recipe, *, to_train: bool = True) -> tuple[Family, Material]:
    """The task a recipe describes, and its examples.

    Args:
        recipe: What to load.
        to_train: Whether training rows are needed. A suite's are not read otherwise; a recipe's own data are, because
            the rows to score on, and a classifier's labels, depend on them.

    Raises:
        RecipeError: Data are missing, or cannot be read.
    """
    found, material = _load(recipe, to_train=to_train or recipe.evaluation.on == "validation")
    if recipe.evaluation.on == "validation":
        material = material._replace(tests={"validation": material.validation})
    return found, material


def _load(recipe: Recipe, *, to_train: bool) -> tuple[Family, Material]:
    task, data = recipe.task, recipe.data
    if task.family == "glue":
        return Glue(task, glue_task(data)), hold_out(
            load_glue(data, to_train=to_train), data.validation_size, recipe.data_seed
        )
    for suite in (COMMONSENSE, MATH):
        if task.family == suite.name:
            material = load_suite(suite, data, task.prompt, recipe.data_seed, to_train=to_train)
            return Generation(task, suite.reading), material
    if task.family == "chat":
        chats, to_score = load_conversations(data, recipe.data_seed)
        material = hold_out(Material(chats, {"test": to_score}, [], [], []), data.validation_size, recipe.data_seed)
        return Chat(task, to_score), material
    train, test = load_examples(data, task.prompt, recipe.data_seed)
    material = hold_out(Material(train, {"test": test}, [], [], []), data.validation_size, recipe.data_seed)
    if task.family == "generate":
        return Generation(task), material
    # The training rows give a classifier its labels where the recipe does not.
    return Classification(task, train), material
