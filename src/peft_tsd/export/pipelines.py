"""The form in which diffusers' pipelines read a LoRA: one file, its tensors named by the component they adapt.

A file says nothing of scaling, which pipelines then take to be 1, as it is here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from peft import PeftModel
from torch import Tensor, nn

from ..files.adapters import PREFIX
from ..models.wrapped import unwrapped

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


def denoiser_name(model: nn.Module) -> Literal["unet", "transformer"] | None:
    """What a pipeline calls `model`, a denoiser of diffusers' with adapters or without; None where it is none."""
    inner = unwrapped(model.get_base_model()) if isinstance(model, PeftModel) else unwrapped(model)
    for kind in type(inner).__mro__:
        if kind.__module__.startswith("diffusers.models."):
            if kind.__name__.startswith("UNet"):
                return "unet"
            if "Transformer" in kind.__name__:
                return "transformer"
    return None


def in_component(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """A LoRA's tensors, named as in a pipeline whose component `name` it adapts."""
    return {f"{name}.{key.removeprefix(PREFIX)}": tensor for key, tensor in state.items()}
