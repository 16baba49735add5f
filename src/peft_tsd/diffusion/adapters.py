"""The adapters of a pipeline: one for its denoiser, and one for each text encoder that is trained.

Saved, each has a folder of its own, named as the component it adapts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model

from ..errors import RecipeError, one_line
from ..files.adapters import CONFIG
from ..models.loading import check_target_modules
from ..recipes.adapters import adapter_config
from ..tuner.checking import check_adapter
from ..tuner.opening import load_adapter
from .families import PipelineFamily
from .recipe import DreamBooth

Adapters = dict[str, PeftModel]
"""By component. A component's own modules are replaced, so that the pipeline computes with the adapter too."""


def make_adapters(
    pipe: Any, family: PipelineFamily, recipe: DreamBooth, *, low_cpu_mem_usage: bool = False
) -> Adapters:
    """New adapters on `pipe`, as a recipe describes them.

    Args:
        pipe: The pipeline; its components are adapted in place.
        family: Its family.
        recipe: What to adapt and how.
        low_cpu_mem_usage: Leave the adapters on the meta device.

    Raises:
        RecipeError: They do not fit the models.
    """
    targets: dict[str, tuple[list[str] | str | None, str]] = {
        family.denoiser: (recipe.adapter.target_modules, "adapter.target_modules")
    }
    if recipe.text_encoders.train:
        for name in family.text_encoders:
            targets[name] = (recipe.text_encoders.target_modules, "text_encoders.target_modules")
    made: Adapters = {}
    for name, (modules, key) in targets.items():
        component = getattr(pipe, name)
        check_target_modules(modules, component, key)
        changed = recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"target_modules": modules})})
        config = adapter_config(changed, None, recipe.training.steps)
        assert config is not None  # every method of this kind of recipe has one
        try:
            made[name] = get_peft_model(component, config, low_cpu_mem_usage=low_cpu_mem_usage)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise RecipeError(f"adapter of the {name}: {one_line(error)}") from None
        config.base_model_name_or_path = recipe.model.name
    return made


def save_adapters(adapters: Mapping[str, PeftModel], folder: Path) -> None:
    """Write native adapters into `folder`, which exists."""
    for name, adapter in adapters.items():
        # "auto" would look the base model up, which is one component of a pipeline and no model of its own.
        adapter.save_pretrained(folder / name, save_embedding_layers=False)


def load_adapters(pipe: Any, folder: str | Path, *, is_trainable: bool = False) -> Adapters:
    """Put native adapters onto a pipeline, whose images show them from then on.

        ```py
        >>> pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")
        >>> load_adapters(pipe, "runs/backpack/adapter")
        >>> pipe("a photo of sks backpack on the beach").images[0].save("beach.png")
        ```

    Args:
        pipe: The pipeline they were trained on; its components are adapted in place.
        folder: The `adapter` folder of a run.
        is_trainable: Whether they are to be trained on.

    Raises:
        FileNotFoundError: `folder` holds no adapter.
        ValueError: The pipeline lacks a component that one adapts.
        AdapterError: One is damaged, unsafe, or for another model; the pipeline is as it was.
    """
    names = component_names(folder)
    if not names:
        raise FileNotFoundError(f"{str(folder)!r} holds no adapter of a pipeline; give the adapter/ of a run folder.")
    for name in names:
        if getattr(pipe, name, None) is None:
            raise ValueError(f"{str(folder)!r} adapts the {name}, which a {type(pipe).__name__} does not have.")
    for name in names:
        check_adapter(Path(folder) / name)
    return {
        name: load_adapter(getattr(pipe, name), Path(folder) / name, f"the {name}", is_trainable=is_trainable)
        for name in names
    }


def component_names(folder: str | Path) -> list[str]:
    """The components whose adapters a folder holds, the denoiser first, as they are trained."""
    names = sorted(path.parent.name for path in Path(folder).glob(f"*/{CONFIG}"))
    return sorted(names, key=lambda name: name.startswith("text_encoder"))
