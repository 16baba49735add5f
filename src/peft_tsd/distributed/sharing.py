"""Who works on which layer: work that can be done layer by layer is shared out over the processes.

At the transition each weight is factorized by one process, and what it found is sent to all, so that all hold the same
bits. Layers are taken in turns of one for each process, those of the same cost together: a weight that is sharded
is put together in the one process that factorizes it, and no process holds more than one at a time. A process
that fails sends its error in place of a result, and all end with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn

from ..errors import TransitionError, one_line
from .sharded import is_sharded, world

Found = TypeVar("Found")

Layer = TypeVar("Layer", bound=nn.Module)


def turns(costs: Mapping[str, float]) -> Iterator[dict[int, str]]:
    """Who takes which layer, in turns of at most one layer a process: the costliest first, so that a turn's are alike.

    Args:
        costs: Of each layer, by name.

    Yields:
        Layers by the rank of the process that takes them.
    """
    _, size = world()
    names = sorted(costs, key=lambda name: -costs[name])
    for start in range(0, len(names), size):
        yield dict(enumerate(names[start : start + size]))


def share_out(
    layers: Mapping[str, Layer],
    read: Callable[[str, int], Any],
    work: Callable[[str, Any], Found],
    costs: Mapping[str, float],
    on_turn: Callable[[int], object] = lambda done: None,
) -> dict[str, Found]:
    """What `work` gives for every layer, done by one process each and known to all.

    Args:
        layers: By name; the same in every process.
        read: Reads what the work on a layer needs, given its name and the rank of the process that will work on it.
            It is called in that process alone, or in every one where the layer is sharded.
        work: Given a layer's name and what was read.
        costs: Of each layer, in any unit.
        on_turn: Called with the number of layers that were done.

    Raises:
        TransitionError: In every process, where any fails.
    """
    rank, size = world()
    found: dict[str, Found] = {}
    for turn in turns(costs):
        mine: Any = None
        for owner, name in turn.items():
            if is_sharded(layers[name]):
                given = read(name, owner)
                mine = given if owner == rank else mine
                del given
        result: list[Any] = [None, None]  # what was found, or an error
        if rank in turn:
            name = turn[rank]
            try:
                result[0] = work(name, mine if is_sharded(layers[name]) else read(name, rank))
            except Exception as error:
                if size == 1:
                    raise
                known = isinstance(error, TransitionError)
                result[1] = str(error) if known else f"{type(error).__name__}: {one_line(error)}"
        del mine
        for owner, name in turn.items():
            sent: list[Any] = result if owner == rank else [None, None]
            if size > 1:
                dist.broadcast_object_list(sent, src=owner)
            if sent[1] is not None:
                raise TransitionError(f"Process {owner} failed in layer {name!r}: {sent[1]}")
            found[name] = sent[0]
        on_turn(len(turn))
    return {name: found[name] for name in layers}
