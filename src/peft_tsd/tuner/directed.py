"""A layer with directions: how they are identified from a change, and filled in."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakSet

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..directions.chance import chance_rate
from ..directions.change import LowRank, change_norm, check_change, check_matrix, is_no_change
from ..directions.definitions import TaskSpecificDirections, directions_on, ranked, rates_on
from ..directions.sketch import Triples
from ..directions.spectrum import Spectrum
from ..distributed.sharded import gathered, is_sharded, shape_of
from ..models.matrix import as_matrix, as_stored, is_transposed, matrix_shape
from ..models.packed import is_quantized
from .held import DashScalars, FixedDirections
from .settings import DirectionSettings

ROUNDING = 1e-12
"""A coordinate of ΔW that is this small a part of its norm is rounding, and says nothing of its direction."""


LAYERS: WeakSet[DirectedLayer] = WeakSet()
"""Those made in this process."""


class Identified(NamedTuple):
    """Everything the transition writes into one layer, computed before anything is written."""

    chosen: TaskSpecificDirections
    unit: Tensor | None
    start_a: Tensor | None
    start_b: Tensor | None
    descent: Tensor | None = None
    """For a first step: what a step of length one down the gradient makes of `stepped`, in its shape."""
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
        base = self.get_base_layer()
        return as_matrix(base.weight, is_transposed(base))

    def weight_in(self, owner: int) -> Tensor | None:
        """The same in the process `owner` alone; None in the others. Where it is sharded, every process must ask.

        Raises:
            ValueError: As `distributed.gathered`.
        """
        base = self.get_base_layer()
        if not is_sharded(base):
            return self.weight_matrix()
        together = gathered(base.weight, owner)
        return None if together is None else as_matrix(together, is_transposed(base))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out, in) of the weight as a matrix."""
        base = self.get_base_layer()
        return matrix_shape(shape_of(base.weight), is_transposed(base))

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
        return as_stored(matrix, base.weight.shape, is_transposed(base))

    def learned_change(self, adapter: str) -> Tensor | LowRank:
        """ΔW of the pre-launch, detached: dense, shape (out, in), or as factors (B, A, scaling)."""
        raise NotImplementedError

    def rates_of(self, adapter: str) -> tuple[nn.Parameter | None, nn.Parameter | None, nn.Parameter | None]:
        """A, B and the scalars along directions, whose learning rates belong together; None for what there is not."""
        return None, None, None

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
            read: How the scalars are read: `distributed.whole`, outside of a forward pass.
        """
        theta = read(self.scalars(adapter).weight)
        scale = strength * self.settings(adapter).dash_lr_ratio
        unit = self.fixed(adapter).unit
        if unit is not None:
            theta = unit * theta
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

    def rows(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """What passes this layer as rows, one a token or place: inputs (n, in) and gradients (n, out).

        The gradient of the base weight is the sum of their outer products.

        Raises:
            ValueError: As `weight_gradient`.
        """
        base = self.get_base_layer()
        if isinstance(base, nn.Conv2d):
            padded = F.pad(x.detach(), base._reversed_padding_repeated_twice)
            places = F.unfold(padded, base.kernel_size, stride=base.stride)
            return places.mT.flatten(0, 1), gradient.flatten(2).mT.flatten(0, 1)
        if not (isinstance(base, (nn.Linear, Conv1D)) or is_quantized(base)):
            raise ValueError(f"Directions are not found from gradients in layers of type {type(base).__name__}.")
        return x.detach().flatten(0, -2), gradient.flatten(0, -2)

    @torch.no_grad()
    def along_gradient(self, adapter: str, triples: Triples, seed: int) -> Identified:
        """The leading singular directions of the gradient as this layer's; writes nothing, and looks at no weight.

        A rate is here the part of ‖G‖ that lies along a direction, and σ the gradient's own singular value.

        Args:
            adapter: Name of the adapter.
            triples: Of the gradient.
            seed: Of random directions in their place (`selection="random"`, a control).
        """
        fixed = self.fixed(adapter)
        u, v = triples.u, triples.v
        if self.settings(adapter).selection == "random":
            generator = torch.Generator().manual_seed(seed)
            u, v = (torch.linalg.qr(torch.randn(x.shape, generator=generator, dtype=x.dtype)).Q for x in (u, v))
        n = min(len(triples.s), len(fixed.indices))
        num_dash = fixed.slots
        chosen = TaskSpecificDirections(
            indices=torch.arange(n),
            rates=(triples.s / triples.norm)[:n].float().cpu(),
            u=u[:, :n].float().cpu(),
            sigma=triples.s[:n].float().cpu(),
            v=v[:, :n].float().cpu(),
        )
        start_a, start_b = self._start(adapter, chosen)
        descent = self._descent(adapter, chosen.u) if self.settings(adapter).first_step else None
        chosen = chosen._replace(u=chosen.u[:, :num_dash], v=chosen.v[:, :num_dash])
        return Identified(chosen, None, start_a, start_b, descent)

    @torch.no_grad()
    def identify(
        self,
        adapter: str,
        change: Tensor | LowRank | None = None,
        spectrum: Spectrum | None = None,
        weight: Tensor | None = None,
    ) -> Identified | None:
        """Find the task-specific directions of this layer; writes nothing.

        Only directions that changed are chosen, which may be fewer than asked for. A layer that did not change at all
        has none: None is found.

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
        if is_no_change(change):
            return None
        spectrum = spectrum or Spectrum(weight)
        rates = rates_on(spectrum, change, config.eps)
        # Another one for each layer and run, and the same in every process.
        learned = change if isinstance(change, Tensor) else change[1]
        seed = zlib.crc32(learned.float().cpu().numpy().tobytes())
        order = ranked(rates, spectrum.sigma + config.eps, config.selection, seed)
        if config.selection == "tsd":
            # The order of those beyond is that of the sort, or of float64's rounding.
            order = order[(rates * (spectrum.sigma + config.eps) > ROUNDING * change_norm(change))[order]]
        chosen = directions_on(spectrum, rates, order[: len(fixed.indices)], like=weight)
        chance = 0.0
        if config.direction_budget == "global":
            entry = change_norm(change) / weight.numel() ** 0.5
            chance = chance_rate(spectrum.sigma.cpu(), entry, config.num_directions, config.eps)
        unit = None
        if fixed.unit is not None:
            mean_square = weight.float().square().sum() / min(weight.shape)  # of the singular values
            slots = len(fixed.unit)
            unit = mean_square.sqrt().expand(slots) if config.dash_unit == "layer" else chosen.sigma[:slots]
        start_a, start_b = self._start(adapter, chosen)
        # Only the chosen few go on, and off an accelerator, until every layer is done and all can be written at once.
        num_dash = fixed.slots
        chosen = chosen._replace(u=chosen.u[:, :num_dash].clone(), v=chosen.v[:, :num_dash].clone())
        unit, start_a, start_b = (None if x is None else x.cpu() for x in (unit, start_a, start_b))
        return Identified(TaskSpecificDirections(*(x.cpu() for x in chosen)), unit, start_a, start_b, chance=chance)

    def _start(self, adapter: str, chosen: TaskSpecificDirections) -> tuple[Tensor | None, Tensor | None]:
        """The factors that a method restarts from, if it does."""
        return None, None

    def stepped(self, adapter: str) -> nn.Parameter:
        """The parameter that a first step down the gradient moves from zero: B where it restarts, and Δσ elsewhere."""
        return self.scalars(adapter).weight

    def _descent(self, adapter: str, u: Tensor) -> Tensor:
        """What `stepped` is after a step by minus one along each of the directions, of which u, (out, n), are the left
        ones.
        """
        theta = torch.zeros(shape_of(self.scalars(adapter).weight))
        theta[: u.shape[1]] = -1 / self.settings(adapter).dash_lr_ratio
        return theta

    @torch.no_grad()
    def fill(self, adapter: str, found: Identified) -> None:
        """Write what `identify` found: from here on the directions are part of the layer."""
        fixed = self.fixed(adapter)
        chosen = found.chosen
        # Fewer than asked for where fewer directions changed; the rest stays as it is.
        pairs = [(fixed.u, chosen.u), (fixed.v, chosen.v.mT), (fixed.unit, found.unit)]
        for held, value in (*pairs, (fixed.rates, chosen.rates), (fixed.sigma, chosen.sigma)):
            if held is not None and value is not None:
                held.copy_(_padded(value, held.shape))
        fixed.identified_at.copy_(fixed.step)
        fixed.indices.copy_(_padded(chosen.indices, fixed.indices.shape, -1))

    @torch.no_grad()
    def leave_out(self, adapter: str) -> None:
        """Pre-launch is over, and this layer goes on as it is, without directions: it has not changed."""
        fixed = self.fixed(adapter)
        fixed.identified_at.copy_(fixed.step)

    def check_unmerged(self, adapter: str | None = None) -> None:
        """Refuse to change what is merged: an unmerge would take another change out of the base weight.

        Args:
            adapter: The adapter that would change; any by default, as where the base weight is read.

        Raises:
            ValueError: It is merged.
        """
        if adapter in self.merged_adapters or (adapter is None and self.merged):
            raise ValueError(
                f"its adapters {self.merged_adapters} are merged into the base weight; call unmerge_adapter() first."
            )

    def delete_adapter(self, adapter_name: str) -> None:
        self.check_unmerged(adapter_name)
        super().delete_adapter(adapter_name)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if any(
            f".{adapter}." in f"{key}."
            for key in state_dict
            if key.startswith(prefix)
            for adapter in self.merged_adapters
        ):
            self.check_unmerged()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def reads_weight(self, adapter: str) -> bool:
        """Whether the directions are the frozen weight's; for those of the gradient nothing looks at it."""
        return self.settings(adapter).direction_source == "weight"

    def check_layout(self, adapter: str) -> None:
        """Refuse a layer whose weight cannot be read, or that has lost its shape, without a look at its numbers.

        Raises:
            ValueError: An adapter is merged into it; its weight is flattened, or not in memory where it would be read;
                or the adapter is not.
        """
        self.check_unmerged()
        if self.reads_weight(adapter) and self.weight_device.type == "meta":
            raise ValueError(
                "its base weight is offloaded (on the meta device); keep the weights of adapted layers in memory."
            )
        if self.stepped(adapter).is_meta or self.fixed(adapter).step.is_meta:
            raise ValueError(
                "its adapter is offloaded (on the meta device), where nothing trains; offload the base model, if it "
                "must be, before the adapter is made."
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
        if self.reads_weight(adapter) and not is_sharded(self):
            check_matrix(self.weight_matrix(), "the base weight")
