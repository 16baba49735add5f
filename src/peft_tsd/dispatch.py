"""Which layer a module of the base model gets; or why it can have none."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from .config import REFUSED_FIELDS, TsdConfig
from .layer import Conv2d, Linear, TsdLayer
from .quantized import is_quantized, quantized_layer


def create_layer(target: nn.Module, adapter_name: str, config: TsdConfig, **kwargs: Any) -> TsdLayer:
    """Wrap the module `target` in the TSD layer of its type.

    Raises:
        ValueError: There is none; the message names the module and says what to leave out.
    """
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    name = kwargs.get("target_name") or type(base).__name__
    reason = _split(base)
    if reason is None and is_quantized(base):
        layer = quantized_layer(target, adapter_name, config, **kwargs)
        if layer is not None:
            return layer
    reason = reason or unsupported(base)
    if isinstance(base, nn.Embedding) and config.ensure_weight_tying:
        reason = "ensure_weight_tying=True has PEFT adapt this embedding too; without it, lm_head gets its own adapter"
    if reason:
        raise ValueError(
            f"{name} cannot carry a {config.method} adapter: {reason}. "
            f"Leave it out of target_modules, or name it in exclude_modules=[{name!r}]."
        )
    if isinstance(base, nn.Conv2d):
        return Conv2d(target, adapter_name, config=config, **kwargs)
    layer = Linear(target, adapter_name, config=config, is_target_conv_1d_layer=isinstance(base, Conv1D), **kwargs)
    # The type of the layer decides how its weight is stored, whatever the config says of the others.
    layer.fan_in_fan_out = isinstance(base, Conv1D)
    return layer


def unsupported(base: nn.Module) -> str | None:
    """Why a layer cannot have directions, or None where it can, with its weight as it stands."""
    if is_quantized(base):
        return f"its weight is quantized ({type(base).__name__}{_dtype(base)}); load the base model in bfloat16"
    if not isinstance(base, (nn.Linear, Conv1D, nn.Conv2d)):
        stacks = " and ".join(_stacks(base))
        experts = f" (its {stacks} hold one matrix for each expert)" if stacks else ""
        return (
            f"it is of type {type(base).__name__}, and only Linear, Conv1D and Conv2d weights have directions here"
            f"{experts}"
        )
    if isinstance(base, nn.Conv2d):
        if base.groups != 1:
            return f"it is a convolution in {base.groups} groups, whose LoRA is not a change of the kernel's shape"
        if tuple(base.dilation) != (1, 1) or base.padding_mode != "zeros":
            return (
                f"it is a convolution with dilation {tuple(base.dilation)} and padding mode {base.padding_mode!r}, "
                "which PEFT's LoRA layers, and so any export, do not follow"
            )
    return None


def check_experts(config: TsdConfig, model: nn.Module) -> None:
    """Refuse names in target_modules that no module has, where a model has experts: most likely their parts are meant.

    Elsewhere, as with PEFT's LoRA, one list of names may serve models that have only some of them.

    Raises:
        ValueError: There are such names.
    """
    experts = [f"{name}.{stack}" for name, module in model.named_modules() for stack in _stacks(module)]
    if not experts or not config.target_modules or isinstance(config.target_modules, str):
        return
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = sorted(name for name in config.target_modules if name.rpartition(".")[2] not in endings)
    if missing:
        raise ValueError(
            f"target_modules={missing} name no module of the model. If parts of its experts are meant, such as "
            f"{experts[0]}: {REFUSED_FIELDS['target_parameters']}."
        )


def _dtype(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    return f", {weight.dtype}" if isinstance(weight, Tensor) else ""


def _stacks(module: nn.Module) -> list[str]:
    """The names of the parameters of a module that hold one matrix for each of its experts."""
    if isinstance(module, nn.Conv1d):
        return []
    return [name for name, one in module.named_parameters(recurse=False) if one.ndim == 3 and len(one) > 1]


def _split(base: nn.Module) -> str | None:
    """Why a layer that is split over processes cannot have directions, or None where it is not."""
    weight = getattr(base, "weight", None)
    names = (weight.device_mesh.mesh_dim_names or ()) if isinstance(weight, DTensor) else ()
    if getattr(base, "_hf_tp_plan", None) is None and "tp" not in names:
        return None
    return (
        "its weight is split over processes by tensor parallelism, so that no process has its directions; load the "
        "base model without tp_plan, and train with DDP or FSDP"
    )
