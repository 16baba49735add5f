"""Recipes: what a training run is, as a YAML file that is checked before anything starts.

A recipe names a model, data, the task the data poses, a method with its adapter, and how to optimize and score. Every
key is declared here; an unknown one, or a value of the wrong type, is refused. What a recipe leaves to choose (see
`choices`) is settled before that.
"""

from __future__ import annotations

import copy
import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .choices import Choice, pick, take_choices
from .errors import RecipeError as RecipeError
from .errors import did_you_mean as did_you_mean
from .errors import one_line


def absolute_if_there(name: str) -> str:
    """A local path spelled out, so that the recipe kept in a run folder means the same from everywhere."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


class Section(BaseModel):
    """Keys that belong together; an unknown one, or a value of another type, is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def to_yaml(self) -> str:
        """As YAML, with every default spelled out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


class Model(Section):
    """The frozen model."""

    name: str
    """A hub name, a local folder, a GGUF file, or either of the last two in an installed package: `package://NAME/PATH`."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["bnb-4bit", "bnb-8bit"] | None = None
    """Quantize the frozen weights with bitsandbytes: to 4 bits (NF4, its scales quantized too) or 8."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose author you trust."""

    @field_validator("name")
    @classmethod
    def _absolute(cls, name: str) -> str:
        return absolute_if_there(name)


SUITES = ("commonsense", "math", "glue")
"""Task families that bring their own data sets, rather than a recipe's `data.name` or `data.generator`."""


class Data(Section):
    """Where questions and answers come from: a file or hub dataset (`name`), a `generator`, or a suite's own sets."""

    name: str | None = None
    """A hub name, or a local .json, .jsonl, .csv, .tsv or .parquet file."""
    subset: str | None = None
    split: str = "train"
    test_name: str | None = None
    """A local file to score on. Without it and `test_split`, `test_size` rows of `name` are held out."""
    test_split: str | None = None
    generator: str | None = None
    """A reasoning-gym task."""
    parameters: dict[str, Any] = {}
    """The generator's own parameters."""
    answer: str = "answer"
    """The column holding the answer."""
    train_size: int | None = Field(default=None, ge=1)
    """Rows to train on; all there are without it."""
    test_size: int | None = Field(default=None, ge=1)
    """Most rows to score on, 200 by default; in a suite the first rows of each task, by default all. None of them has
    a prompt that is trained on."""
    folder: str | None = None
    """The folder of a suite's data sets, one folder a task; the hub's data sets without it."""
    tasks: list[str] | None = None
    """The tasks of a suite to score on; all there are without it."""
    train_tasks: list[str] | None = None
    """The tasks of a suite to train on; without it the folder's ready mixture, or all tasks there are."""
    validation_size: int | None = Field(default=None, ge=1)
    """Training rows that are not trained on, for `evaluation.on: validation`."""
    seed: int | None = None
    """Chooses generated, held-out or (`train_size` of a suite) training rows; the recipe's `seed` without it."""

    @field_validator("name", "test_name", "folder")
    @classmethod
    def _absolute(cls, name: str | None) -> str | None:
        return name if name is None else absolute_if_there(name)

    @model_validator(mode="after")
    def _fits_source(self) -> Data:
        if self.name is not None and self.generator is not None:
            raise ValueError(
                f"data must have exactly one of name and generator; got name={self.name!r} and "
                f"generator={self.generator!r}; set the other to null"
            )
        if self.test_size is None and (self.name or self.generator):
            self.test_size = 200
        if self.generator is not None:
            if self.train_size is None:
                raise ValueError("data.train_size must say how many questions to generate; it is missing")
            for key in ("subset", "test_name", "test_split"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key}={getattr(self, key)!r} cannot be used with a generator; remove it")
        elif self.parameters:
            raise ValueError(f"data.parameters={self.parameters!r} belong to a generator; remove them")
        if self.test_name is not None and self.test_split is not None:
            raise ValueError(
                f"data must have at most one of test_name and test_split; got {self.test_name!r} and "
                f"{self.test_split!r}"
            )
        return self


