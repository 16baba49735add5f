"""Directions beside a layer of any PEFT method: one mixin, put before the layer's own class.

`layer(x) + U diag(Δσ) Vᵀ x`, with U and V of the base weight's own directions (Si et al., arXiv 2409.01035). As in
`peft_tsd.tuner.layer`, everything has its final shape from the start and there is no branch on the phase.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..directions.spectrum import as_double
from ..distributed.sharded import is_sharded
from ..tuner.directed import LAYERS, DirectedLayer
from ..tuner.held import DashScalars, FixedDirections
from .config import DashConfig


class DashLayer(DirectedLayer):
    """What directions add to a layer of PEFT's. Such a layer is made from one of PEFT's own, by `with_directions`."""

    without_directions: type[BaseTunerLayer]
    """PEFT's own class of this layer."""
    own_prefix: str
    """What the names of the parameters along directions start with."""

    @property
    def dash_scalars(self) -> nn.ModuleDict:
        """The trained scalars, by adapter."""
        return cast(nn.ModuleDict, getattr(self, own_names(self.own_prefix)[0]))

    @property
    def dash_directions(self) -> nn.ModuleDict:
        """What identification fixed, by adapter."""
        return cast(nn.ModuleDict, getattr(self, own_names(self.own_prefix)[1]))

    def add_directions(self, adapter: str, config: DashConfig) -> None:
        """Give `adapter`, which the layer has, its scalars and directions: zeros, until they are identified."""
        out_size, in_size = self.matrix_shape
        base = self.get_base_layer().weight
        n = config.direction_slots
        scalars = DashScalars(n)
        fixed = FixedDirections(
            in_size,
            out_size,
            num_chosen=n,
            num_dash=n,
            num_start=0,
            has_unit=config.dash_unit != "one",
            num_checks=len(config.check_steps),
        )
        if not scalars.weight.is_meta:
            scalars.to(base.device, base.dtype)
            fixed.to(base.device, base.dtype)
        self.dash_scalars[adapter] = scalars
        self.dash_directions[adapter] = fixed
        self.dash_config[adapter] = config

    def carries(self, adapter: str) -> bool:
        return adapter in self.dash_scalars

    def trains(self, adapter: str) -> bool:
        return bool(self.scalars(adapter).weight.requires_grad)

    def settings(self, adapter: str) -> DashConfig:
        return cast(DashConfig, self.dash_config[adapter])

    def fixed(self, adapter: str) -> FixedDirections:
        return cast(FixedDirections, self.dash_directions[adapter])

    def scalars(self, adapter: str) -> DashScalars:
        return cast(DashScalars, self.dash_scalars[adapter])

    def check_layout(self, adapter: str) -> None:
        super().check_layout(adapter)
        if is_sharded(self):
            raise ValueError(
                "its parameters are sharded over processes, and directions beside other methods need them whole; "
                "train with DDP or ZeRO-2, or use TsdConfig."
            )

    def learned_change(self, adapter: str) -> Tensor:
        """The merged weight less the base weight: float64, shape (out, in).

        Raises:
            ValueError: As `merged_without_directions`.
        """
        weight = as_double(self.weight_matrix())
        change: Tensor = self.merged_without_directions(adapter).weight_matrix() - weight
        # What is left of nothing by a method that divides by norms (DoRA), or inverts (OFT), in float32.
        rounding = 4 * torch.finfo(torch.float32).eps * weight.norm()
        return torch.zeros_like(change) if change.norm() <= rounding else change

    @torch.no_grad()
    def merged_without_directions(self, adapter: str) -> DashLayer:
        """A copy of this layer, in float64, with what `adapter` learned without its directions in the base weight.

        Raises:
            ValueError: PEFT cannot merge this layer, or its adapters are merged.
        """
        self.check_unmerged()
        layer: DashLayer = copy.deepcopy(self).eval()
        layer.to(as_double(self.weight_matrix()[:0]).device, torch.float64)
        try:
            super(DashLayer, layer).merge(adapter_names=[adapter])
        except NotImplementedError as error:
            raise ValueError(
                f"PEFT cannot merge {type(self).without_directions.__name__} layers of this kind, and so there is no "
                f"change of the weight to read ({error})."
            ) from None
        return layer

    def dash_factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """`diag(Δσ) Vᵀ`, shape (slots, in), and U, shape (out, slots)."""
        fixed = self.fixed(adapter)
        assert fixed.u is not None
        assert fixed.v is not None
        return self.delta_sigma(adapter)[:, None] * fixed.v, fixed.u

    def dash_weight(self, adapter: str) -> Tensor:
        """`U diag(Δσ) Vᵀ` in the shape and orientation of the base weight."""
        down, up = self.dash_factors(adapter)
        return self.like_base(up @ down)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = super().forward(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        dtype = result.dtype
        if (names := kwargs.get("adapter_names")) is not None:
            # Inference on a batch whose rows use different adapters.
            for adapter in filter(self.carries, set(names)):
                rows = [row for row, name in enumerate(names) if name == adapter]
                result[rows] += self._along(x[rows], adapter).to(dtype)
            return result
        for adapter in filter(self.carries, self.active_adapters):
            result = result + self._along(x, adapter)
        return result.to(dtype)

    def _along(self, x: Tensor, adapter: str) -> Tensor:
        base = self.get_base_layer()
        down, up = self.dash_factors(adapter)
        x = self._cast_input_dtype(x, down.dtype)
        if isinstance(base, nn.Conv2d):
            hidden = F.conv2d(x, down.view(-1, *base.weight.shape[1:]), stride=base.stride, padding=base.padding)
            return F.conv2d(hidden, up[:, :, None, None])
        return F.linear(F.linear(x, down), up)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters, with what they learned along their directions, into the base weight; as PEFT's layers do."""
        if safe_merge:
            for adapter in filter(self.carries, adapter_names or self.active_adapters):
                if not torch.isfinite(self.dash_weight(adapter)).all():
                    raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter} seems to be broken")
        # A method that turns the whole weight must not find in it what lies beside that method.
        self._add_to_base(-1)
        try:
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)
        finally:
            self._add_to_base(1)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        self._add_to_base(-1)
        super().unmerge()
        self._add_to_base(1)  # of what PEFT could not take out (OSF)

    @torch.no_grad()
    def _add_to_base(self, sign: int) -> None:
        for adapter in filter(self.carries, self.merged_adapters):
            weight = self.get_base_layer().weight
            weight.data += sign * self.dash_weight(adapter).to(weight)

    def has_exact_lora(self, adapter: str) -> bool:
        """Whether PEFT can make a LoRA of what `adapter` learned without its directions."""
        return bool(super().supports_lora_conversion(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """False: PEFT's conversion would drop the directions. `export_lora` keeps them."""
        return False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, and cannot be found by its name.
        return _empty, (self.without_directions, self.own_prefix), vars(self)


def own_names(prefix: str) -> tuple[str, str]:
    """What a layer calls its scalars and its directions."""
    return f"{prefix}dash", f"{prefix}directions"


def with_directions(layer: Any, own_prefix: str) -> DashLayer:
    """A layer of PEFT's, which stays the object it is, as one that can also have directions.

    Args:
        layer: The layer.
        own_prefix: What the names of its parameters along directions start with.
    """
    if isinstance(layer, DashLayer):
        return layer
    inner: Any = type(layer)
    layer.__class__ = _class_with_directions(inner, own_prefix)
    scalars, directions = own_names(own_prefix)
    setattr(layer, scalars, nn.ModuleDict())
    setattr(layer, directions, nn.ModuleDict())
    layer.dash_config = {}
    LAYERS.add(layer)
    # On the layer, where PEFT puts those of DoRA.
    layer.adapter_layer_names = (*layer.adapter_layer_names, scalars)
    layer.other_param_names = (*layer.other_param_names, directions, "dash_config")
    return cast(DashLayer, layer)


@functools.cache
def _class_with_directions(inner: Any, own_prefix: str) -> Any:
    names = {"__module__": __name__, "without_directions": inner, "own_prefix": own_prefix}
    return type(f"Dash{inner.__name__}", (DashLayer, inner), names)


def _empty(inner: Any, own_prefix: str) -> Any:
    cls = _class_with_directions(inner, own_prefix)
    return cls.__new__(cls)
