"""Tasks: from data to prompts to a metric.

`sources` turns files, hub datasets and generators into examples. A task family knows the rest: how an example
becomes a row of tokens, how rows become a batch, and how a model is scored. `generation` and `classification` have
the same verbs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..recipe import Task
from .classification import Classification
from .generation import Generation
from .sources import Example, load_examples

__all__ = ["Classification", "Example", "Generation", "load_examples", "make_task"]


def make_task(task: Task, train: Sequence[Example]) -> Generation | Classification:
    """The task a recipe describes; `train` gives a classifier its labels where the recipe does not."""
    if task.family == "generate":
        return Generation(task)
    return Classification(task, train)