INSTRUCTION = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Response:
"""
"""Stanford Alpaca's prompt, for which LLM-Adapters' commonsense and math data were made."""


class Task(Section):
    """How a row becomes a prompt, and how an answer is scored."""

    family: Literal["generate", "classify", "commonsense", "math", "glue"]
    """`generate`: a causal language model writes the answer. `classify`: the answer is one of a few labels. The
    others are suites: `commonsense` and `math` are written like `generate`, `glue` is one of its eight tasks."""
    prompt: str = "{question}"
    """The text put before the model; `{column}` stands for a column of the data. Suites: Alpaca's instruction form."""
    chat: bool = False
    """Families that write: wrap the prompt in the tokenizer's chat template."""
    scoring: Literal["generation", "likelihood"] = "generation"
    """`commonsense`: read the answer from what the model writes, or take the option it finds most likely."""
    max_length: int = Field(default=512, ge=8)
    """Tokens a row; a longer prompt loses its beginning."""
    max_new_tokens: int = Field(default=16, ge=1)
    """Families that write: tokens of an answer, 32 by default for `commonsense` and 256 for `math`."""
    labels: list[str] | None = None
    """`classify`: the labels in order; the sorted answers of the training rows without it."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_family(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        length = {"commonsense": 32, "math": 256}.get(str(given.get("family")))
        return given if length is None else {"prompt": INSTRUCTION, "max_new_tokens": length, **given}

    @model_validator(mode="after")
    def _fits_family(self) -> Task:
        foreign = {
            "generate": {"labels", "scoring"},
            "classify": {"chat", "max_new_tokens", "scoring"},
            "commonsense": {"labels"},
            "math": {"labels", "scoring"},
            "glue": {"prompt", "chat", "max_new_tokens", "labels", "scoring"},
        }[self.family]
        for key in foreign & self.model_fields_set:
            # A resolved recipe spells out every default; only a value that asks for something is a mistake.
            if getattr(self, key) != Task.model_fields[key].default:
                raise ValueError(
                    f"task.{key}={getattr(self, key)!r} has no meaning for family {self.family}; remove it"
                )
        if self.labels is not None and len(set(self.labels)) < max(2, len(self.labels)):
            raise ValueError(f"task.labels must be two or more different labels; got {self.labels!r}")
        return self


class Adapter(Section):
    """The LoRA underneath every method. Takes any further field of `peft.LoraConfig`."""

    model_config = ConfigDict(extra="allow", strict=True)

    r: int = Field(default=8, ge=1)
    lora_alpha: int = 16
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: list[str] | str | None = None

    @model_validator(mode="after")
    def _fields_of_lora(self) -> Adapter:
        if not self.model_extra:
            return self
        from dataclasses import fields

        from peft import LoraConfig

        # The task decides task_type, and the rest name the method and the base model; the run fills them in.
        known = {f.name for f in fields(LoraConfig) if f.init} - {"task_type", "peft_type", "inference_mode"}
        for key in self.model_extra:
            if key not in known:
                raise ValueError(f"unknown key 'adapter.{key}'{did_you_mean(key, known, prefix='adapter.')}")
        return self


TSD_METHODS = ("lora-tsd", "lora-dash", "lora-init")

ON_QUANTIZED = (*TSD_METHODS, "lora", "dora", "base")
"""The methods that a recipe can use with `model.quantization`."""


class Directions(Section):
    """What a method of task-specific directions adds to LoRA; the others do not use it. See `peft_tsd.TsdConfig`."""

    prelaunch_steps: int | Literal["auto"] = 100
    prelaunch_min: int = Field(default=25, ge=1)
    prelaunch_max: int = Field(default=200, ge=1)
    settled_agreement: float = Field(default=0.9, gt=0, le=1)
    num_directions: int = Field(default=8, ge=1)
    direction_budget: Literal["layer", "global"] = "layer"
    max_directions: int | None = Field(default=None, ge=1)
    init_reading: Literal["svd", "orthonormal"] = "svd"
    dash_lr_ratio: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    dash_unit: Literal["one", "sigma", "layer"] = "one"
    selection: Literal["tsd", "top", "bottom", "random", "random-change"] = "tsd"
    eps: float = Field(default=1e-6, gt=0, allow_inf_nan=False)

    @field_validator("prelaunch_steps", mode="before")
    @classmethod
    def _steps_or_auto(cls, steps: Any) -> Any:
        # One message where pydantic would give one for each type.
        if steps == "auto" or (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0):
            return steps
        raise ValueError(f"directions.prelaunch_steps={steps!r}: expected a number of steps, 0 or more, or 'auto'")


def check_reaches_transition(method: str, steps: int, directions: Directions) -> None:
    """Refuse a run of `steps` with a method of directions that would end before, or at, the transition."""
    key = "prelaunch_max" if directions.prelaunch_steps == "auto" else "prelaunch_steps"
    longest = getattr(directions, key)
    if steps <= longest:
        raise RecipeError(
            f"training is {steps} steps long, and directions.{key}={longest} of them are {method}'s pre-launch: train "
            f"for more steps than that, or give fewer {key}"
        )


class Optimizer(Section):
    """Names and meanings of `transformers.TrainingArguments`."""

    name: str = "adamw_torch"
    learning_rate: float = Field(default=5e-4, gt=0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    schedule: str = "linear"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=0.0, ge=0, lt=1)
    """Instead of `warmup_steps`: their share of the run, rounded up."""
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_warmup(self) -> Optimizer:
        if self.warmup_steps and self.warmup_ratio:
            raise ValueError(
                f"optimizer must have at most one of warmup_steps and warmup_ratio; got {self.warmup_steps!r} and "
                f"{self.warmup_ratio!r}; set the other to 0"
            )
        return self

    def warmup(self, steps: int) -> int:
        """Warm-up steps of a run of `steps`."""
        return self.warmup_steps or math.ceil(self.warmup_ratio * steps)


class Training(Section):
    """How long, in which portions, and how often to save."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Either this or `epochs`."""
    epochs: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=8, ge=1)
    similar_lengths: bool = False
    """Batches of rows of similar length: less padding, more rows a second."""
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    save_every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints."""
    # Two at least: while the newest is being written, the one before it is what a killed run resumes from.
    keep_checkpoints: int = Field(default=2, ge=2)

    @model_validator(mode="after")
    def _one_length(self) -> Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"training must have exactly one of steps and epochs; got steps={self.steps!r} and "
                f"epochs={self.epochs!r}; set the other to null"
            )
        return self

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of the whole run over `rows` training rows."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        batches = -(-rows // self.batch_size)
        return self.epochs * -(-batches // self.gradient_accumulation)


class Evaluation(Section):
    """Scoring."""

    before: bool = True
    """Score the model before training too."""
    on: Literal["test", "validation"] = "test"
    """What is scored: the test rows, or the `data.validation_size` rows held out of the training rows."""
    batch_size: int = Field(default=32, ge=1)


class Recipe(Section):
    """One training run."""

    description: str = ""
    model: Model
    data: Data = Data()
    task: Task
    method: Literal[
        "lora-tsd", "lora-dash", "lora-init",
        "lora", "dora", "pissa", "adalora", "loha", "vera", "oft",
        "dora-dash", "adalora-dash", "loha-dash", "vera-dash", "oft-dash",
        "full", "base",
    ] = "lora-tsd"  # fmt: skip
    """See `methods`."""
    adapter: Adapter = Adapter()
    directions: Directions = Directions()
    optimizer: Optimizer = Optimizer()
    training: Training
    evaluation: Evaluation = Evaluation()
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: str
    """The run folder."""
    resume: bool = Field(default=False, exclude=True)
    """Continue the run in `output`."""

    @field_validator("output")
    @classmethod
    def _absolute(cls, output: str) -> str:
        return str(Path(output).expanduser().absolute())

    @model_validator(mode="after")
    def _data_fit_the_family(self) -> Recipe:
        data, family = self.data, self.task.family
        if family not in SUITES and data.name is None and data.generator is None:
            raise ValueError(
                "data must have exactly one of name and generator; got name=None and generator=None; give "
                "data.name=FILE or data.generator=NAME"
            )
        foreign = {"folder", "tasks", "train_tasks"}
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
        if self.method not in ON_QUANTIZED:
            raise ValueError(
                f"model.quantization={quantization} is for the methods {', '.join(ON_QUANTIZED)}; got "
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
            self.check_steps(self.training.steps)
        return self

    def check_steps(self, steps: int) -> None:
        """Refuse a run that would end before, or at, the transition."""
        if self.uses_directions:
            check_reaches_transition(self.method, steps, self.directions)

    @model_validator(mode="after")
    def _something_to_validate_on(self) -> Recipe:
        if self.evaluation.on == "validation" and self.data.validation_size is None:
            raise ValueError(
                "evaluation.on=validation scores rows held out of training; say how many with data.validation_size=N"
            )
        return self

    @property
    def uses_directions(self) -> bool:
        return self.method in TSD_METHODS or self.method.endswith("-dash")

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


Kind = TypeVar("Kind", bound=Section)


def load_as(
    schema: type[Kind],
    reference: str,
    overrides: Iterable[str] = (),
    settings: Mapping[str, Any] | None = None,
    short: Mapping[str, str] | None = None,
) -> Kind:
    """Read and check a recipe of any kind.

    Args:
        schema: The recipe's class.
        reference: As `load_recipe`.
        overrides: As `load_recipe`.
        settings: As `load_recipe`.
        short: Keys that have a short name, by that name.

    Raises:
        RecipeError: As `load_recipe`.
    """
    path = find_recipe(reference)
    content, choices = _read(path)
    if path.name == "recipe.yaml" and (path.parent / "metrics.json").is_file():
        content["output"] = str(path.parent)  # the recipe of a run, whose folder may have been moved since
    chosen, rest = pick(choices, overrides)
    for name, row in chosen.items():
        for key, value in choices[name].table[row].items():
            _set(content, key, value, f"choices.{name}.table.{row}: {key}={value!r}")
    for override in rest:
        _apply(content, override, short or {})
    for key, value in (settings or {}).items():
        _set(content, key, value, f"{key}={value!r}")
    # Runs of one recipe with other choices are other runs.
    content.setdefault("output", str(Path("runs") / "-".join([path.stem, *chosen.values()])))
    return _check(schema, content)


KINDS = ("dreambooth",)
"""What a recipe's `kind` can be; a language model's has none."""


def kind_of(reference: str) -> str | None:
    """The kind of a recipe that is not for a language model, or None.

    Raises:
        RecipeError: As `load_recipe`, or there is no such kind.
    """
    kind: str | None = _read(find_recipe(reference))[0].get("kind")
    if kind is not None and kind not in KINDS:
        raise RecipeError(f"kind={kind!r} is not known{did_you_mean(str(kind), KINDS)}")
    return kind


def describe(reference: str) -> str:
    """The `description` of a recipe of any kind."""
    return str(_read(find_recipe(reference))[0].get("description", ""))


def choices_of(reference: str) -> dict[str, Choice]:
    """What a recipe leaves to choose.

    Raises:
        RecipeError: As `load_recipe`.
    """
    return _read(find_recipe(reference))[1]


# A comparison makes the recipes of all its runs from one file, and reading YAML is most of the work.
_parsed = functools.lru_cache(maxsize=4)(lambda text, where: parse_yaml(text, where))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Choice]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{str(path)!r} cannot be read: {one_line(error)}") from None
    content = copy.deepcopy(_parsed(text, str(path)))
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys; got {type(content).__name__}")
    return content, take_choices(content, str(path))


def apply_overrides(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """`recipe` with `key=value` overrides.

    Raises:
        RecipeError: As `load_recipe`.
    """
    content = recipe.model_dump()
    for override in overrides:
        _apply(content, override)
    return check_recipe(content)


def check_recipe(content: dict[str, Any]) -> Recipe:
    """Check the content of a recipe.

    Raises:
        RecipeError: Everything that is wrong with it, in one line.
    """
    return _check(Recipe, content)


def _check(schema: type[Kind], content: dict[str, Any]) -> Kind:
    try:
        return schema.model_validate(content)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(e, schema) for e in error.errors())) from None


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    folder = Path(str(files("peft_tsd") / "recipes"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(reference: str) -> Path:
    """The file that `reference` names: a path, or a shipped recipe's name.

    Raises:
        RecipeError: There is none.
    """
    path = Path(reference).expanduser()
    if path.is_file():
        return path
    shipped = shipped_recipes()
    if reference in shipped:
        return shipped[reference]
    if path.is_dir():
        raise RecipeError(f"recipe {reference!r} is a folder; give a YAML file, such as {path / 'recipe.yaml'}")
    raise RecipeError(
        f"no recipe {reference!r}: neither a file nor one of {', '.join(shipped)}"
        f"{did_you_mean(reference, shipped, listing=False)}"
    )


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-3 is a number (YAML 1.1 wants 1.0e-3), and a key given twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: str) -> Any:
    """What YAML `text` says.

    Raises:
        RecipeError: It is not YAML; `where` says where it stood.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None


