"""The transition: the directions of every layer are found first, one at a time, and only then is anything written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from ..directions.chance import over_chance, spread
from ..directions.change import LowRank, is_no_change
from ..distributed.sharded import is_main_process
from ..distributed.sharing import share_out
from ..errors import in_layer
from ..tuner.directed import DirectedLayer, Identified
from ..tuner.phase import config_of, note_transition
from .moments import forget, owners_of
from .prelaunch import held_spectrum, release

log = logging.getLogger(__name__)


def from_lora(layers: Mapping[str, DirectedLayer], adapter: str) -> dict[str, Identified | None]:
    """The directions of every layer from what its LoRA has learned; none, without a look at weights, from nothing."""
    if all(is_no_change(in_layer(name, layer.learned_change, adapter)) for name, layer in layers.items()):
        return dict.fromkeys(layers)
    with tqdm(total=len(layers), desc="Identifying directions", unit="layer", disable=not is_main_process()) as bar:
        return identified(layers, adapter, lambda name: layers[name].learned_change(adapter), bar.update)


def identified(
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    change_of: Callable[[str], Tensor | LowRank],
    on_turn: Callable[[int], object] = lambda done: None,
) -> dict[str, Identified | None]:
    """The directions of every layer, each found by one process and known to all; None for one without a change."""

    def read(name: str, owner: int) -> tuple[Tensor | None, Tensor | LowRank]:
        return in_layer(name, lambda _: (layers[name].weight_in(owner), change_of(name)), adapter)

    def work(name: str, given: tuple[Tensor | None, Tensor | LowRank]) -> Identified | None:
        weight, change = given
        layer = layers[name]
        return in_layer(
            name, partial(layer.identify, change=change, spectrum=held_spectrum(layer), weight=weight), adapter
        )

    return share_out(layers, read, work, {name: layer.cost for name, layer in layers.items()}, on_turn)


def transition(
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    identify: Callable[[Mapping[str, DirectedLayer], str], dict[str, Identified | None]] = from_lora,
) -> dict[str, Identified]:
    """Identify the directions of every layer and write them in; restart A and B where the method says so.

    A layer that has not changed is left out: it goes on as it is, without directions.

    Args:
        layers: All layers of the adapter.
        adapter: Its name.
        optimizer: Forgets the moments of what restarts; None where it has none yet.
        identify: Finds what to write, and writes nothing.

    Returns:
        What was written, by layer; nothing where no layer has changed, and the transition was not made.

    Raises:
        TransitionError: As `advance`; nothing has been written then.
    """
    config = config_of(layers, adapter)
    if optimizer is not None:  # before anything is done that takes long
        owners_of(_restarted(layers, adapter), optimizer)
    for name, layer in layers.items():
        in_layer(name, layer.check_identifiable, adapter)
    try:
        seen = identify(layers, adapter)
    finally:
        release(layers)
    found = {name: one for name, one in seen.items() if one is not None}
    if not found:
        return {}
    if config.direction_budget == "global":
        slots = config.direction_slots
        scores = {name: over_chance(one.chosen.rates[:slots], one.chance) for name, one in found.items()}
        counts = spread(scores, config.num_directions * len(layers))
        found = {name: one.limited_to(counts[name]) for name, one in found.items()}
    for name, layer in layers.items():
        if name in found:
            layer.fill(adapter, found[name])
        else:
            layer.leave_out(adapter)
    if optimizer is not None:
        restarted = _restarted({name: layers[name] for name in found}, adapter)
        for parameter, owner in zip(restarted, owners_of(restarted, optimizer)):
            forget(owner, parameter)
    note_transition(layers, adapter)
    left_out = [name for name in layers if name not in found]
    if left_out and is_main_process():
        log.warning(
            "Adapter %r: %d of %d layers have not changed, and so have no task-specific directions; they go on "
            "without (experts that saw no token, or layers that no gradient reaches): %s",
            adapter,
            len(left_out),
            len(layers),
            ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else ""),
        )
    return found


def _restarted(layers: Mapping[str, DirectedLayer], adapter: str) -> list[nn.Parameter]:
    # What is frozen (LoRA-FA's A) starts anew too, and no optimizer has to know of it.
    return [p for layer in layers.values() for p in layer.restarted(adapter) if p.requires_grad]
