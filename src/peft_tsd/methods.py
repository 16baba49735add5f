"""The methods a recipe can name: this package's, and what they are compared with.

    lora-tsd, lora-dash, lora-init      directions on top of LoRA (`TsdConfig`)
    lora, dora, pissa, adalora          PEFT's own, from the same `adapter` settings
    full                                every parameter of the model, no adapter
    base                                nothing is trained

DoRA: Liu et al., arXiv 2402.09353. PiSSA: Meng et al., arXiv 2404.02948. AdaLoRA: Zhang et al., arXiv 2303.10512.
"""

from __future__ import annotations

import math
from typing import Any, cast

from peft import AdaLoraConfig, LoraConfig, PeftConfig
from transformers.trainer_callback import TrainerCallback

from .config import Method, TsdConfig
from .errors import RecipeError
from .recipe import Recipe

# AdaLoRA starts with 1.5 times the ranks it ends with (its paper's choice), gives up none in the first tenth of the
# steps, and trains what is left in the last three tenths.
ADALORA_START, ADALORA_WARMUP, ADALORA_FINAL = 1.5, 0.1, 0.3


def adapter_config(recipe: Recipe, task_type: str, steps: int) -> PeftConfig | None:
    """The adapter a recipe describes, or None where it has none.

    Args:
        recipe: What to train.
        task_type: PEFT's name of it, such as `CAUSAL_LM`.
        steps: Optimizer steps of the whole run.

    Raises:
        RecipeError: PEFT refuses it.
    """
    fields = {"task_type": task_type, **recipe.adapter.model_dump()}
    try:
        return _config(recipe, fields, steps)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"adapter: {' '.join(str(error).split())}") from None


def _config(recipe: Recipe, fields: dict[str, Any], steps: int) -> PeftConfig | None:
    if recipe.uses_directions:
        return TsdConfig(method=cast(Method, recipe.method), **recipe.directions.model_dump(), **fields)
    if recipe.method == "lora":
        return LoraConfig(**fields)
    if recipe.method == "dora":
        return LoraConfig(**{**fields, "use_dora": True})
    if recipe.method == "pissa":
        return LoraConfig(**{**fields, "init_lora_weights": "pissa"})
    if recipe.method == "adalora":
        r = fields.pop("r")
        return AdaLoraConfig(
            **fields,
            init_r=math.ceil(ADALORA_START * r),
            target_r=r,
            total_step=steps,
            tinit=max(1, round(ADALORA_WARMUP * steps)),
            tfinal=max(1, round(ADALORA_FINAL * steps)),
            deltaT=max(1, steps // 100),
        )
    return None


def without_weights(config: PeftConfig) -> PeftConfig:
    """`config`, changed where making the adapter would read the base weights, for a model that has none."""
    if isinstance(config, LoraConfig) and config.init_lora_weights == "pissa":
        config.init_lora_weights = True
    return config


class AdaLoraCallback(TrainerCallback):
    """Has AdaLoRA give its ranks to the layers that need them, after every optimizer step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        # Trainer counts this step when it is over.
        model.base_model.update_and_allocate(state.global_step + 1)
