"""Base layers that do not store the matrix they multiply with: quantized, in every form that PEFT's LoRA trains on.

Training needs no weight of a frozen layer, only its output, so that the one thing to find out is the matrix
itself, for identification: in one layer at a time, de-quantized by the library that quantized it, or, for kernels that
offer no such thing, read from the layer's output for the unit vectors. PEFT's own layer of each kind is kept: what
it does to merge into it is done with the whole change of the adapter.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from ..distributed.sharded import is_sharded
from ..errors import one_line
from ..models.packed import dequantized, stored_tensors
from .config import TsdConfig
from .directed import linear_gradient
from .inits import needs_data, reads_base
from .layer import TsdLayer
from .stacked import Factors, add_product

KINDS = {
    "Linear4bit": "bitsandbytes, 4-bit",
    "Linear8bitLt": "bitsandbytes, 8-bit",
    "TorchaoLoraLinear": "torchao",
    "HqqLoraLinear": "HQQ",
    "GPTQLoraLinear": "GPTQ",
    "AwqLoraLinear": "AWQ",
    "AqlmLoraLinear": "AQLM",
    "EetqLoraLinear": "EETQ",
    "IncLoraLinear": "Intel Neural Compressor",
    "Linear": "float8, or a tensor type of its own",
}
"""PEFT's classes for LoRA on quantized layers, and what was quantized with what."""

MERGEABLE = ("Linear4bit", "Linear8bitLt", "TorchaoLoraLinear", "HqqLoraLinear")
"""Those of them that can quantize a merged weight anew."""


class QuantizedLayer(TsdLayer):
    """TSD on a quantized layer, mixed in before PEFT's own class for its kind."""

    base_layer: nn.Module
    without_directions: type[nn.Module]
    """PEFT's own class of this layer."""

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: TsdConfig, **kwargs: Any) -> None:
        init = getattr(config, "init_lora_weights", None)
        if needs_data(init):
            raise ValueError(
                f"{kwargs.get('target_name') or 'A layer'} is quantized ({type(self.get_base_layer()).__name__}), and "
                f"init_lora_weights={init!r} is for full weights: use True or 'pissa', or load "
                "the base model in bfloat16."
            )
        with self._whole_weight() if reads_base(init) else nullcontext():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @contextmanager
    def _whole_weight(self) -> Iterator[None]:
        """A linear layer with the de-quantized weight in place of the base layer, for PEFT to start A and B from."""
        base: nn.Module = self.base_layer
        stand_in = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        stand_in.weight = nn.Parameter(self.weight_matrix(), requires_grad=False)
        self.base_layer = stand_in
        try:
            yield
        finally:
            self.base_layer = base

    def weight_matrix(self) -> Tensor:
        """The frozen base weight as a matrix (out, in), de-quantized anew each time."""
        return dequantized(self.get_base_layer(), self.in_features)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float32  # the widest of those that libraries de-quantize to

    @property
    def weight_device(self) -> torch.device:
        devices = {tensor.device for tensor in stored_tensors(self.get_base_layer())}
        return max(devices, key=lambda device: device.type == "meta")

    def check_layout(self, adapter: str) -> None:
        base = self.get_base_layer()
        if self.reads_weight(adapter) and is_sharded(base):
            raise ValueError(
                f"its quantized weight ({type(base).__name__}) is sharded over processes, and a part of it cannot be "
                "de-quantized; train with DDP, or load the base model in bfloat16."
            )
        super().check_layout(adapter)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def like_base(self, matrix: Tensor) -> Tensor:
        return matrix

    def weight_gradient(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        return linear_gradient(x, gradient, dtype)

    def _add_product(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        return add_product(result, x, factors)

    def check_mergeable(self) -> None:
        """Refuse to merge what PEFT cannot put into a weight of this kind.

        Raises:
            ValueError: It cannot.
        """
        advice = "use export_lora(model, out) for a plain LoRA, which is exact and loads onto the quantized base."
        kind = self.without_directions.__name__
        if kind not in MERGEABLE:
            raise ValueError(f"PEFT cannot merge into weights of this kind ({KINDS[kind]}): {advice}")
        if any(self.lora_bias.values()):
            raise ValueError(f"PEFT merges a lora_bias into a quantized layer without LoRA's scaling: {advice}")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, one after the other: PEFT de-quantizes the weight for each, and quantizes it anew."""
        self.check_mergeable()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if self.carries(adapter):
                with self._same_bias():
                    super().merge(safe_merge=safe_merge, adapter_names=[adapter])

    def unmerge(self) -> None:
        """Take all merged adapters out again: what is left is the base but for the rounding of quantizing it anew."""
        with self._same_bias():
            super().unmerge()

    @contextmanager
    def _same_bias(self) -> Iterator[None]:
        bias = getattr(self.get_base_layer(), "bias", None)
        yield
        if bias is not None:
            self.get_base_layer().bias = bias  # which the new layer that PEFT makes for HQQ lacks

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, and cannot be found by its name.
        return _empty, (self.without_directions,), vars(self)


def quantized_layer(target: nn.Module, adapter_name: str, config: TsdConfig, **kwargs: Any) -> QuantizedLayer | None:
    """The TSD layer for a quantized module, made from the one that PEFT's LoRA has for it; None where it has none.

    Args:
        target: The module.
        adapter_name: Name of the adapter.
        config: Its configuration.
        kwargs: What PEFT gives its dispatchers, with `r` and `lora_alpha`.

    Raises:
        ValueError: PEFT refuses the configuration for this kind of weight.
    """
    blank = copy.copy(config)
    blank.init_lora_weights = False
    # PEFT asks this of the whole model; a layer that was put in by hand is as good.
    kwargs = {**kwargs, "loaded_in_4bit": True, "loaded_in_8bit": True}
    # Without memory, so that no random number is drawn twice: A and B are made below, as on any other layer.
    try:
        with torch.device("meta"):
            layer: Any = LoraModel._create_new_module(blank, adapter_name, target, **kwargs)
    except (ValueError, TypeError, NotImplementedError) as error:
        name = kwargs.get("target_name") or type(target).__name__
        raise ValueError(f"{name} cannot carry a {config.method} adapter. PEFT says: {one_line(error)}") from None
    base: Any = layer.get_base_layer()
    is_integer = type(base) is nn.Linear and type(base.weight) is nn.Parameter and not base.weight.is_floating_point()
    if type(layer).__name__ not in KINDS or is_integer:  # a plain layer cannot compute with integers
        return None
    inner: Any = type(layer)
    layer.__class__ = _class_on(inner)
    r, lora_alpha = kwargs.pop("r"), kwargs.pop("lora_alpha")
    layer.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
    return cast(QuantizedLayer, layer)


@functools.cache
def _class_on(inner: Any) -> Any:
    names = {"__module__": __name__, "without_directions": inner}
    return type(f"Tsd{inner.__name__}", (QuantizedLayer, inner), names)


def _empty(inner: Any) -> Any:
    cls = _class_on(inner)
    return cls.__new__(cls)
