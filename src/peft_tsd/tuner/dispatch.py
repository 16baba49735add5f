"""Which layer a module of the base model gets; or why it can have none."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..models.matrix import expert_stacks, unsupported
from ..models.packed import is_quantized
from .config import REFUSED_FIELDS, TsdConfig
from .layer import Conv2d, Linear, TsdLayer
from .quantized import quantized_layer


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


def check_experts(config: TsdConfig, model: nn.Module) -> None:
    """Refuse names in target_modules that no module has, where a model has experts: most likely their parts are meant.

    Elsewhere, as with PEFT's LoRA, one list of names may serve models that have only some of them.

    Raises:
        ValueError: There are such names.
    """
    experts = [f"{name}.{stack}" for name, module in model.named_modules() for stack in expert_stacks(module)]
    if not experts or not config.target_modules or isinstance(config.target_modules, str):
        return
    endings = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    missing = sorted(name for name in config.target_modules if name.rpartition(".")[2] not in endings)
    if missing:
        raise ValueError(
            f"target_modules={missing} name no module of the model. If parts of its experts are meant, such as "
            f"{experts[0]}: {REFUSED_FIELDS['target_parameters']}."
        )


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
