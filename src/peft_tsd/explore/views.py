"""How explorations are laid out where people look at them: what the report and the figures have in common."""

from __future__ import annotations

import numpy as np

from .results import Exploration, FloatArray, WeightChange

BINS = 20
"""How many equal parts of the spectrum a histogram of positions has."""


def kinds(exploration: Exploration) -> dict[str, str]:
    """Every weight's kind, by its name: the row of a layer-by-module map it belongs to.

    The kind is the module, `self_attn.q_proj`; where modules of one name stand in several stacks of layers, as in an
    encoder and a decoder, it is the whole name with a star for the layer: `decoder.block.*.layer.0.SelfAttention.q`.
    """
    stacks: dict[str, set[str]] = {}
    for weight in exploration.weights:
        stacks.setdefault(weight.module, set()).add(_starred(weight))
    return {
        weight.name: weight.module if len(stacks[weight.module]) == 1 else _starred(weight)
        for weight in exploration.weights
    }


def layers(exploration: Exploration) -> list[int | None]:
    """The layers that have weights, ascending; None, for weights outside of any, last."""
    found = {weight.layer for weight in exploration.weights}
    numbered: list[int | None] = [*sorted(layer for layer in found if layer is not None)]
    return [*numbered, None] if None in found else numbered


def representative(exploration: Exploration) -> WeightChange:
    """The weight to show for all: the one whose TSDs carry the median share of its rates (the lower of two).

    Raises:
        ValueError: No weight was measured.
    """
    if not exploration.weights:
        raise ValueError(f"{exploration.tuned!r} has no measured weight to show.")
    ordered = sorted(exploration.weights, key=lambda weight: weight.choices()["tsd"].rate)
    return ordered[(len(ordered) - 1) // 2]


def histogram(exploration: Exploration) -> FloatArray:
    """The share of all TSDs in each of `BINS` equal parts of the spectrum, largest singular values first."""
    positions = [weight.positions for weight in exploration.weights]
    counts, _ = np.histogram(np.concatenate([*positions, np.empty(0)]), bins=BINS, range=(0, 1))
    return np.asarray(counts / max(counts.sum(), 1), dtype=np.float64)


def tail(k: int) -> int:
    """How many of the k smallest singular values a close-up shows: a tenth, and no fewer than 48."""
    return min(k, max(48, k // 10))


def _starred(weight: WeightChange) -> str:
    parts = weight.name.split(".")
    if weight.layer is not None and str(weight.layer) in parts:
        parts[parts.index(str(weight.layer))] = "*"
    return ".".join(parts)
