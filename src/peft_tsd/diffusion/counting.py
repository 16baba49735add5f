"""What a shipped DreamBooth recipe would train, counted without its weights."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from peft import get_peft_model

from ..models.loading import check_target_modules
from ..models.shipped import packaged_config
from ..recipes.adapters import adapter_config
from .recipe import DreamBooth


def check_recipe_model(recipe: DreamBooth) -> dict[str, int]:
    """Numbers a recipe trains in the denoiser, by part, counted without its weights.

    Raises:
        RecipeError: The package has no configuration of the model, or the adapter does not fit it.
    """
    skeleton = denoiser_skeleton(recipe.model.name)
    check_target_modules(recipe.adapter.target_modules, skeleton)
    config = adapter_config(recipe, None, recipe.training.steps)
    assert config is not None  # every method of this kind of recipe has one
    adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    parts: dict[str, int] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            part = "Δσ" if "lora_dash" in name else "LoRA"
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def denoiser_skeleton(model: str) -> Any:
    """The denoiser of a shipped recipe's model, on the meta device, from the configuration in the package.

    Raises:
        RecipeError: There is none.
    """
    content = packaged_config(model, denoiser=True)
    with torch.device("meta"):
        return getattr(diffusers, content["class"]).from_config(content["config"])
