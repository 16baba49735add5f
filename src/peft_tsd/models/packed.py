"""Base layers that do not store the matrix they multiply with, and how that matrix is read from them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..directions.spectrum import BLOCK

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

PLAIN = (nn.Parameter, Tensor, DTensor)


def is_quantized(base: nn.Module) -> bool:
    """Whether a layer stores its weight in another form than the matrix it multiplies with."""
    weight = getattr(base, "weight", None)
    if weight is None:  # linear layers of GPTQ, AWQ, AQLM and HQQ; other modules have no such features
        return hasattr(base, "in_features") or hasattr(base, "infeatures")
    return type(weight) not in PLAIN or weight.dtype not in FLOATS


@torch.no_grad()
def dequantized(base: Any, in_features: int) -> Tensor:
    """The matrix (out, in) that a quantized linear layer multiplies with, in the dtype that its library gives it.

    Args:
        base: The layer.
        in_features: Length of its input.

    Raises:
        ValueError: Its weight is in a form that cannot be read.
    """
    weight: Any = getattr(base, "weight", None)
    kind = type(weight).__name__
    if kind == "Params4bit":
        keep_as_stored(base)
        return cast(Tensor, dequantize_bnb_weight(weight))
    if kind == "Int8Params":
        # PEFT's dequantize_module_weight would lose the scales of a layer on the CPU.
        return weight.data if weight.is_floating_point() else cast(Tensor, dequantize_bnb_weight(weight, base.state))
    if hasattr(base, "W_q"):  # HQQ
        return cast(Tensor, base.dequantize())
    if isinstance(weight, Tensor) and type(weight) not in PLAIN:
        return weight.dequantize()
    if type(base) is nn.Linear:  # float8, which hooks widen for each forward pass
        return cast(Tensor, weight.float())
    return from_outputs(base, in_features)


@torch.no_grad()
def from_outputs(base: Any, in_features: int) -> Tensor:
    """The matrix (out, in) of a linear layer, from its output for each unit vector: exact where its kernel is."""
    like = next((tensor for tensor in stored_tensors(base) if tensor.dtype in FLOATS), None)
    if like is None:
        raise ValueError(f"its quantized weight ({type(base).__name__}) cannot be read; load the base in bfloat16.")
    bias = getattr(base, "bias", None)
    if bias is not None:
        base.bias = None
    try:
        units = (F.one_hot(places, in_features) for places in torch.split(torch.arange(in_features), BLOCK))
        return torch.cat([base(unit.to(like)) for unit in units]).mT
    finally:
        if bias is not None:
            base.bias = bias


def keep_as_stored(model: nn.Module) -> None:
    """Have bitsandbytes leave 4-bit weights in the layout in which they were quantized, and bring them back to it.

    On CPUs with AVX512-BF16 the first evaluation would lay them out anew: with rounded scales, in another order than
    PEFT reads, and so that no gradient passes them any longer.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module.state_dict()  # saves them as they were, and so makes them that


def stored_tensors(base: nn.Module) -> Iterator[Tensor]:
    return chain(base.parameters(), base.buffers())
