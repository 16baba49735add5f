"""What several processes train by: DDP, FSDP2 or DeepSpeed's ZeRO, and what a run asks of each.

A recipe names one (`training.sharding`, `training.deepspeed`), or Accelerate's own configuration does (`accelerate
launch --config_file`), which a launched process has in its environment. Transformers' Trainer and Accelerate do the
rest. What cannot work is refused here, before a weight is read.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ..errors import RecipeError, one_line
from ..recipes.methods import METHODS
from ..runs.processes import check_shared_out, launched
from .recipe import Recipe

Name = Literal["none", "ddp", "fsdp2", "zero-0", "zero-1", "zero-2", "zero-3"]


class Engine(NamedTuple):
    """What a run is trained by."""

    name: Name
    given: str
    """What asked for it, for messages."""

    @property
    def is_sharded(self) -> bool:
        """Whether no process has the whole model."""
        return self.name in ("fsdp2", "zero-3")

    @property
    def keeps_own_state(self) -> bool:
        """Whether its checkpoints are its own, which nothing else continues."""
        return self.name not in ("none", "ddp")


def engine_of(recipe: Recipe) -> Engine:
    """What `recipe` is trained by, in as many processes as were started.

    Raises:
        RecipeError: It cannot be.
    """
    sharding, file = recipe.training.sharding, recipe.training.deepspeed
    if sharding is not None:
        return Engine(sharding, f"training.sharding={sharding}")
    if file is not None:
        return Engine(_stage(_read(file), file), f"training.deepspeed={file}")
    said = os.environ
    if said.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        if said.get("FSDP_VERSION", "1") != "2":
            raise RecipeError("Accelerate is configured for FSDP1, which flattens weights; use fsdp_version: 2")
        return Engine("fsdp2", "Accelerate's configuration (FSDP)")
    if said.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        file = said.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if file != "none":
            return Engine(_stage(_read(file), file), f"Accelerate's configuration ({file})")
        stage = said.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        return Engine(f"zero-{stage}", "Accelerate's configuration (DeepSpeed)")  # type: ignore[arg-type]
    return Engine("ddp" if launched() > 1 else "none", "")


def _read(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"training.deepspeed={file!r} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise RecipeError(f"training.deepspeed={file!r} is no JSON object; give DeepSpeed's configuration")
    return content


def _stage(content: dict[str, Any], file: str) -> Name:
    try:
        stage = content.get("zero_optimization", {}).get("stage", 0)
        return {0: "zero-0", 1: "zero-1", 2: "zero-2", 3: "zero-3"}[stage]  # type: ignore[return-value]
    except (AttributeError, KeyError, TypeError):
        raise RecipeError(f"training.deepspeed={file!r}: zero_optimization.stage must be 0, 1, 2 or 3") from None


def can_shard() -> bool:
    """Whether Accelerate offers FSDP and DeepSpeed here: on accelerators."""
    return torch.accelerator.is_available()


def check_processes(recipe: Recipe) -> None:
    """Refuse what several processes, or the engine that a recipe asks for, cannot do.

    Raises:
        RecipeError: With what to do instead.
    """
    engine, size = engine_of(recipe), launched()
    if engine.name == "none":
        return
    method = recipe.method
    if engine.keeps_own_state and "LOCAL_RANK" not in os.environ:
        raise RecipeError(
            f"{engine.given} is for processes that a launcher starts: torchrun --nproc_per_node N -m peft_tsd train …"
        )
    check_shared_out(recipe.training.batch_size, f"training.batch_size={recipe.training.batch_size}")
    if method.startswith("adalora"):
        raise RecipeError(
            f"method={method} adds a penalty of its own to the loss, which {size} processes would count {size} times; "
            "train it in one process"
        )
    if engine.name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        raise RecipeError(f"{engine.given} needs the package deepspeed: pip install deepspeed")
    if engine.keeps_own_state:
        _check_sharded(recipe, engine)


def _check_sharded(recipe: Recipe, engine: Engine) -> None:
    row, method = METHODS[recipe.method], recipe.method
    if row.trains == "nothing":
        raise RecipeError(f"method={method} trains nothing that {engine.given} could shard; remove that")
    if not can_shard():
        raise RecipeError(f"{engine.given} needs accelerators: Accelerate shards no model on CPUs; train without it")
    if row.from_batches:
        raise RecipeError(
            f"method={method} starts from batches, before the model is shared out; it needs DDP, and {engine.given} "
            "asks for another engine"
        )
    if engine.is_sharded and row.directions == "beside":
        raise RecipeError(
            f"method={method} needs its layers whole, and {engine.given} shards them; use DDP or ZeRO-2, or lora-tsd"
        )
    if engine.is_sharded and recipe.model.quantization is not None:
        raise RecipeError(
            f"model.quantization={recipe.model.quantization} packs weights that {engine.given} cannot shard; use DDP"
        )


def check_continues(engine: Engine, progress: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse a checkpoint that `engine`, in as many processes as there are, cannot continue.

    Raises:
        RecipeError: With what saved it.
    """
    before, processes = progress.get("engine", "none"), progress.get("processes", 1)
    # DDP's are those of one process.
    alike = before == engine.name or not (engine.keeps_own_state or before not in ("none", "ddp"))
    if not alike:
        raise RecipeError(
            f"{str(checkpoint)!r} was saved by {before}, and this run is trained by {engine.name}; continue it as it "
            "was begun, or give output=FOLDER for a new run"
        )
    if engine.name.startswith("zero") and processes != launched():
        raise RecipeError(
            f"{str(checkpoint)!r} was saved by {processes} processes with DeepSpeed, which continues it in as many; "
            f"this run has {launched()}"
        )
