"""The directions of a model as arrays, and as a table when printed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..distributed.sharded import whole
from .directed import DirectedLayer


@dataclass(frozen=True)
class LayerDirections:
    """The task-specific directions identified in one layer, highest change rate first.

    `indices`, `rates` and `sigma` have one entry a direction chosen; the dash learns along the first n of them:
    num_directions, or what the layer got of a global budget.
    """

    indices: Tensor
    """Positions in the spectrum, 0 being the largest singular value; int64, shape (m,)."""
    rates: Tensor
    """Change rates at the transition, shape (m,)."""
    sigma: Tensor
    """Singular values, shape (m,)."""
    rank_bound: int
    """How many directions the weight has: min(out, in)."""
    delta_sigma: Tensor
    """Learned change along each direction of the dash, shape (n,) with n ≤ m; empty for LoRA-Init."""
    u: Tensor
    """Left singular vectors of the dash, shape (out, n)."""
    v: Tensor
    """Right singular vectors of the dash, shape (in, n)."""


class Directions(Mapping[str, LayerDirections]):
    """The directions of every layer by its name; printed, a table.

    Attributes:
        prelaunch_steps: Optimizer steps that had been taken when they were identified.
    """

    def __init__(self, layers: dict[str, LayerDirections], prelaunch_steps: int) -> None:
        self._layers = layers
        self.prelaunch_steps = prelaunch_steps

    def __getitem__(self, name: str) -> LayerDirections:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        rows = [("layer", "of", "directions, highest change rate first", "rate", "σ", "Δσ")]
        for name, found in self.items():
            shown = [str(i) for i in found.indices[:8].tolist()]
            moved = found.delta_sigma
            change = f"{moved[moved.abs().argmax()]:+.2g}" if len(moved) else "-"
            rows.append(
                (
                    name,
                    str(found.rank_bound),
                    " ".join(shown) + (" ..." if len(found.indices) > 8 else ""),
                    f"{found.rates[0]:.2g}" if len(shown) else "-",
                    f"{found.sigma[0]:.2g}" if len(shown) else "-",
                    change,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "rate, σ: of the first direction; Δσ: the largest learned change of the layer."])


def directions_of(layer: DirectedLayer, adapter: str) -> LayerDirections:
    fixed = layer.fixed(adapter)
    out_size, in_size = layer.matrix_shape
    dash = fixed.num_along
    start = layer.r[adapter] if layer.restarted(adapter) else 0
    chosen = min(int(fixed.indices.ge(0).sum()), max(dash, start))

    def read(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    if fixed.u is None or fixed.v is None:
        delta_sigma, u, v = torch.empty(0), torch.empty(out_size, 0), torch.empty(in_size, 0)
    else:
        delta_sigma = read(layer.delta_sigma(adapter, read=whole))[:dash]
        u, v = map(read, fixed.pairs())

    return LayerDirections(
        indices=read(fixed.indices)[:chosen],
        rates=read(fixed.rates)[:chosen],
        sigma=read(fixed.sigma)[:chosen],
        rank_bound=min(out_size, in_size),
        delta_sigma=delta_sigma,
        u=u,
        v=v,
    )