def _apply(content: dict[str, Any], override: str, short: Mapping[str, str] = MappingProxyType({})) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"cannot read {override!r}; an override is key=value, such as training.steps=100")
    value = parse_yaml(text, f"override {override!r}")
    _set(content, key if isinstance(value, dict) else short.get(key, key), value, override)


def _set(content: dict[str, Any], key: str, value: Any, given: str) -> None:
    *sections, last = key.split(".")
    for section in sections:
        if not isinstance(content.get(section, {}), dict):
            raise RecipeError(f"cannot set {given!r}: {section!r} is a single value, not a section")
        content = content.setdefault(section, {})
    content[last] = value


def _explain(error: Any, schema: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        section = _section_at(schema, error["loc"][:-1])
        prefix = "".join(f"{part}." for part in error["loc"][:-1])
        known = section.model_fields if section else ()
        return f"unknown key {path!r}{did_you_mean(str(error['loc'][-1]), known, prefix=prefix)}"
    if error["type"] == "missing":
        return f"{path!r} is missing; add it to the recipe, or give {path}=VALUE"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    expected = error["msg"].replace("Input should be ", "expected ")
    nearest = ""
    if error["type"] == "literal_error":
        nearest = did_you_mean(str(given), re.findall(r"'([^']+)'", error["msg"]), listing=False)
    return f"{path}={_short(given)} ({type(given).__name__}): {expected}{nearest}"


def _section_at(section: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel] | None:
    for part in loc:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return None
        section = field.annotation
    return section


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
