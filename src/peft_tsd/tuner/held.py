"""What a layer holds of its directions: the trained scalars, and what identification fixed.

The scalars are parameters. All else is buffers: nothing that trains, freezes, averages or counts parameters concerns
them, PyTorch copies them into averaged models, and every process holds them whole. DDP need not send them around
(`peft_tsd.distributed.replicas`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from ..distributed.sharded import whole


class DashScalars(nn.Module):
    """The trained scalars θ of one layer, shape (slots,); the change along direction j is `ratio · θ_j`.

    There are `TsdConfig.direction_slots` of them. One without a direction stays zero: its u and v are.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots))


class Joined(NamedTuple):
    """Directions, and a start of A and B along the first r of them, as one set of n = max(r, slots) columns.

    LoRA-TSD's `"svd"` start is the directions themselves, `s·B₀·A₀ = Σ_{j<r} σ_j u_j v_jᵀ`, so that

        −s·B₀·A₀ + Σ_j Δσ_j u_j v_jᵀ = Σ_j (to_unit_j²·Δσ_j − s·taken_j) ū_j v̄_jᵀ

    is of rank max(r, slots), where ū_j and v̄_j are B₀'s column and A₀'s row as they are rounded: then B·A is taken out
    to the bit, as long as it is where it started. (Si et al., arXiv 2409.01035, have r + slots.)
    """

    u: Tensor
    """ū, shape (out, n): B₀'s columns, then directions; zero where there is neither."""
    v: Tensor
    """v̄, shape (n, in): A₀'s rows, then directions."""
    to_unit: Tensor
    """`(‖ū_j‖‖v̄_j‖)^-½`, shape (n,), zero where no Δσ is learned along the column. Not its square, which float16 may
    not hold."""
    taken: Tensor
    """1 where ū_j v̄_jᵀ is of the start, 0 elsewhere, shape (n,)."""


def join(u: Tensor, v: Tensor, a0: Tensor, b0: Tensor) -> Joined:
    """Directions (out, slots) and (slots, in), zero where there is none, and a start (r, in) and (out, r) along them.

    Where the start is zero (a σ of nothing, or fewer than r directions), a direction stays what it was.
    """
    r, wide = len(a0), torch.promote_types(a0.dtype, torch.float32)
    more = max(r - len(v), 0)
    learned = F.pad(used_columns(u), (0, more))
    u, v = F.pad(u, (0, more)), F.pad(v, (0, 0, 0, more))
    norm = F.pad(b0.to(wide).norm(dim=0) * a0.to(wide).norm(dim=1), (0, len(v) - r))
    taken = norm > 0
    u[:, :r] = torch.where(taken[:r], b0, u[:, :r])
    v[:r] = torch.where(taken[:r, None], a0, v[:r])
    to_unit = torch.where(taken, norm.rsqrt(), 1) * learned
    return Joined(u, v, to_unit.to(u.dtype), taken.to(u.dtype))


def join_in(state: dict[str, Any], prefix: str) -> None:
    """Join what 0.1.0 saved apart, `u`, `v`, `a0` and `b0` in a state dict, whose names begin with `prefix`."""
    parts = [whole(state[prefix + name]) for name in ("u", "v")]
    parts += [whole(state.pop(prefix + name)) for name in ("a0", "b0")]
    state.update({prefix + name: value for name, value in join(*parts)._asdict().items()})


