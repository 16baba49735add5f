"""When the pre-launch is over: after a number of steps, or once the directions it would identify have settled.

An automatic pre-launch checks, at steps known from the config alone (`TsdConfig.check_steps`), which directions each
layer's change rates put first, and ends when most of them were first at the check before. What it decides by is A, B
and the frozen weights, which every process holds alike, and the sets of the last check, which are saved with the
adapter: all processes, and a resumed run, decide the same.

A check is two skinny products a layer, `Vᵀ Wᵀ B` and `A V`, once the layer's weight has been factorized. That is done
at the first check, kept until the transition and used there again, in the process that made it. On a large model it
cannot be kept for every layer, so that checks look at `CHECKED_LAYERS` layers, evenly spread over the model, or at
fewer where these hold too much.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from ..directions.change import LowRank, check_change, is_no_change
from ..directions.definitions import highest_first, rates_on
from ..directions.spectrum import Spectrum, as_double
from ..distributed.sharded import is_sharded
from ..distributed.sharing import share_out
from ..errors import in_layer
from ..tuner.directed import DirectedLayer
from ..tuner.phase import config_of, steps_taken
from ..tuner.quantized import QuantizedLayer
from ..tuner.settings import DirectionSettings

CHECKED_LAYERS = 16
"""Most layers that a check looks at."""

HELD_BYTES = 2**30
"""Most memory their factorizations take, on the weights' device: 8·k² bytes each, k = min(out, in)."""

log = logging.getLogger(__name__)

_held: WeakKeyDictionary[DirectedLayer, Spectrum] = WeakKeyDictionary()

_seen: WeakSet[DirectedLayer] = WeakSet()


def prelaunch_is_over(layers: Mapping[str, DirectedLayer], adapter: str) -> bool:
    """Whether the directions are to be identified now, after the step that was just counted.

    Raises:
        TransitionError: A check finds NaN or Inf in a layer.
    """
    config, step = config_of(layers, adapter), steps_taken(layers, adapter)
    if config.prelaunch_steps != "auto":
        return step >= config.longest_prelaunch
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
        if sum(_held_bytes(layers[name]) for name in chosen) <= HELD_BYTES:
            return {name: layers[name] for name in chosen}
    return {names[0]: layers[names[0]]}


def _held_bytes(layer: DirectedLayer) -> int:
    kept = 8 * min(layer.matrix_shape) ** 2
    if is_sharded(layer) or isinstance(layer, QuantizedLayer):  # the weight that was put together, or de-quantized
        kept += math.prod(layer.matrix_shape) * layer.weight_dtype.itemsize
    return kept


def held_spectrum(layer: DirectedLayer) -> Spectrum | None:
    """The factorization of a layer's weight, where a check of this process has made it; it is held no longer."""
    return _held.pop(layer, None)


def release(layers: Mapping[str, DirectedLayer]) -> None:
    """Hold no factorization any longer."""
    for layer in layers.values():
        _held.pop(layer, None)
        _seen.discard(layer)


@torch.no_grad()
def _check(layers: Mapping[str, DirectedLayer], adapter: str, config: DirectionSettings, step: int) -> float:
    """The part of the directions that the check before had found too; 0 for the first check."""
    start = time.perf_counter()
    checked = checked_layers(layers)
    for name, layer in checked.items():
        in_layer(name, layer.check_identifiable, adapter)

    def read(name: str, owner: int) -> tuple[Tensor | None, Tensor | LowRank]:
        layer = checked[name]
        # A process takes the same layers at every check: where it has seen this one change, it holds what it needs.
        weight = None if layer in _seen else in_layer(name, lambda _: layer.weight_in(owner), adapter)
        return weight, in_layer(name, layer.learned_change, adapter)

    def work(name: str, given: tuple[Tensor | None, Tensor | LowRank]) -> Tensor:
        weight, change = given
        return in_layer(name, lambda _: _first_directions(checked[name], adapter, weight, change), adapter)

    found = share_out(checked, read, work, {name: layer.cost for name, layer in checked.items()})
    _seen.update(checked[name] for name, indices in found.items() if len(indices))
    parts = []
    for name, indices in found.items():
        if not len(indices):  # a layer that has not changed tells nothing
            continue
        candidates = checked[name].fixed(adapter).candidates
        assert candidates is not None
        before = candidates.cpu()
        parts.append(float(as_double(torch.isin(indices, before)).mean()))
        candidates.copy_(torch.cat([indices, before[len(indices) :]]))
    agreement = sum(parts) / len(parts) if parts else 0.0
    number = config.check_steps.index(step)
    for layer in layers.values():  # all record the same
        recorded = layer.fixed(adapter).agreement
        assert recorded is not None
        recorded[number] = agreement if number else -1
    seen = f"{agreement:.3f} of the directions were there at the last check" if number else "first check"
    log.info("pre-launch, step %d, %d layers: %s; %.2f s", step, len(found), seen, time.perf_counter() - start)
    return agreement


def _first_directions(layer: DirectedLayer, adapter: str, weight: Tensor | None, change: Tensor | LowRank) -> Tensor:
    """The positions in the spectrum that identification would take now, highest change rate first."""
    if is_no_change(change):
        return torch.empty(0, dtype=torch.int64)
    if layer not in _held:
        assert weight is not None
        check_change(weight, change)
        _held[layer] = Spectrum(weight)
    config, fixed = layer.settings(adapter), layer.fixed(adapter)
    num = len(fixed.indices) if fixed.u is None else config.num_directions  # LoRA-Init's r, or the dash's
    return highest_first(rates_on(_held[layer], change, config.eps))[:num].cpu()
