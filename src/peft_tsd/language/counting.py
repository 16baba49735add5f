"""What a shipped recipe would train, counted without its weights.

Configurations of the recipes' models, their architecture's public numbers alone, come with the package in
`recipes/configs`, each with the `model.name` it stands for. A model is built of them on the meta device, which holds
shapes and no numbers, and adapted as the recipe says.
"""

from __future__ import annotations

from typing import Any

from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from ..models.loading import check_target_modules, load_skeleton
from ..models.shipped import packaged_config
from ..recipes.adapters import adapter_config
from ..recipes.methods import METHODS
from .recipe import Recipe
from .tasks.glue import Glue, glue_task

SOME_STEPS = 1000
"""Of a run whose length its data say; AdaLoRA's schedule has to fit into them."""


def check_recipe_model(recipe: Recipe) -> dict[str, int]:
    """Numbers trained, by part: LoRA's A and B (or what the method has in their place, by its name), the directions'
    Δσ, and a classifier's head; all of the model with full fine-tuning.

    Of a global budget of directions, the scalars that are there in case a layer gets more than others are a part of
    their own: they stay zero.

    Raises:
        RecipeError: The package has no configuration of the model, or the adapter does not fit it.
    """
    config = AutoConfig.for_model(**packaged_config(recipe.model.name)["config"])
    classifies = recipe.task.family in ("classify", "glue")
    auto_class = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    for key, value in _head(recipe).items():
        setattr(config, key, value)
    skeleton = load_skeleton(config, auto_class)
    # The steps, where the data say how many, do not change what is trained.
    adapter = adapter_config(recipe, "SEQ_CLS" if classifies else "CAUSAL_LM", recipe.training.steps or SOME_STEPS)
    if adapter is None:
        return {"model": skeleton.num_parameters()} if METHODS[recipe.method].trains == "model" else {"nothing": 0}
    check_target_modules(recipe.adapter.target_modules, skeleton)
    adapted = get_peft_model(skeleton, adapter, low_cpu_mem_usage=True)
    parts: dict[str, int] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            part = _part(name, recipe.method)
            parts[part] = parts.get(part, 0) + parameter.numel()
            if part == "Δσ":
                unused = parameter.numel() - recipe.directions.num_directions
                parts[part] -= unused
                if unused:
                    parts["unused Δσ"] = parts.get("unused Δσ", 0) + unused
    return parts


def _part(name: str, method: str) -> str:
    if "modules_to_save" in name:
        return "head"
    if "dash." in name:
        return "Δσ"
    # AdaLoRA has how many ranks a layer has among its parameters.
    return "LoRA" if "lora_" in name or "ranknum" in name else method.removesuffix("-dash")


def _head(recipe: Recipe) -> dict[str, Any]:
    if recipe.task.family == "glue":
        return Glue(recipe.task, glue_task(recipe.data)).config_fields
    # The labels of `classify` are in its data where the recipe does not list them; two are the fewest.
    return {"num_labels": len(recipe.task.labels or ("", ""))} if recipe.task.family == "classify" else {}
