"""The adapter that a recipe describes, as PEFT's configuration of it.

DoRA: Liu et al., arXiv 2402.09353. PiSSA: Meng et al., arXiv 2404.02948. AdaLoRA: Zhang et al., arXiv 2303.10512.
LoRA-GA: Wang et al., arXiv 2407.05000. EVA: Paischer et al., arXiv 2410.07170.
LoHa: Hyeon-Woo et al., arXiv 2108.06098. VeRA: Kopiczko et al., arXiv 2310.11454. OFT: Qiu et al., arXiv 2306.07280.
"""

from __future__ import annotations

import math
from typing import Any, cast

from peft import AdaLoraConfig, EvaConfig, LoHaConfig, LoraConfig, LoraGAConfig, OFTConfig, PeftConfig, VeraConfig
from transformers.trainer_callback import TrainerCallback

from ..dash.config import DashConfig
from ..errors import RecipeError
from ..tuner.config import Method, TsdConfig
from ..tuner.settings import DirectionSettings
from .methods import METHODS
from .shared import OF_A_RESTART, RunRecipe

# AdaLoRA starts with 1.5 times the ranks it ends with (its paper's choice), gives up none in the first tenth of the
# steps, and trains what is left in the last three tenths.
ADALORA_START, ADALORA_WARMUP, ADALORA_FINAL = 1.5, 0.1, 0.3

# VeRA trains one number a rank and one an output, and its paper's ranks are around 256.
VERA_RANKS = 32

# A square layer has as many parameters with blocks of 4·r as with a LoRA of rank r, nearly.
OFT_BLOCK = 4


def adapter_config(recipe: RunRecipe, task_type: str | None, steps: int) -> PeftConfig | None:
    """The adapter a recipe describes, or None where it has none.

    Args:
        recipe: What to train.
        task_type: PEFT's name of it, such as `CAUSAL_LM`; None for a diffusion model.
        steps: Optimizer steps of the whole run.

    Raises:
        RecipeError: PEFT refuses it.
    """
    fields = {"task_type": task_type, **recipe.adapter.model_dump()}
    try:
        config = _config(recipe, fields, steps)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"adapter: {' '.join(str(error).split())}") from None
    if isinstance(config, DirectionSettings):
        config.settle_prelaunch(steps)
    return config


def _config(recipe: RunRecipe, fields: dict[str, Any], steps: int) -> PeftConfig | None:
    name, directions = recipe.method, recipe.directions.model_dump()
    method = METHODS[name]
    if method.trains != "adapter":
        return None
    if method.directions == "own":
        return TsdConfig(method=cast(Method, name), **directions, **fields)
    of_peft = _of_peft(name.removesuffix("-dash"), fields, steps)
    if method.directions == "none":
        return of_peft
    return DashConfig(peft=of_peft, **{key: value for key, value in directions.items() if key not in OF_A_RESTART})


def _of_peft(method: str, fields: dict[str, Any], steps: int) -> PeftConfig:
    """The configuration of a method of PEFT's, from the fields of `LoraConfig`."""
    if method == "lora":
        return LoraConfig(**fields)
    if method == "dora":
        return LoraConfig(**{**fields, "use_dora": True})
    if method == "pissa":
        return LoraConfig(**{**fields, "init_lora_weights": "pissa"})
    if method == "lora-ga":
        return LoraConfig(**{"lora_ga_config": LoraGAConfig(), **fields, "init_lora_weights": "lora_ga"})
    if method == "eva":
        return LoraConfig(**{"eva_config": EvaConfig(), **fields, "init_lora_weights": "eva"})
    r = fields.pop("r")
    if method == "adalora":
        return AdaLoraConfig(
            **fields,
            init_r=math.ceil(ADALORA_START * r),
            target_r=r,
            total_step=steps,
            tinit=max(1, round(ADALORA_WARMUP * steps)),
            tfinal=max(1, round(ADALORA_FINAL * steps)),
            deltaT=max(1, steps // 100),
        )
    alpha, dropout = fields.pop("lora_alpha"), fields.pop("lora_dropout")
    if method == "loha":
        return LoHaConfig(**fields, r=r, alpha=alpha)
    if method == "vera":
        return VeraConfig(**fields, r=VERA_RANKS * r, vera_dropout=dropout)
    assert method == "oft"
    return OFTConfig(**fields, r=0, oft_block_size=OFT_BLOCK * r)


def is_adalora(config: PeftConfig | None) -> bool:
    """Whether AdaLoRA is trained, with or without directions beside it."""
    return isinstance(config.peft if isinstance(config, DashConfig) else config, AdaLoraConfig)


class AdaLoraCallback(TrainerCallback):
    """Has AdaLoRA give its ranks to the layers that need them, after every optimizer step."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        # Trainer counts this step when it is over.
        model.base_model.update_and_allocate(state.global_step + 1)
