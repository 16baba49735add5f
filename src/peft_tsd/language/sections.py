"""The sections of a language model's recipe."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from ..recipes.shared import NameOrPath, Saving, Section


class Model(Section):
    """The frozen model."""

    name: NameOrPath
    """A hub name, a local folder, a GGUF file, or either of the last two in an installed package: `package://NAME/PATH`."""
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Literal["bnb-4bit", "bnb-8bit"] | None = None
    """Quantize the frozen weights with bitsandbytes: to 4 bits (NF4, its scales quantized too) or 8."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for a model whose author you trust."""


SUITES = ("commonsense", "math", "glue")
"""Task families that bring their own data sets, rather than a recipe's `data.name` or `data.generator`."""


class Data(Section):
    """Where questions and answers come from: a file or hub dataset (`name`), a `generator`, or a suite's own sets."""

    name: NameOrPath | None = None
    """A hub name, or a local .json, .jsonl, .csv, .tsv or .parquet file."""
    subset: str | None = None
    split: str = "train"
    test_name: NameOrPath | None = None
    """A local file to score on. Without it and `test_split`, `test_size` rows of `name` are held out."""
    test_split: str | None = None
    generator: str | None = None
    """A reasoning-gym task."""
    parameters: dict[str, Any] = Field(default={})
    """The generator's own parameters."""
    answer: str = "answer"
    """The column holding the answer."""
    train_size: int | None = Field(default=None, ge=1)
    """Rows to train on; all there are without it."""
    test_size: int | None = Field(default=None, ge=1)
    """Most rows to score on, 200 by default; in a suite the first rows of each task, by default all. None of them has
    a prompt that is trained on."""
    folder: NameOrPath | None = None
    """The folder of a suite's data sets, one folder a task; the hub's data sets without it."""
    tasks: list[str] | None = None
    """The tasks of a suite to score on; all there are without it."""
    train_tasks: list[str] | None = None
    """The tasks of a suite to train on; without it the folder's ready mixture, or all tasks there are."""
    validation_size: int | None = Field(default=None, ge=1)
    """Training rows that are not trained on, for `evaluation.on: validation`."""
    seed: int | None = None
    """Chooses generated, held-out or (`train_size` of a suite) training rows; the recipe's `seed` without it."""

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

    family: Literal["generate", "chat", "classify", "commonsense", "math", "glue"]
    """`generate`: a causal language model writes the answer. `chat`: it learns the assistant's turns of conversations
    (`messages`). `classify`: the answer is one of a few labels. The
    others are suites: `commonsense` and `math` are written like `generate`, `glue` is one of its eight tasks."""
    prompt: str = "{question}"
    """The text put before the model; `{column}` stands for a column of the data. Suites: Alpaca's instruction form."""
    chat: bool = False
    """Families that write: wrap the prompt in the tokenizer's chat template."""
    scoring: Literal["generation", "likelihood"] = "generation"
    """`commonsense`: read the answer from what the model writes, or take the option it finds most likely."""
    packing: bool = False
    """`chat`: rows are filled with whole conversations, each of which sees itself alone."""
    max_length: int = Field(default=512, ge=8)
    """Tokens a row; a longer prompt loses its beginning, a longer conversation its end."""
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
            "generate": {"labels", "scoring", "packing"},
            "chat": {"prompt", "chat", "labels", "scoring"},
            "classify": {"chat", "max_new_tokens", "scoring", "packing"},
            "commonsense": {"labels", "packing"},
            "math": {"labels", "scoring", "packing"},
            "glue": {"prompt", "chat", "max_new_tokens", "labels", "scoring", "packing"},
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


class Training(Saving):
    """How long, in which portions, and how often to save."""

    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Either this or `epochs`."""
    epochs: int | None = Field(default=None, ge=1)
    similar_lengths: bool = False
    """Batches of rows of similar length: less padding, more rows a second."""
    start_batches: int | None = Field(default=None, ge=1)
    """Of the training batches, how many of the first are looked at before training, where a method starts from them:
    directions of gradients, `lora-ga` and `eva`. They are trained on all the same."""
    sharding: Literal["fsdp2"] | None = None
    """Split the model over the processes, by FSDP2; by DDP each has it whole."""
    deepspeed: NameOrPath | None = None
    """A file with DeepSpeed's configuration, by which several processes train."""
    report_to: list[str] = Field(default=[])
    """Trackers that draw the curves of the run, by their names in `transformers.TrainingArguments`."""

    @field_validator("report_to", mode="before")
    @classmethod
    def _some_trackers(cls, given: Any) -> Any:
        return [] if given in (None, "none") else [given] if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_engine(self) -> Training:
        if self.sharding is not None and self.deepspeed is not None:
            raise ValueError(
                f"training must have at most one of sharding and deepspeed; got {self.sharding!r} and "
                f"{self.deepspeed!r}; set the other to null"
            )
        return self

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
    every: int | None = Field(default=None, ge=1)
    """Optimizer steps between evaluations on those rows during training; none without it."""
    during: Literal["all", "loss"] = "all"
    """What those evaluations measure: the loss and the metric, or the loss alone, which writes no answers."""
    metric_rows: int | None = Field(default=None, ge=1)
    """The metric is that of each task's first so many rows; of all without it. The loss is always that of all."""
    patience: int | None = Field(default=None, ge=1)
    """Evaluations in a row that do not lower the held-out loss, after which training ends."""

    @model_validator(mode="after")
    def _something_to_wait_for(self) -> Evaluation:
        if self.patience is not None and self.every is None:
            raise ValueError(
                f"evaluation.patience={self.patience} counts evaluations during training; say how often there is one "
                "with evaluation.every=STEPS"
            )
        return self
