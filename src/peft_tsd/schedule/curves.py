"""What the curves of a training show of an adapter's directions."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..distributed.sharded import whole
from ..tuner.directed import DirectedLayer
from ..tuner.phase import phase_of


def curves(layers: Mapping[str, DirectedLayer], adapter: str, number: int) -> dict[str, float]:
    """Where an adapter is, as numbers for a tracker; every process must ask where scalars are sharded.

    Args:
        layers: That carry it.
        adapter: Its name.
        number: Of its directions (`number_of_directions`), which stays what it is from the transition on.

    Returns:
        `tsd_phase`: 0 in the pre-launch, 1 after it. `tsd_delta_sigma`, after it and but for LoRA-Init: the mean |Δσ|
        over all directions of all layers.
    """
    if phase_of(layers, adapter) == "pre-launch":
        return {"tsd_phase": 0.0}
    if number == 0:
        return {"tsd_phase": 1.0}
    # A slot without a direction stays zero. Layers may lie on several devices, and one look is enough.
    moved = [layer.delta_sigma(adapter, read=whole).abs().sum().float() for layer in layers.values()]
    total = torch.stack([one.to(moved[0].device) for one in moved]).sum()
    return {"tsd_phase": 1.0, "tsd_delta_sigma": float(total) / number}


def number_of_directions(layers: Mapping[str, DirectedLayer], adapter: str) -> int:
    """Directions along which the layers learn: none before the transition, and of LoRA-Init."""
    return sum(layer.fixed(adapter).num_along for layer in layers.values())
