"""The first step down the gradient, along its leading singular directions: all singular values one, as long as pays.

From `W` (and what a pre-launch has learned) the model goes to `W − η Σ_j u_j v_jᵀ` in every layer, with one length η
for all, in the parameters that are trained: `B = −η U/(s c)` where A starts as `c Vᵀ` (LoRA-Init, LoRA-TSD), Δσ_j = −η
elsewhere. The length is found by trying: doubled, or halved, while the loss of batches that the gradient has not seen
falls.

Sources: LoRA-One (Zhang et al., ICML 2025) starts LoRA from one step of descent along the leading singular directions,
in proportion to the singular values. Steps of equal singular values are those of Muon (Jordan et al., 2024), steepest
descent in the spectral norm; with them one length serves layers whose gradients differ by orders of magnitude.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..directions.spectrum import as_double
from ..distributed.sharded import assign, is_main_process, world
from ..tuner.directed import DirectedLayer, Identified
from .gradients import Loss, undisturbed

log = logging.getLogger(__name__)

FIRST_TRIED = 1.0
"""The first length tried: the one that would take this part off the loss, were it linear. Usually it is the best, or
the best is two or four times as long.
"""

WORTH_HALVING = 1 / 5
"""Shorter lengths are tried where doubling costs more than this part of what the length gains: on a convex curve what
all of them could add is at most what doubling costs.
"""

MOST_TRIED = 8
"""Lengths tried at most."""


@torch.no_grad()
def step_down(
    model: nn.Module,
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    found: Mapping[str, Identified],
    batches: Sequence[Any],
    loss: Loss,
) -> float:
    """Take the first step, as long as lowers the loss most; none where no length lowers it.

    In distributed training each process gives its own batches, and the loss is the mean over them.

    Args:
        model: The model, not wrapped, its directions identified.
        layers: Its layers, by name.
        adapter: The adapter.
        found: What was written into the layers that have directions.
        batches: What `loss` takes, one at a time; gone through once for each length tried.
        loss: Of the model and a batch, a scalar.

    Returns:
        η, the length taken: the spectral norm of each layer's change.
    """
    steps = {name: one.descent for name, one in found.items() if one.descent is not None}

    def go(length: float) -> None:
        for name, step in steps.items():
            assign(layers[name].stepped(adapter), length * step)

    def loss_at(length: float) -> float:
        go(length)
        values = torch.stack([as_double(loss(model, batch)) for batch in batches])
        mean = values.mean()
        if world()[1] > 1:
            dist.all_reduce(mean)
            mean /= world()[1]
        return float(mean)

    slope = float(sum(as_double(one.chosen.sigma).sum() for one in found.values()))
    length = 0.0
    try:
        with undisturbed(model):
            length, before, after = best_length(loss_at, slope)
    finally:
        go(length)
    if is_main_process():
        log.info(
            "first step of adapter %r: length %.3g, loss %.4f before it, %.4f after", adapter, length, before, after
        )
    return length


def best_length(loss_at: Callable[[float], float], slope: float) -> tuple[float, float, float]:
    """The length of lowest loss among those tried, the loss at zero, and that at the length.

    Args:
        loss_at: The loss after a step of a length.
        slope: How fast it falls with the length at first, or a number of its order.
    """
    before = loss_at(0.0)
    length = FIRST_TRIED * abs(before) / slope
    if not 0 < length < math.inf:
        return 0.0, before, before
    losses: dict[float, float] = {}

    def lowers(length: float, other: float) -> bool:
        """Whether a length is better than one that was tried before; not where all tries are spent."""
        if length not in losses:
            if len(losses) == MOST_TRIED:
                return False
            losses[length] = loss_at(length)
        return losses[length] < other

    def worth_halving(length: float) -> bool:
        doubled, here = losses.get(2 * length, math.inf), losses[length]
        return not doubled - here <= WORTH_HALVING * (before - here)

    while not lowers(length, before):
        if len(losses) == MOST_TRIED:
            return 0.0, before, before
        length /= 4
    begun = length
    while lowers(2 * length, losses[length]):
        length *= 2
    if length == begun:
        while worth_halving(length) and lowers(length / 2, losses[length]):
            length /= 2
    return length, before, losses[length]
