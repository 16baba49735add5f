"""When the pre-launch is over: after a number of steps, or once the directions it would identify have settled.

An automatic pre-launch checks, at steps known from the config alone (`TsdConfig.check_steps`), which directions each
layer's change rates put first, and ends when most of them were first at the check before. What it decides by is A, B
and the frozen weights, which every process holds alike, and the sets of the last check, which are saved with the
adapter: all processes, and a resumed run, decide the same.

A check is two skinny products a layer, `Vᵀ Wᵀ B` and `A V`, once the layer's weight has been factorized. That is done
at the first check, kept until the transition and used there again. On a large model it cannot be kept for every layer,
so that checks look at `CHECKED_LAYERS` layers, evenly spread over the model, or at fewer where these hold too much.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch

from .config import DirectionSettings
from .directions import highest_first, rates_on
from .errors import in_layer
from .layer import DirectedLayer
from .model import config_of, steps_taken
from .spectrum import Spectrum

CHECKED_LAYERS = 16
"""Most layers that a check looks at."""

HELD_BYTES = 2**30
"""Most memory their factorizations take, on the weights' device: 8·k² bytes each, k = min(out, in)."""

log = logging.getLogger(__name__)

_held: WeakKeyDictionary[DirectedLayer, Spectrum] = WeakKeyDictionary()


def prelaunch_is_over(layers: Mapping[str, DirectedLayer], adapter: str) -> bool:
    """Whether the directions are to be identified now, after the step that was just counted.

    Raises:
        TransitionError: A check finds NaN or Inf in a layer.
    """
    config, step = config_of(layers, adapter), steps_taken(layers, adapter)
    if config.prelaunch_steps != "auto":
        return step >= config.prelaunch_steps
    agreement = _check(layers, adapter, config, step) if step in config.check_steps else 0.0
    settled = step >= config.prelaunch_min and agreement >= config.settled_agreement
    return settled or step >= config.prelaunch_max


def checks_made(layers: Mapping[str, DirectedLayer], adapter: str) -> list[dict[str, float]]:
    """What the checks of an automatic pre-launch saw: each one's `step`, and its `agreement` with the one before."""
    recorded = next(iter(layers.values())).fixed(adapter).agreement
    steps = config_of(layers, adapter).check_steps
    found = [] if recorded is None else recorded.tolist()
    return [{"step": step, "agreement": value} for step, value in zip(steps, found) if value >= 0]


def checked_layers(layers: Mapping[str, DirectedLayer]) -> dict[str, DirectedLayer]:
    """The layers that checks look at: evenly spread, as many as the limits allow."""
    names = list(layers)
    for count in range(min(CHECKED_LAYERS, len(names)), 1, -1):
        chosen = [names[i * (len(names) - 1) // (count - 1)] for i in range(count)]
        if sum(8 * min(layers[name].matrix_shape) ** 2 for name in chosen) <= HELD_BYTES:
            return {name: layers[name] for name in chosen}
    return {names[0]: layers[names[0]]}


def held_spectrum(layer: DirectedLayer) -> Spectrum | None:
    """The factorization of a layer's weight, where a check has made it; it is held no longer."""
    return _held.pop(layer, None)


@torch.no_grad()
def _check(layers: Mapping[str, DirectedLayer], adapter: str, config: DirectionSettings, step: int) -> float:
    """The part of the directions that the check before had found too; 0 for the first check."""
    start = time.perf_counter()
    found = {}
    checked = checked_layers(layers)
    for name, layer in checked.items():
        in_layer(name, layer.check_identifiable, adapter)
        if layer not in _held:
            _held[layer] = Spectrum(layer.weight_matrix())
        rates = rates_on(_held[layer], layer.learned_change(adapter), config.eps)
        fixed = layer.fixed(adapter)
        num = len(fixed.indices) if fixed.u is None else config.num_directions  # LoRA-Init's r, or the dash's
        found[name] = highest_first(rates)[:num].cpu()
    parts = []
    for name, indices in found.items():
        candidates = checked[name].fixed(adapter).candidates
        assert candidates is not None
        parts.append(float(torch.isin(indices, candidates.cpu()).double().mean()))
        candidates[: len(indices)] = indices.to(candidates)
    agreement = sum(parts) / len(parts)
    number = config.check_steps.index(step)
    for layer in layers.values():
        recorded = layer.fixed(adapter).agreement
        assert recorded is not None
        recorded[number] = agreement if number else -1
    seen = f"{agreement:.3f} of the directions were there at the last check" if number else "first check"
    log.info("pre-launch, step %d, %d layers: %s; %.2f s", step, len(found), seen, time.perf_counter() - start)
    return agreement
