"""What the curves of a training show of an adapter's directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..distributed.sharded import whole
from ..tuner.directed import DirectedLayer
from ..tuner.held import used_columns
from ..tuner.phase import phase_of


def curves(layers: Mapping[str, DirectedLayer], adapter: str) -> dict[str, float]:
    """Where an adapter is, as numbers for a tracker; every process must ask where scalars are sharded.

    Returns:
        `tsd_phase`: 0 in the pre-launch, 1 after it. `tsd_delta_sigma`, after it and but for LoRA-Init: the mean |Δσ|
        over all directions of all layers.
    """
    if phase_of(layers, adapter) == "pre-launch":
        return {"tsd_phase": 0.0}
    changes, directions = _of_dash(layers, adapter)
    if not changes:
        return {"tsd_phase": 1.0}
    # One look at the device for all layers.
    total, number = torch.stack([torch.stack(changes).sum(), torch.stack(directions).sum()]).tolist()
    return {"tsd_phase": 1.0, "tsd_delta_sigma": total / number if number else 0.0}


def _of_dash(layers: Mapping[str, DirectedLayer], adapter: str) -> tuple[list[Tensor], list[Tensor]]:
    """Σ|Δσ| and the number of directions, of each layer that learns along some."""
    changes, directions = [], []
    for layer in layers.values():
        u = layer.fixed(adapter).u
        if u is not None:
            moved = layer.delta_sigma(adapter, read=whole).detach().float()
            # Layers may lie on several devices; a slot without a direction stays zero.
            changes.append(moved.abs().sum().to(u.device))
            directions.append(used_columns(u).sum().float())
    first = changes[0].device if changes else None
    return [x.to(first) for x in changes], [x.to(first) for x in directions]
