"""The adapter layers: LoRA, plus scalars along fixed directions, computed as one LoRA of a higher rank.

Every layer computes `W_eff = W + B'·A'` with the stacked factors of `peft_tsd.stacked` from the first step on (Si et
al., arXiv 2409.01035). Until the directions are identified U, V, Δσ, A₀ and B₀ are zeros of their final shape: the
optimizer and distributed wrappers hold the parameters they will always hold, and there is one forward, with no branch
on the phase.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from .config import DirectionSettings, TsdConfig
from .directions import (
    LowRank,
    TaskSpecificDirections,
    chance_rate,
    change_norm,
    check_change,
    check_matrix,
    directions_on,
    ranked,
    rates_on,
)
from .distributed import gathered, is_sharded, shape_of, whole, write
from .spectrum import Spectrum
from .stacked import Factors, adapted_linear, add_product, autocasts


class DashScalars(nn.Module):
    """The trained scalars θ of one layer, shape (slots,); the change along direction j is `ratio · θ_j`.

    There are `TsdConfig.direction_slots` of them. One without a direction stays zero: its u and v are.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots))


class FixedDirections(nn.Module):
    """What identification leaves in one layer. Frozen parameters, because DDP sends buffers around at every step.

    Convolution kernels are flattened: `in` is in·kh·kw.

    Attributes:
        step: Optimizer steps taken by this adapter, int64, shape (1,).
        identified_at: How many they were when the directions were identified; -1 before; int64, shape (1,).
        indices: Positions in the spectrum, highest rate first; int64, shape (m,), with m the larger of r and the slots
            of the dash as the method uses them. -1 before identification, and where the weight has fewer. Of a global
            budget the layer may have got only the first few.
        rates, sigma: Change rates and singular values of those, shape (m,).
        unit: What Δσ is measured in, shape (slots,); None where it is 1.
        u, v: Directions of the dash, shapes (out, slots) and (slots, in), zero where there is none; None for
            LoRA-Init.
        a0, b0: Starting factors, shapes (r, in) and (out, r); None but for the `"svd"` reading of LoRA-Init and for
            LoRA-Dash from PiSSA and its like.
        candidates: The directions that the last check of an automatic pre-launch found, highest rate first; int64,
            -1 before; None in a pre-launch of fixed length.
        agreement: What each of its checks found, over all layers, in the order of `TsdConfig.check_steps`; -1 before.
        copies: Of these, in the process that saves, where ZeRO-3 has split them (`peft_tsd.zero_checkpoints`).
    """

    copies: dict[str, Tensor] | None = None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        num_chosen: int,
        num_dash: int,
        num_start: int,
        *,
        has_unit: bool,
        num_checks: int,
    ) -> None:
        super().__init__()

        def fixed(*shape: int, dtype: torch.dtype | None = None, fill: float = 0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, fill, dtype=dtype or torch.get_default_dtype()), requires_grad=False)

        self.step = fixed(1, dtype=torch.int64)
        self.identified_at = fixed(1, dtype=torch.int64, fill=-1)
        self.indices = fixed(num_chosen, dtype=torch.int64, fill=-1)
        self.rates = fixed(num_chosen)
        self.sigma = fixed(num_chosen)
        self.unit = fixed(num_dash) if num_dash and has_unit else None
        self.u = fixed(out_size, num_dash) if num_dash else None
        self.v = fixed(num_dash, in_size) if num_dash else None
        self.a0 = fixed(num_start, in_size) if num_start else None
        self.b0 = fixed(out_size, num_start) if num_start else None
        self.candidates = fixed(num_chosen, dtype=torch.int64, fill=-1) if num_checks else None
        self.agreement = fixed(num_checks, fill=-1) if num_checks else None

    @property
    def identified(self) -> bool:
        """Whether the directions have been chosen: pre-launch is over. Where it is sharded, every process must ask."""
        return bool(whole(self.indices)[0] >= 0)


def used_columns(u: Tensor) -> Tensor:
    """Which columns of U (out, slots) hold a direction: bool, shape (slots,). Singular vectors are not zero."""
    return u.ne(0).any(0)


class Identified(NamedTuple):
    """Everything the transition writes into one layer, computed before anything is written."""

    chosen: TaskSpecificDirections
    unit: Tensor | None
    start_a: Tensor | None
    start_b: Tensor | None
    chance: float = 0.0
    """For a global budget: the change rate that num_directions of the layer would exceed under a random change."""

    def limited_to(self, num_dash: int) -> Identified:
        """The same with the first `num_dash` directions alone for the dash."""
        chosen = self.chosen
        return self._replace(
            chosen=chosen._replace(u=chosen.u[:, :num_dash], v=chosen.v[:, :num_dash]),
            unit=None if self.unit is None else self.unit[:num_dash],
        )


