"""The adapter layers: LoRA, plus scalars along fixed directions, computed as one LoRA of a higher rank.

Every layer computes `W_eff = W + B'·A'` with the stacked factors of `stacked` from the first step on (Si et al., arXiv
2409.01035). Until the directions are identified U, V, Δσ, A₀ and B₀ are zeros of their final shape: the
optimizer and distributed wrappers hold the parameters they will always hold, and there is one forward, with no branch
on the phase.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..directions.change import LowRank, check_matrix
from ..directions.definitions import TaskSpecificDirections
from ..distributed.sharded import assign, is_sharded, shape_of, whole
from ..models.offloaded import brought_in, computes_on
from .config import TsdConfig
from .directed import LAYERS, DirectedLayer, Identified
from .held import DashScalars, FixedDirections, sent_by_accelerate
from .stacked import Factors, adapted_linear, add_product, autocasts, is_bare

INIT_ROW_NORM = 3**-0.5
"""Of the rows of A in PEFT's usual start, which draws from U(-1/√in, 1/√in): with it, a start from the gradient turns
as fast as LoRA's."""


class TsdLayer(DirectedLayer, LoraLayer):
    """What LoRA-Dash, LoRA-Init and LoRA-TSD add to a LoRA layer of PEFT, mixed in before it."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_dash")
    other_param_names = (*LoraLayer.other_param_names, "lora_directions", "tsd_config")

    shares_weight = False
    """Whether another module has the same weight: a tied lm_head, whose weight is the embedding's."""
    _shared: tuple[nn.Parameter, ...] = ()  # that weight, while the layer has a copy to merge into

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: TsdConfig, **kwargs: Any) -> None:
        if not isinstance(config, TsdConfig):
            raise TypeError(
                f"This layer carries a TSD adapter and cannot take one of type {type(config).__name__} beside it. "
                "Export one of them with export_lora and load that, or use a second model."
            )
        if not hasattr(self, "lora_dash"):
            # PEFT's constructors call update_layer themselves, before a subclass could add anything after them.
            self.lora_dash = nn.ModuleDict()
            self.lora_directions = nn.ModuleDict()
            self.tsd_config: dict[str, TsdConfig] = {}
            self.register_state_dict_post_hook(sent_by_accelerate)
            LAYERS.add(self)
        self.check_unmerged(adapter_name)
        out_size, in_size = self.matrix_shape
        if config.starts_from_directions and r > min(out_size, in_size):
            raise ValueError(
                f"{kwargs.get('target_name') or type(self.get_base_layer()).__name__} has "
                f"{min(out_size, in_size)} directions, fewer than r={r} that {config.method} starts from. "
                "Give it a smaller rank with rank_pattern, or leave it out of target_modules."
            )
        num_dash = config.direction_slots if config.learns_along_directions else 0
        num_start = r if config.starts_from_directions else 0
        if num_dash:
            self.lora_dash[adapter_name] = DashScalars(num_dash)
        self.lora_directions[adapter_name] = FixedDirections(
            in_size,
            out_size,
            num_chosen=max(num_dash, num_start),
            num_dash=num_dash,
            num_start=r if config.subtracts_init or (config.subtracts_start and not config.joins_start) else 0,
            num_joined=r if config.joins_start else 0,
            num_kept=r if config.keeps_prelaunch else 0,
            has_unit=config.dash_unit != "one",
            num_checks=len(config.check_steps),
            starts_apart=config.subtracts_init,
        )
        self.tsd_config[adapter_name] = config
        base = self.get_base_layer()
        lost = (
            config.init_is_saved and str(config.init_lora_weights).startswith("corda") and not hasattr(base, "eigens")
        )
        if config.subtracts_init and (lost or self.fixed(adapter_name).step.is_meta):
            # A and B, and what they started from, are read from a file after this.
            config = copy.copy(config)
            config.init_lora_weights = True
        # Last, because it moves every part of the adapter to the base layer's device and dtype.
        with _copy_of_weight(base) if config.subtracts_init else nullcontext():
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if config.subtracts_init:
            self._let_learn(adapter_name)
            self._fix_start(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Beside an offloaded weight PEFT leaves an adapter without numbers, which no optimizer could train.
        super()._move_adapter_to_device_of_base_layer(adapter_name, device or computes_on(self.get_base_layer()))

    def carries(self, adapter: str) -> bool:
        return adapter in self.lora_A

    def trains(self, adapter: str) -> bool:
        # LoRA-FA freezes A.
        modules = (self.lora_A, self.lora_B, self.lora_dash)
        return any(p.requires_grad for module in modules if adapter in module for p in module[adapter].parameters())

    def settings(self, adapter: str) -> TsdConfig:
        return self.tsd_config[adapter]

    def fixed(self, adapter: str) -> FixedDirections:
        return cast(FixedDirections, self.lora_directions[adapter])

    def scalars(self, adapter: str) -> DashScalars:
        return cast(DashScalars, self.lora_dash[adapter])

    def learned_change(self, adapter: str) -> LowRank:
        """LoRA's own change (B, A, scaling), as matrices (out, r) and (r, in), detached; less what it started from.

        Where they are sharded, every process must ask.
        """
        a, b = (whole(factors[adapter].weight).flatten(1) for factors in (self.lora_A, self.lora_B))
        fixed = self.fixed(adapter)
        if self.tsd_config[adapter].subtracts_init and fixed.a0 is not None and fixed.b0 is not None:
            a, b = torch.cat([a, -fixed.a0]), torch.cat([b, fixed.b0], 1)
        return b, a, self.scaling[adapter]

    def factors(self, adapter: str) -> Factors:
        """The whole effective change, by its parts.

        Raises:
            ValueError: Opacus is to take a gradient for each row, which it does where modules are called; A and B are
                used without.
        """
        if self.training and hasattr(self.lora_A[adapter].weight, "_forward_counter"):
            raise ValueError(
                "Opacus' GradSampleModule takes no gradients of TSD layers, whose A and B are not called as modules: "
                "take them with torch.func (vmap of grad), or train PEFT's own LoRA."
            )
        fixed = self.fixed(adapter)
        a = self.lora_A[adapter].weight.flatten(1)

        def read(buffer: Tensor | None) -> Tensor | None:
            # FSDP's mixed precision, diffusers' cast_training_params and others cast parameters alone.
            return None if buffer is None else buffer.to(a.dtype)

        c = None
        if fixed.u is not None:
            # PEFT's set_scale and scale_layer turn the strength of a whole adapter up and down through `scaling`.
            delta_sigma = self.delta_sigma(adapter, self._strength(adapter)).to(a.dtype)
            c = fixed.coefficients(delta_sigma, self.scaling[adapter])
        return Factors(
            a=a,
            b=self.lora_B[adapter].weight.flatten(1),
            scaling=self.scaling[adapter],
            c=c,
            u=read(fixed.u),
            v=read(fixed.v),
            a0=read(fixed.a0),
            b0=read(fixed.b0),
            kept_a=read(fixed.kept_a),
            kept_b=read(fixed.kept_b),
        )

    def _strength(self, adapter: str) -> float:
        r, alpha = self.r[adapter], self.lora_alpha[adapter]
        initial = alpha / (math.sqrt(r) if self.use_rslora[adapter] else r)
        return self.scaling[adapter] / initial if initial else 1.0

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The whole effective change of the base weight, in its shape and orientation, in the adapter's dtype.

        Args:
            adapter: Name of the adapter.
        """
        factors = self.factors(adapter)
        down, up = factors.down(), factors.up()
        dtype = down.dtype
        if down.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            down, up = down.float(), up.float()  # half-precision products are slow on CPUs
        return self.like_base(up @ down).to(dtype)

    def _add_product(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        """`result + ΔW x` for an input and an output of the base layer."""
        raise NotImplementedError

    def _add_adapter(self, result: Tensor, x: Tensor, adapter: str) -> Tensor:
        x = self._cast_input_dtype(x, self.lora_A[adapter].weight.dtype)
        result = self._add_product(result, self.lora_dropout[adapter](x), self.factors(adapter))
        if self.lora_bias[adapter]:
            b = self.lora_B[adapter]
            result = result + (b.bias * self.scaling[adapter]).view(-1, *(1,) * (b.weight.ndim - 2))
        return result

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling() and any(a.weight.is_meta for a in self.lora_A.values()):
            # Accelerate brings in what is called, and A and B are not.
            parts = (self.lora_A, self.lora_B, self.lora_dash, self.lora_directions)
            with brought_in(one for part in parts for one in part.values()):
                return self._forward(x, *args, **kwargs)
        return self._forward(x, *args, **kwargs)

    def _forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.merged and self.disable_adapters:
            self.unmerge()
        adapted = not self.merged and not self.disable_adapters
        if adapted and adapter_names is None and not args and not kwargs:
            stacked = self._whole_forward(x)
            if stacked is not None:
                return stacked
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not adapted:
            return result
        if adapter_names is not None:
            return self._add_by_row(result, x, adapter_names)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if adapter in self.lora_A:
                result = self._add_adapter(result, x, adapter)
        return result.to(dtype)

    def _whole_forward(self, x: Tensor) -> Tensor | None:
        """Base layer and adapter in one step, where that is the same; None elsewhere."""
        return None

    def _add_by_row(self, result: Tensor, x: Tensor, adapter_names: list[str]) -> Tensor:
        # Inference on a batch whose rows use different adapters.
        for adapter in set(adapter_names):
            if adapter in self.lora_A:
                rows = [row for row, name in enumerate(adapter_names) if name == adapter]
                result[rows] = self._add_adapter(result[rows], x[rows], adapter).to(result.dtype)
        return result

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the base weight as PEFT does; a shared one is copied first, and left alone."""
        base = self.get_base_layer()
        if self.shares_weight and not self._shared and any(map(self.carries, adapter_names or self.active_adapters)):
            self._shared = (base.weight,)
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        """Take all merged adapters out of the base weight again."""
        super().unmerge()
        if self._shared:
            (self.get_base_layer().weight,), self._shared = self._shared, ()

    def set_scale(self, adapter: str, scale: float) -> None:
        """As PEFT's; refused while the adapter is merged."""
        self.check_unmerged(adapter)
        super().set_scale(adapter, scale)

    def scale_layer(self, scale: float) -> None:
        """As PEFT's; refused while an adapter is merged."""
        if scale != 1:
            self.check_unmerged()
        super().scale_layer(scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """As PEFT's; refused while an adapter is merged."""
        if scale != 1:
            self.check_unmerged()
        super().unscale_layer(scale)

    def rates_of(self, adapter: str) -> tuple[nn.Parameter | None, nn.Parameter | None, nn.Parameter | None]:
        scalars = self.scalars(adapter).weight if adapter in self.lora_dash else None
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight, scalars

    def restarted(self, adapter: str) -> list[nn.Parameter]:
        config = self.tsd_config[adapter]
        if not config.starts_from_directions:
            return []
        a, b = self.lora_A[adapter], self.lora_B[adapter]
        # A bias has no direction, and goes on where what was learned is kept.
        return [a.weight, b.weight] if config.keeps_prelaunch else [*a.parameters(), *b.parameters()]

    def _start(self, adapter: str, chosen: TaskSpecificDirections) -> tuple[Tensor | None, Tensor | None]:
        config = self.tsd_config[adapter]
        if not config.starts_from_directions:
            return None, None
        r = self.r[adapter]
        if config.direction_source == "gradient":
            return INIT_ROW_NORM * chosen.v[:, :r].mT, torch.zeros_like(chosen.u[:, :r])
        u, sigma, v = chosen.u[:, :r], chosen.sigma[:r], chosen.v[:, :r]
        if config.init_reading == "svd":
            # Where σ is nothing, A and B would both be zero, and so would be their gradients, for ever.
            learns = sigma > config.eps
            root = (sigma / self.scaling[adapter]).sqrt()
            return torch.where(learns, root, 1)[:, None] * v.mT, u * torch.where(learns, root, 0)
        return v.mT, torch.zeros_like(u)

    def stepped(self, adapter: str) -> nn.Parameter:
        if not self.tsd_config[adapter].starts_from_directions:
            return super().stepped(adapter)
        parameter: nn.Parameter = self.lora_B[adapter].weight
        return parameter

    def _descent(self, adapter: str, u: Tensor) -> Tensor:
        if not self.tsd_config[adapter].starts_from_directions:
            return super()._descent(adapter, u)
        # B can turn away from what the first step got wrong, which fixed directions cannot.
        b = torch.zeros(u.shape[0], self.r[adapter])
        b[:, : u.shape[1]] = u[:, : self.r[adapter]] / -(self.scaling[adapter] * INIT_ROW_NORM)
        return b.view(shape_of(self.lora_B[adapter].weight))

    @torch.no_grad()
    def fill(self, adapter: str, found: Identified) -> None:
        if found.start_a is not None and found.start_b is not None:
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            start_a, start_b = whole(a).flatten(1).clone(), torch.zeros_like(whole(b).flatten(1))
            # Where fewer than r directions changed, the other rows are A's own, and their B is zero.
            start_a[: len(found.start_a)], start_b[:, : len(found.start_a)] = found.start_a, found.start_b
            fixed = self.fixed(adapter)
            if fixed.kept_a is not None and fixed.kept_b is not None:
                fixed.kept_a.copy_(whole(a).flatten(1))
                fixed.kept_b.copy_(whole(b).flatten(1))
            assign(a, start_a.view(shape_of(a)))
            assign(b, start_b.view(shape_of(b)))
            if self.lora_bias[adapter] and fixed.kept_a is None:
                assign(self.lora_B[adapter].bias, torch.zeros(()))
            self._fix_start(adapter)
        super().fill(adapter, found)
        if self.tsd_config[adapter].joins_start:
            # From the parameters, as `_fix_start`.
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            self.fixed(adapter).join_start(whole(a).flatten(1), whole(b).flatten(1))

    @torch.no_grad()
    def _let_learn(self, adapter: str) -> None:
        """Start those rows of A anew that would stay zero, as B does: those of PiSSA on a weight of zero."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        if a.numel() and not a.is_meta:
            stuck = (
                torch.maximum(a.flatten(1).norm(dim=1), b.flatten(1).norm(dim=0)) < self.settings(adapter).eps ** 0.5
            )
            if stuck.any():  # otherwise nothing is drawn, and PEFT's own draws stay those of LoRA
                a[stuck] = nn.init.kaiming_uniform_(torch.empty_like(a), a=math.sqrt(5))[stuck]

    @torch.no_grad()
    def _fix_start(self, adapter: str) -> None:
        fixed = self.fixed(adapter)
        if fixed.a0 is not None and fixed.b0 is not None:
            # From the parameters, so that both sides of B·A − B₀·A₀ carry the same rounding.
            fixed.a0.copy_(whole(self.lora_A[adapter].weight).flatten(1))
            fixed.b0.copy_(whole(self.lora_B[adapter].weight).flatten(1))

    def check_identifiable(self, adapter: str) -> None:
        super().check_identifiable(adapter)
        if not is_sharded(self):
            b, a, _ = self.learned_change(adapter)
            for name, matrix in (("LoRA's B", b), ("LoRA's A", a)):
                check_matrix(matrix, name)


@contextmanager
def _copy_of_weight(base: Any) -> Iterator[None]:
    """A copy in place of the weight of `base`, for what would write to it."""
    weight = base.weight.data
    base.weight.data = weight.clone()
    try:
        yield
    finally:
        base.weight.data = weight


class Linear(TsdLayer, lora.Linear):
    """TSD on `nn.Linear` and on transformers' `Conv1D`, which stores its weight as (in, out)."""

    def _add_product(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        return add_product(result, x, factors)

    def _whole_forward(self, x: Tensor) -> Tensor | None:
        base = self.base_layer
        adapters = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if torch.compiler.is_compiling() or len(adapters) != 1 or not is_bare(base):
            return None
        (adapter,) = adapters
        weight, bias = base.weight, base.bias
        if self.lora_bias[adapter] or (self.training and not isinstance(self.lora_dropout[adapter], nn.Identity)):
            return None
        if autocasts(x.device.type) or not x.dtype == weight.dtype == self.lora_A[adapter].weight.dtype:
            return None
        return adapted_linear(x, weight, bias, self.factors(adapter))


class Conv2d(TsdLayer, lora.Conv2d):
    """TSD on `nn.Conv2d`, its kernel read as a matrix (out, in·kh·kw)."""

    def _add_product(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        base = self.get_base_layer()
        kernel = factors.down().view(-1, *base.weight.shape[1:])
        hidden = F.conv2d(x, kernel, stride=base.stride, padding=base.padding)
        return result + F.conv2d(hidden, factors.up()[:, :, None, None])
