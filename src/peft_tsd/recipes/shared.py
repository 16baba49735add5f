"""What the recipes of all kinds of runs have in common."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import yaml
from peft import LoraConfig
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from ..errors import RecipeError, did_you_mean
from ..tuner.config import TsdConfig
from ..tuner.settings import DirectionSettings, InitReading
from .methods import METHODS


def absolute_if_there(name: str) -> str:
    """A local path spelled out, so that the recipe kept in a run folder means the same from everywhere."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


LearningRate = Annotated[float, Field(gt=0, le=1e18)]
"""With as large a weight decay, the most whose product a tensor's float32 holds."""

NameOrPath = Annotated[str, AfterValidator(absolute_if_there)]
"""A name of the hub's, or a local path."""


class Section(BaseModel):
    """Keys that belong together; an unknown one, or a value of another type, is refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def to_yaml(self) -> str:
        """As YAML, with every default spelled out."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


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
        # The task decides task_type, and the rest name the method and the base model; the run fills them in.
        known = {f.name for f in fields(LoraConfig) if f.init} - {"task_type", "peft_type", "inference_mode"}
        for key in self.model_extra:
            if key not in known:
                raise ValueError(f"unknown key 'adapter.{key}'{did_you_mean(key, known, prefix='adapter.')}")
        return self


OF_A_RESTART = {"init_reading", "keep_prelaunch"}
"""What only methods use whose A and B start anew."""


class _Directions(Section):
    @field_validator("prelaunch_steps", mode="before", check_fields=False)
    @classmethod
    def _steps_or_auto(cls, steps: Any) -> Any:
        # One message where pydantic would give one for each type.
        if steps in (None, "auto") or (isinstance(steps, int) and not isinstance(steps, bool) and steps >= 0):
            return steps
        raise ValueError(f"directions.prelaunch_steps={steps!r}: expected a number of steps, 0 or more, or 'auto'")

    @property
    def settings(self) -> DirectionSettings:
        return DirectionSettings(**self.model_dump(exclude=OF_A_RESTART))

    @model_validator(mode="after")
    def _in_range(self) -> _Directions:
        settings = self.settings
        settings.settle_source()
        # What is kept with a run says it.
        self.direction_source = settings.direction_source
        try:
            settings.check_directions()
        except ValueError as error:
            raise ValueError(f"directions.{error}") from None
        return self


if TYPE_CHECKING:

    class Directions(_Directions, DirectionSettings):
        """What a method of task-specific directions adds to LoRA; the others do not use it. See `TsdConfig`."""

        init_reading: InitReading = "svd"
        keep_prelaunch: bool = True

else:
    _types = get_type_hints(DirectionSettings)
    Directions = create_model(
        "Directions",
        __base__=_Directions,
        **{one.name: (_types[one.name], one.default) for one in fields(DirectionSettings)},
        init_reading=(InitReading, TsdConfig.init_reading),
        keep_prelaunch=(bool, True),
    )


class Optimizer(Section):
    """Names and meanings of `transformers.TrainingArguments`."""

    name: str = "adamw_torch"
    learning_rate: LearningRate = 5e-4
    weight_decay: float = Field(default=0.0, ge=0, le=1e18)
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


class Saving(Section):
    """Of any training: in which portions, and how often to save."""

    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    gradient_checkpointing: bool = False
    save_every: int = Field(default=100, ge=1)
    """Optimizer steps between checkpoints."""
    # Two at least: while the newest is being written, the one before it is what a killed run resumes from.
    keep_checkpoints: int = Field(default=2, ge=2)


class RunRecipe(Section):
    """What the recipes of all kinds have: a method with its adapter, how to optimize, and a run folder."""

    method: str = "lora-tsd"
    """A row of `recipes.methods`."""
    adapter: Adapter = Adapter()
    directions: Directions = Directions()
    optimizer: Optimizer = Optimizer()
    training: Saving
    seed: int = Field(default=0, ge=0, lt=2**32)
    output: str
    """The run folder."""
    resume: bool = Field(default=False, exclude=True)
    """Continue the run in `output`."""

    @field_validator("output")
    @classmethod
    def _absolute(cls, output: str) -> str:
        return str(Path(output).expanduser().absolute())

    def to_yaml(self) -> str:
        """As YAML, with every default spelled out; what a kind of recipe has of its own comes first."""
        content = self.model_dump()
        order = sorted(content, key=lambda key: key in RunRecipe.model_fields)
        return yaml.safe_dump({key: content[key] for key in order}, sort_keys=False, allow_unicode=True)

    @property
    def uses_directions(self) -> bool:
        return METHODS[self.method].directions != "none"

    def check_length(self, steps: int) -> None:
        """Refuse a run of `steps` that would end before, or at, the transition."""
        if not self.uses_directions:
            return
        key = "prelaunch_max" if self.directions.prelaunch_steps == "auto" else "prelaunch_steps"
        settings = self.directions.settings
        settings.settle_prelaunch(steps)
        longest = settings.longest_prelaunch
        if steps <= longest:
            raise RecipeError(
                f"training is {steps} steps long, and directions.{key}={longest} of them are {self.method}'s "
                f"pre-launch: train for more steps than that, or give fewer {key}"
            )
