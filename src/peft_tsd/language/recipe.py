"""Recipes: what a training run is, as a YAML file that is checked before anything starts.

A recipe names a model, data, the task the data poses, a method with its adapter, and how to optimize and score. Every
key is declared here; an unknown one, or a value of the wrong type, is refused. What a recipe leaves to choose (see
`choices`) is settled before that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from ..errors import RecipeError
from ..recipes.methods import METHODS
from ..recipes.reading import apply_all, check_content, kind_of, load_as
from ..recipes.shared import RunRecipe
from .sections import SUITES, Data, Evaluation, Model, Task, Training

if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]


class Recipe(RunRecipe):
    """One training run of a language model."""

    description: str = ""
    model: Model
    data: Data = Data()
    task: Task
    method: MethodName = "lora-tsd"
    """See `recipes.methods`."""
    training: Training
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _data_fit_the_family(self) -> Recipe:
        data, family = self.data, self.task.family
        if family not in SUITES and data.name is None and data.generator is None:
            raise ValueError(
                "data must have exactly one of name and generator; got name=None and generator=None; give "
                "data.name=FILE or data.generator=NAME"
            )
        foreign = {"folder", "tasks", "train_tasks"}
        if family == "chat":
            foreign |= {"generator", "parameters"}
            if self.training.similar_lengths:
                raise ValueError(
                    "training.similar_lengths=True has no meaning for task.family=chat; task.packing=true leaves no "
                    "padding at all"
                )
        if family in SUITES:
            foreign = {"name", "subset", "split", "test_name", "test_split", "generator", "parameters", "answer"}
        for key in sorted(foreign):
            if getattr(data, key) != Data.model_fields[key].default:
                raise ValueError(
                    f"data.{key}={getattr(data, key)!r} has no meaning for task.family={family}; remove it"
                )
        for key in ("tasks", "train_tasks"):
            if getattr(data, key) == []:
                raise ValueError(f"data.{key}=[] names no task; name one, or remove it for all there are")
        if family == "glue" and (data.train_tasks is not None or len(data.tasks or ()) != 1):
            raise ValueError(
                f"task.family=glue trains and scores one of GLUE's tasks; got data.tasks={data.tasks!r} and "
                f"data.train_tasks={data.train_tasks!r}; give for example data.tasks=[rte] alone"
            )
        return self

    @model_validator(mode="after")
    def _can_be_quantized(self) -> Recipe:
        quantization, family = self.model.quantization, self.task.family
        if quantization is None:
            return self
        possible = [name for name, method in METHODS.items() if method.on_quantized]
        if self.method not in possible:
            raise ValueError(
                f"model.quantization={quantization} is for the methods {', '.join(possible)}; got "
                f"method={self.method}; use one of them, or remove model.quantization"
            )
        if family in ("classify", "glue"):
            raise ValueError(
                f"model.quantization={quantization} is for models that write; got task.family={family}, which trains "
                "a head in full precision; remove model.quantization"
            )
        return self

    @model_validator(mode="after")
    def _steps_reach_the_transition(self) -> Recipe:
        if self.training.steps is not None:
            self.check_length(self.training.steps)
        return self

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Recipe:
        if self.evaluation.on == "validation" and self.data.validation_size is None:
            raise ValueError(
                "evaluation.on=validation scores rows held out of training; say how many with data.validation_size=N"
            )
        return self

    @property
    def data_seed(self) -> int:
        return self.seed if self.data.seed is None else self.data.seed


def load_recipe(reference: str, overrides: Iterable[str] = (), settings: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe for a language model.

    Args:
        reference: Path of a YAML file, or the name of a recipe shipped with the package.
        overrides: `key=value` each, the key dotted (`training.steps`), the value YAML; or `NAME=ROW` of a choice.
        settings: Values by dotted key, set after the overrides.

    Raises:
        RecipeError: Not found, not YAML, an unknown key, a wrong type or value, or a recipe of another kind.
    """
    kind = kind_of(reference)
    if kind is not None:
        raise RecipeError(f"{reference!r} is a recipe of the kind {kind}, which is only for `peft-tsd train`")
    return load_as(Recipe, reference, overrides, settings)


def apply_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """`recipe` with `key=value` overrides.

    Raises:
        RecipeError: As `load_recipe`.
    """
    content = recipe.model_dump()
    apply_all(content, overrides)
    return check_recipe(content)


def check_recipe(content: dict[str, Any]) -> Recipe:
    """Check the content of a recipe.

    Raises:
        RecipeError: Everything that is wrong with it, a line each.
    """
    return check_content(Recipe, content)
