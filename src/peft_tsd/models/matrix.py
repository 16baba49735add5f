"""Which layers carry directions, and how each stores the matrix (out, in) it multiplies with: Linear as it is, Conv1D
(GPT-2's) transposed, a convolution with its kernel's other dimensions beside each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from .packed import is_quantized

MATRICES = (nn.Linear, Conv1D, nn.Conv2d)
"""The types of layers whose weight is one matrix."""


def is_transposed(base: nn.Module) -> bool:
    """Whether the weight of `base` is stored as (in, out)."""
    return isinstance(base, Conv1D)


def as_matrix(stored: Tensor, transposed: bool) -> Tensor:
    """A weight as it is stored, as a matrix (out, in): a view of it."""
    return stored.mT if transposed else stored.flatten(1)


def as_stored(matrix: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """A matrix (out, in) as a weight of that `shape` is stored; undoes `as_matrix`."""
    return matrix.mT if transposed else matrix.reshape(tuple(shape))


def matrix_shape(shape: Sequence[int], transposed: bool) -> tuple[int, int]:
    """(out, in) of a weight that is stored in that `shape`."""
    first, *others = shape
    return (others[0], first) if transposed else (first, math.prod(others))


def no_matrix(base: nn.Module) -> str | None:
    """Why the change of a layer is not a change of one matrix, or None where it is."""
    if not isinstance(base, MATRICES):
        stacks = " and ".join(expert_stacks(base))
        experts = f" (its {stacks} hold one matrix for each expert)" if stacks else ""
        return (
            f"it is of type {type(base).__name__}, and only Linear, Conv1D and Conv2d weights have directions here"
            f"{experts}"
        )
    if isinstance(base, NonDynamicallyQuantizableLinear):
        return "nn.MultiheadAttention reads its weight and never calls it, and so an adapter there would not train"
    if isinstance(base, nn.Conv2d) and base.groups != 1:
        return f"it is a convolution in {base.groups} groups, whose LoRA is not a change of the kernel's shape"
    return None


def unsupported(base: nn.Module) -> str | None:
    """Why a layer cannot have directions, or None where it can, with its weight as it stands."""
    if is_quantized(base):
        return f"its weight is quantized ({type(base).__name__}{_dtype(base)}); load the base model in bfloat16"
    if reason := no_matrix(base):
        return reason
    if isinstance(base, nn.Conv2d) and (tuple(base.dilation) != (1, 1) or base.padding_mode != "zeros"):
        return (
            f"it is a convolution with dilation {tuple(base.dilation)} and padding mode {base.padding_mode!r}, "
            "which PEFT's LoRA layers, and so any export, do not follow"
        )
    return None


def _dtype(base: nn.Module) -> str:
    weight = getattr(base, "weight", None)
    return f", {weight.dtype}" if isinstance(weight, Tensor) else ""


def expert_stacks(module: nn.Module) -> list[str]:
    """The names of the parameters of a module that hold one matrix for each of its experts."""
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d, nn.Bilinear)):
        return []
    return [name for name, one in module.named_parameters(recurse=False) if one.ndim == 3 and len(one) > 1]