def joined_as_now(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors, named as in its file, with what 0.1.0 saved apart joined."""
    state = dict(state)
    for key in list(state):
        if key.endswith(".lora_directions.a0"):
            join_in(state, key.removesuffix("a0"))
    return state


def joined_coefficients(delta_sigma: Tensor, to_unit: Tensor, taken: Tensor, scaling: float) -> Tensor:
    """What each column of `Joined` is multiplied by, shape (n,), from Δσ (slots,): in float32 at least, in which the
    start is taken out by as much as LoRA's own product with `scaling` puts in, and a Δσ far below σ is not lost."""
    wide = torch.promote_types(delta_sigma.dtype, torch.float32)
    padded = F.pad(delta_sigma.to(wide), (0, len(taken) - len(delta_sigma)))
    return to_unit.to(wide).square() * padded - scaling * taken.to(wide)


class FixedDirections(nn.Module):
    """What identification leaves in one layer, as buffers.

    Convolution kernels are flattened: `in` is in·kh·kw.

    Attributes:
        step: Optimizer steps taken by this adapter, int64, shape (1,).
        identified_at: How many they were when the directions were identified; -1 before; int64, shape (1,).
        indices: Positions in the spectrum, highest rate first; int64, shape (m,), with m the larger of r and the slots
            of the dash as the method uses them. -1 before identification, and where fewer directions changed: all of
            them in a layer that did not change. Of a global budget the layer may have got only the first few.
        rates, sigma: Change rates and singular values of those, shape (m,).
        unit: What Δσ is measured in, shape (slots,); None where it is 1.
        u, v: Directions of the dash, shapes (out, slots) and (slots, in), zero where there is none; None for
            LoRA-Init. In LoRA-TSD with the `"svd"` reading as many as the larger of r and the slots, as `Joined`.
        to_unit, taken: As `Joined`; None elsewhere.
        a0, b0: Starting factors, shapes (r, in) and (out, r); None but for the `"svd"` reading of LoRA-Init and for
            LoRA-Dash from PiSSA and its like.
        kept_a, kept_b: What A and B were at the end of the pre-launch, shapes (r, in) and (out, r), zero before; None
            where they go on, or what they learned is dropped.
        candidates: The directions that the last check of an automatic pre-launch found, highest rate first; int64,
            -1 before; None in a pre-launch of fixed length.
        agreement: What each of its checks found, over all layers, in the order of `TsdConfig.check_steps`; -1 before.

    Args:
        num_kept: r, where what pre-launch learned is kept; 0 elsewhere.
        num_joined: Of LoRA-TSD's start that lies along the directions: r; 0 where there is none.
        starts_apart: a0 and b0 are there from the start, and may differ between processes until DDP has sent around
            those of rank 0, as it does with A and B.
    """

    step: Tensor
    identified_at: Tensor
    indices: Tensor
    rates: Tensor
    sigma: Tensor
    unit: Tensor | None
    u: Tensor | None
    v: Tensor | None
    to_unit: Tensor | None
    taken: Tensor | None
    a0: Tensor | None
    b0: Tensor | None
    kept_a: Tensor | None
    kept_b: Tensor | None
    candidates: Tensor | None
    agreement: Tensor | None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        num_chosen: int,
        num_dash: int,
        num_start: int,
        *,
        num_joined: int = 0,
        num_kept: int = 0,
        has_unit: bool,
        num_checks: int,
        starts_apart: bool = False,
    ) -> None:
        super().__init__()
        self._apart = ("a0", "b0") if starts_apart else ()
        self.slots = num_dash
        columns = max(num_dash, num_joined)
        # PEFT's low_cpu_mem_usage puts new parameters on the meta device, and leaves buffers to whoever makes them.
        device = DashScalars(0).weight.device

        def hold(name: str, *shape: int, dtype: torch.dtype | None = None, fill: float = 0) -> None:
            dtype = dtype or torch.get_default_dtype()
            # An empty tensor is for what a method has none of.
            value = torch.full(shape, fill, dtype=dtype, device=device) if all(shape) else None
            self.register_buffer(name, value)

        hold("step", 1, dtype=torch.int64)
        hold("identified_at", 1, dtype=torch.int64, fill=-1)
        hold("indices", num_chosen, dtype=torch.int64, fill=-1)
        hold("rates", num_chosen)
        hold("sigma", num_chosen)
        hold("unit", num_dash * has_unit)
        hold("u", out_size, columns)
        hold("v", columns, in_size)
        hold("to_unit", columns * bool(num_joined))
        hold("taken", columns * bool(num_joined))
        hold("a0", num_start, in_size)
        hold("b0", out_size, num_start)
        hold("kept_a", num_kept, in_size)
        hold("kept_b", out_size, num_kept)
        hold("candidates", num_chosen * bool(num_checks), dtype=torch.int64, fill=-1)
        hold("agreement", num_checks, fill=-1)

    @property
    def identified(self) -> bool:
        """Whether the transition has been made: pre-launch is over.

        Raises:
            ValueError: There are no numbers to tell by.
        """
        if self.identified_at.is_meta:
            raise ValueError(
                "The adapter is on the meta device, which holds no numbers: make it on a base model that is in memory."
            )
        return bool(self.identified_at >= 0)

    def alike(self) -> list[str]:
        """The names of what is the same in all processes from the start."""
        return [name for name, _ in self.named_buffers() if name not in self._apart]

    def digest(self) -> int:
        """Of all that is held; the same where every bit of it is."""
        found = 0
        for buffer in self.buffers():
            found = zlib.crc32(buffer.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), found)
        return found

    @property
    def num_along(self) -> int:
        """How many directions the dash learns along."""
        if self.u is None:
            return 0
        return int((used_columns(self.u) if self.to_unit is None else self.to_unit.ne(0)).sum())

    def pairs(self) -> tuple[Tensor, Tensor]:
        """The directions that the dash learns along as unit vectors: (out, n) and (in, n)."""
        assert self.u is not None
        assert self.v is not None
        u, v = self.u[:, : self.num_along], self.v[: self.num_along].mT
        return (u, v) if self.taken is None else (F.normalize(u, dim=0), F.normalize(v, dim=0))

    def coefficients(self, delta_sigma: Tensor, scaling: float) -> Tensor:
        """What each column of U and V is multiplied by, for LoRA's `scaling`: Δσ, less a start along them."""
        if self.to_unit is None or self.taken is None:
            return delta_sigma
        return joined_coefficients(delta_sigma, self.to_unit, self.taken, scaling)

    @torch.no_grad()
    def join_start(self, a0: Tensor, b0: Tensor) -> None:
        """Put a start along the directions, A₀ (r, in) and B₀ (out, r), in their place."""
        assert self.u is not None
        assert self.v is not None
        for name, value in join(self.u, self.v, a0, b0)._asdict().items():
            getattr(self, name).copy_(value)

    @property
    def averaged(self) -> bool:
        """Whether the indices are no positions in the spectrum: what is left of them where they were averaged."""
        chosen = self.indices[self.indices >= 0].tolist()
        in_order = chosen + [-1] * (len(self.indices) - len(chosen))
        return self.indices.tolist() != in_order or len(set(chosen)) < len(chosen)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *args: Any
    ) -> None:
        if self.taken is not None and prefix + "a0" in state_dict:
            join_in(state_dict, prefix)
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if isinstance(value, DTensor):
                state_dict[prefix + name] = value = whole(value).to(value.device_mesh.device_type)
            if isinstance(value, Tensor) and buffer is not None and buffer.is_meta and not value.is_meta:
                # Beside a weight on disk. PEFT writes parameters there, for Accelerate to find, and no buffers.
                self._buffers[name] = buffer = torch.empty_like(buffer, device=value.device)
            if isinstance(value, Tensor) and buffer is not None and value.dtype != buffer.dtype == torch.int64:
                # An average of state dicts. Of adapters with the same directions it is theirs, up to rounding.
                state_dict[prefix + name] = value.round().to(torch.int64)
                if name == "indices" and (value - value.round()).abs().max() > 1e-3:
                    args[-1].append(
                        f"{prefix + name} holds {value.tolist()}, an average over adapters with directions of their "
                        "own. Average their parameters, or export each with export_lora and combine the plain LoRAs."
                    )
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedDirections:
        # PEFT moves a layer's parts to its device, but for those on the meta device, which have yet to be read from a
        # file. It asks parameters alone whether they are there.
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except NotImplementedError:
            if not self.step.is_meta:
                raise
        return self

    @torch.no_grad()
    def upcast(self) -> None:
        """To float32 what is of lower precision: what PEFT's `autocast_adapter_dtype` does with parameters."""
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point() and buffer.itemsize < torch.float32.itemsize:
                setattr(self, name, buffer.float())


def sent_by_accelerate(layer: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    """A hook for the state dict of `layer`: on the meta device, directions beside what FSDP2 has sharded are as if it
    had been asked to keep them whole.

    Accelerate, told to load a model in the main process alone, sends everything in the state dict around by the mesh
    that it is sharded on, and knows no buffers.
    """
    mesh = next((p.device_mesh for p in layer.parameters() if isinstance(p, DTensor)), None)
    for name, module in layer.named_modules():
        if mesh is not None and isinstance(module, FixedDirections) and module.step.is_meta:
            for key, buffer in module.named_buffers(prefix + name):
                state_dict[key] = DTensor.from_local(buffer, mesh, [Replicate()] * mesh.ndim, run_check=False)


def used_columns(u: Tensor) -> Tensor:
    """Which columns of U (out, slots) hold a direction: bool, shape (slots,). Singular vectors are not zero."""
    return u.ne(0).any(0)