def _padded(value: Tensor, shape: torch.Size, fill: float = 0) -> Tensor:
    padded = value.new_full(shape, fill)
    padded[tuple(slice(size) for size in value.shape)] = value
    return padded


def linear_gradient(x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """`Σ dy xᵀ` of a linear layer, shape (out, in), from its input (..., in) and its output's gradient (..., out)."""
    return gradient.reshape(-1, gradient.shape[-1]).to(dtype).mT @ x.reshape(-1, x.shape[-1]).to(dtype)


# A mixin without a base class can also be given to a layer that is there already (see `peft_tsd.dash`).
_Mixin: Any = BaseTunerLayer if TYPE_CHECKING else object


class DirectedLayer(_Mixin):
    """A layer of PEFT's with task-specific directions: how they are identified, and what is kept of them.

    Mixed in before a layer class of PEFT's, from which it takes the rest.
    """

    def carries(self, adapter: str) -> bool:
        """Whether the layer has `adapter`."""
        raise NotImplementedError

    def trains(self, adapter: str) -> bool:
        """Whether `adapter` is trained; the layer must carry it."""
        raise NotImplementedError

    def settings(self, adapter: str) -> DirectionSettings:
        """The configuration of `adapter`."""
        raise NotImplementedError

    def fixed(self, adapter: str) -> FixedDirections:
        """What identification fixed for `adapter` in this layer."""
        raise NotImplementedError

    def scalars(self, adapter: str) -> DashScalars:
        """The trained scalars of `adapter` along its directions."""
        raise NotImplementedError

    def weight_matrix(self) -> Tensor:
        """The frozen base weight as a matrix (out, in), a view of it."""
        return self._as_matrix(self.get_base_layer().weight)

    def weight_in(self, owner: int) -> Tensor | None:
        """The same in the process `owner` alone; None in the others. Where it is sharded, every process must ask.

        Raises:
            ValueError: As `distributed.gathered`.
        """
        base = self.get_base_layer()
        if not is_sharded(base):
            return self.weight_matrix()
        together = gathered(base.weight, owner)
        return None if together is None else self._as_matrix(together)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.get_base_layer(), Conv1D) else weight.flatten(1)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        base = self.get_base_layer()
        first, *others = shape_of(base.weight)
        return (others[0], first) if isinstance(base, Conv1D) else (first, math.prod(others))

    @property
    def weight_dtype(self) -> torch.dtype:
        """The dtype of the weight as a matrix."""
        dtype: torch.dtype = self.get_base_layer().weight.dtype
        return dtype

    @property
    def weight_device(self) -> torch.device:
        """Where the weight is; "meta" where it is offloaded."""
        device: torch.device = self.get_base_layer().weight.device
        return device

    @property
    def cost(self) -> float:
        """What factorizing the weight costs, in the unit of one multiplication: `min(out, in)² · max(out, in)`."""
        short, long = sorted(self.matrix_shape)
        return short**2 * long

    def like_base(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) in the shape and orientation of the base weight."""
        base = self.get_base_layer()
        return matrix.T if isinstance(base, Conv1D) else matrix.view_as(base.weight)

    def learned_change(self, adapter: str) -> Tensor | LowRank:
        """ΔW of the pre-launch, detached: dense, shape (out, in), or as factors (B, A, scaling)."""
        raise NotImplementedError

    def restarted(self, adapter: str) -> list[nn.Parameter]:
        """The parameters that start anew at the transition."""
        return []

    def delta_sigma(
        self, adapter: str, strength: float = 1.0, read: Callable[[Tensor], Tensor] = lambda tensor: tensor
    ) -> Tensor:
        """Δσ: the learned change along each direction of the dash, shape (slots,); times `strength`.

        Args:
            adapter: Name of the adapter.
            strength: A factor.
            read: How parameters are read: `distributed.whole`, outside of a forward pass.
        """
        theta = read(self.scalars(adapter).weight)
        scale = strength * self.settings(adapter).dash_lr_ratio
        unit = self.fixed(adapter).unit
        if unit is not None:
            theta = read(unit) * theta
        return theta if scale == 1 else scale * theta

    def weight_gradient(self, x: Tensor, gradient: Tensor, dtype: torch.dtype) -> Tensor:
        """`Σ dy xᵀ`, shape (out, in): what a loss's `gradient` of this layer's output says of the base weight.

        Args:
            x: The layer's input.
            gradient: Of the layer's output.
            dtype: To compute in.

        Raises:
            ValueError: The layer is neither Linear, Conv1D nor Conv2d.
        """
        base = self.get_base_layer()
        if isinstance(base, (nn.Linear, Conv1D)):
            return linear_gradient(x, gradient, dtype)
        if not isinstance(base, nn.Conv2d):
            raise ValueError(f"Directions are not found from gradients in layers of type {type(base).__name__}.")
        with torch.enable_grad():
            kernel = torch.zeros_like(base.weight, dtype=dtype, requires_grad=True)
            out = F.conv2d(x.detach().to(dtype), kernel, stride=base.stride, padding=base.padding)
            (found,) = torch.autograd.grad(out, kernel, gradient.to(dtype))
        return found.flatten(1)

    @torch.no_grad()
    def identify(
        self,
        adapter: str,
        change: Tensor | LowRank | None = None,
        spectrum: Spectrum | None = None,
        weight: Tensor | None = None,
    ) -> Identified:
        """Find the task-specific directions of this layer; writes nothing.

        Args:
            adapter: Name of the adapter.
            change: The change that tells them, (out, in) or its factors; what pre-launch has learned by default.
            spectrum: The factorization of the base weight, where it is there already.
            weight: The base weight, (out, in), where the layer's own is sharded.

        Raises:
            ValueError: The change or the base weight holds NaN or Inf.
        """
        config = self.settings(adapter)
        fixed = self.fixed(adapter)
        weight = self.weight_matrix() if weight is None else weight
        change = self.learned_change(adapter) if change is None else change
        check_change(weight, change)
        spectrum = spectrum or Spectrum(weight)
        rates = rates_on(spectrum, change, config.eps)
        # Another one for each layer and run, and the same in every process.
        learned = change if isinstance(change, Tensor) else change[1]
        seed = zlib.crc32(learned.float().cpu().numpy().tobytes())
        order = ranked(rates, spectrum.sigma + config.eps, config.selection, seed)
        chosen = directions_on(spectrum, rates, order[: shape_of(fixed.indices)[0]], like=weight)
        chance = 0.0
        if config.direction_budget == "global":
            entry = change_norm(change) / weight.numel() ** 0.5
            chance = chance_rate(spectrum.sigma.cpu(), entry, config.num_directions, config.eps)
        unit = None
        if fixed.unit is not None:
            mean_square = weight.float().square().sum() / min(weight.shape)  # of the singular values
            slots = shape_of(fixed.unit)[0]
            unit = mean_square.sqrt().expand(slots) if config.dash_unit == "layer" else chosen.sigma[:slots]
        start_a, start_b = self._start(adapter, chosen)
        # Only the chosen few go on, and off an accelerator, until every layer is done and all can be written at once.
        num_dash = 0 if fixed.u is None else shape_of(fixed.u)[1]
        chosen = chosen._replace(u=chosen.u[:, :num_dash].clone(), v=chosen.v[:, :num_dash].clone())
        unit, start_a, start_b = (None if x is None else x.cpu() for x in (unit, start_a, start_b))
        return Identified(TaskSpecificDirections(*(x.cpu() for x in chosen)), unit, start_a, start_b, chance)

    def _start(self, adapter: str, chosen: TaskSpecificDirections) -> tuple[Tensor | None, Tensor | None]:
        """The factors that a method restarts from, if it does."""
        return None, None

    @torch.no_grad()
    def fill(self, adapter: str, found: Identified) -> None:
        """Write what `identify` found: from here on the directions are part of the layer."""
        fixed = self.fixed(adapter)
        chosen = found.chosen
        # Fewer than asked for where the weight has fewer; the rest stays as it is.
        pairs = [(fixed.u, chosen.u), (fixed.v, chosen.v.mT), (fixed.unit, found.unit)]
        for parameter, value in (*pairs, (fixed.rates, chosen.rates), (fixed.sigma, chosen.sigma)):
            if parameter is not None and value is not None:
                write(parameter, _padded(value, shape_of(parameter)))
        write(fixed.identified_at, whole(fixed.step))
        write(fixed.indices, _padded(chosen.indices, shape_of(fixed.indices), -1))

    def check_layout(self, adapter: str) -> None:
        """Refuse a layer whose weight cannot be read, without a look at its numbers.

        Raises:
            ValueError: It is not in memory, or flattened.
        """
        if self.weight_device.type == "meta":
            raise ValueError(
                "its base weight is offloaded (on the meta device); keep the weights of adapted layers in memory."
            )
        weight = getattr(self.get_base_layer(), "weight", None)
        if weight is not None and len(shape_of(weight)) < 2:
            raise ValueError(
                f"its base weight is flattened to shape {tuple(weight.shape)}, as FSDP1 does; use fsdp_version: 2."
            )

    def check_identifiable(self, adapter: str) -> None:
        """Refuse a layer whose directions cannot be identified. The numbers of a sharded one are not looked at.

        Raises:
            ValueError: As `check_layout`; or its weight holds NaN or Inf.
        """
        self.check_layout(adapter)
        if not is_sharded(self):
            check_matrix(self.weight_matrix(), "the base weight")


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
            num_start=r if config.subtracts_init or (num_start and config.init_reading == "svd") else 0,
            has_unit=config.dash_unit != "one",
            num_checks=len(config.check_steps),
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
            self._fix_start(adapter_name)

    def carries(self, adapter: str) -> bool:
        return adapter in self.lora_A

    def trains(self, adapter: str) -> bool:
        return bool(self.lora_A[adapter].weight.requires_grad)

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
            a, b = torch.cat([a, -whole(fixed.a0)]), torch.cat([b, whole(fixed.b0)], 1)
        return b, a, self.scaling[adapter]

    def factors(self, adapter: str) -> Factors:
        """The whole effective change, by its parts."""
        fixed = self.fixed(adapter)
        delta_sigma = None
        if fixed.u is not None:
            # PEFT's set_scale and scale_layer turn the strength of a whole adapter up and down through `scaling`.
            delta_sigma = self.delta_sigma(adapter, self._strength(adapter))
        return Factors(
            a=self.lora_A[adapter].weight.flatten(1),
            b=self.lora_B[adapter].weight.flatten(1),
            scaling=self.scaling[adapter],
            delta_sigma=delta_sigma,
            u=fixed.u,
            v=fixed.v,
            a0=fixed.a0,
            b0=fixed.b0,
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
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.merged and self.disable_adapters:
            self.unmerge()
        adapted = not self.merged and not self.disable_adapters
        if adapted and adapter_names is None and not args and not kwargs:
            whole = self._whole_forward(x)
            if whole is not None:
                return whole
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

    def restarted(self, adapter: str) -> list[nn.Parameter]:
        if not self.tsd_config[adapter].starts_from_directions:
            return []
        return [*self.lora_A[adapter].parameters(), *self.lora_B[adapter].parameters()]

    def _start(self, adapter: str, chosen: TaskSpecificDirections) -> tuple[Tensor | None, Tensor | None]:
        config = self.tsd_config[adapter]
        if not config.starts_from_directions:
            return None, None
        r = self.r[adapter]
        u, sigma, v = chosen.u[:, :r], chosen.sigma[:r], chosen.v[:, :r]
        if config.init_reading == "svd":
            root = (sigma / self.scaling[adapter]).sqrt()
            return root[:, None] * v.mT, u * root
        return v.mT, torch.zeros_like(u)

    @torch.no_grad()
    def fill(self, adapter: str, found: Identified) -> None:
        if found.start_a is not None and found.start_b is not None:
            a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
            write(a, found.start_a.view(shape_of(a)))
            write(b, found.start_b.view(shape_of(b)))
            if self.lora_bias[adapter]:
                write(self.lora_B[adapter].bias, torch.zeros(()))
            self._fix_start(adapter)
        super().fill(adapter, found)

    @torch.no_grad()
    def _fix_start(self, adapter: str) -> None:
        fixed = self.fixed(adapter)
        if fixed.a0 is not None and fixed.b0 is not None:
            # From the parameters, so that both sides of B·A − B₀·A₀ carry the same rounding.
            write(fixed.a0, whole(self.lora_A[adapter].weight).flatten(1))
            write(fixed.b0, whole(self.lora_B[adapter].weight).flatten(1))

    def check_identifiable(self, adapter: str) -> None:
        if not is_sharded(self):
            b, a, _ = self.learned_change(adapter)
            for name, matrix in (("LoRA's B", b), ("LoRA's A", a)):
                check_matrix(matrix, name)
        super().check_identifiable(adapter)


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
        if torch.compiler.is_compiling() or len(adapters) != 1 or not _is_bare(base):
            return None
        (adapter,) = adapters
        weight, bias = base.weight, base.bias
        if self.lora_bias[adapter] or (self.training and not isinstance(self.lora_dropout[adapter], nn.Identity)):
            return None
        if autocasts(x.device.type) or not x.dtype == weight.dtype == self.lora_A[adapter].weight.dtype:
            return None
        return adapted_linear(x, weight, bias, self.factors(adapter))


def _is_bare(base: nn.Module) -> bool:
    """Whether calling `base` is `F.linear` with a frozen weight and nothing more: no hook sees its input or output."""
    return (
        type(base) is nn.Linear
        and "forward" not in vars(base)  # where Accelerate's hooks put theirs
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not _has_any_global_hook()  # type: ignore[no-untyped-call]
        and type(base.weight.data) is Tensor
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
    )


class Conv2d(TsdLayer, lora.Conv2d):
    """TSD on `nn.Conv2d`, its kernel read as a matrix (out, in·kh·kw)."""

    def _add_product(self, result: Tensor, x: Tensor, factors: Factors) -> Tensor:
        base = self.get_base_layer()
        kernel = factors.down().view(-1, *base.weight.shape[1:])
        hidden = F.conv2d(x, kernel, stride=base.stride, padding=base.padding)
        return result + F.conv2d(hidden, factors.up()[:, :, None, None])
