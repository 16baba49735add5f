"""The one way to open a saved adapter: its files are checked first, and that they fit, and then PEFT reads them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import AdapterError, one_line
from ..files.adapters import WEIGHTS
from .checking import check_adapter, check_onto


def read_adapter(folder: str | os.PathLike[str]) -> tuple[PeftConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter in a local folder.

    Raises:
        AdapterError: As `check_adapter`.
    """
    config = check_adapter(folder)
    return config, load_file(Path(folder) / WEIGHTS)


def load_adapter(
    base: nn.Module, folder: str | os.PathLike[str], base_name: str, *, is_trainable: bool = False
) -> PeftModel:
    """`base` with an adapter from a local folder; nothing is changed where that is refused.

    Args:
        base: The model in memory.
        folder: The adapter's.
        base_name: What the base is called in messages.
        is_trainable: Whether it is to be trained on.

    Raises:
        AdapterError: As `check_adapter`; or it is for another base.
    """
    check_onto(folder, check_adapter(folder), _skeleton_of(base), base_name)
    return put_onto(base, folder, base_name, is_trainable=is_trainable)


def put_onto(
    base: nn.Module, folder: str | os.PathLike[str], base_name: str, *, is_trainable: bool = False
) -> PeftModel:
    """The second half of `load_adapter`: `check_adapter` and `check_onto` have been called.

    Raises:
        AdapterError: PEFT cannot load it.
    """
    try:
        return PeftModel.from_pretrained(base, str(folder), is_trainable=is_trainable)
    except (ValueError, RuntimeError, OSError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise AdapterError(f"{str(folder)!r} does not load onto {base_name!r}: {one_line(error)}") from None


def _skeleton_of(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device; no number is copied."""
    hollow: dict[int, Any] = {}
    for parameter in model.parameters():
        hollow[id(parameter)] = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=False
        )
    for buffer in model.buffers():
        hollow[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="meta")
    return copy.deepcopy(model, hollow)
