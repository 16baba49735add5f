"""Teaching a diffusion model a subject from a handful of photos (DreamBooth), with LoRA-TSD, its parts, or plain LoRA.

    ```py
    >>> from peft_tsd.diffusion import load_recipe, train
    >>> recipe = load_recipe("dreambooth-sdxl", ["data=photos", "prompt=a photo of sks backpack"])
    >>> result = train(recipe)
    >>> pipe.load_lora_weights(result.folder.adapter_lora)  # any diffusers pipeline of that model
    ```

It needs the extra `diffusion`. What one can do with a finished run: `load_adapters` puts it onto a pipeline,
`export_diffusers` writes it as a LoRA file again, `compare_subjects` shows several side by side. In a training
script of one's own, `save_lora_weights` writes the LoRA file.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters import load_adapters
    from .comparing import compare_subjects
    from .export import export_diffusers, save_lora_weights
    from .recipe import DreamBooth, load_recipe
    from .subjects import Comparison
    from .training import Result, train

__all__ = [
    "Comparison",
    "DreamBooth",
    "Result",
    "compare_subjects",
    "export_diffusers",
    "load_adapters",
    "load_recipe",
    "save_lora_weights",
    "train",
]

_HOME = {
    "Comparison": "subjects",
    "DreamBooth": "recipe",
    "Result": "training",
    "compare_subjects": "comparing",
    "export_diffusers": "export",
    "load_adapters": "adapters",
    "load_recipe": "recipe",
    "save_lora_weights": "export",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    # A recipe can be read and checked where diffusers is not installed.
    if name in _HOME:
        return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
