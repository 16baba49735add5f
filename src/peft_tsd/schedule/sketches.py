"""The leading singular directions of the gradient of every frozen weight, by sketches, in two passes over the batches.

No gradient is formed, and no weight is looked at: only what passes a layer by, its input and its output's gradient. So
it works on weights that are quantized, sharded, or both at once. What is kept is p columns a layer and side, and all
layers are done in the same two passes (`peft_tsd.directions.sketch`).
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..directions.sketch import Sketch, Triples
from ..distributed.sharded import world
from ..distributed.sharing import share_out
from ..errors import in_layer
from ..tuner.directed import DirectedLayer, Identified
from .gradients import Loss, pass_by


def along_gradients(
    model: nn.Module, batches: Sequence[Any], loss: Loss, layers: Mapping[str, DirectedLayer], adapter: str
) -> dict[str, Identified | None]:
    """The leading singular directions of the gradient as the directions of every layer, None where it is zero; see
    `gradient_triples`.
    """
    nums = {name: len(layer.fixed(adapter).indices) for name, layer in layers.items()}
    found = gradient_triples(model, layers, adapter, batches, loss, nums)

    def work(name: str, adapter: str) -> Identified | None:
        if name not in found or not len(found[name].s):
            return None
        return layers[name].along_gradient(adapter, found[name], zlib.crc32(name.encode()))

    return {name: in_layer(name, partial(work, name), adapter) for name in layers}


def gradient_triples(
    model: nn.Module,
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    batches: Sequence[Any],
    loss: Loss,
    nums: Mapping[str, int],
) -> dict[str, Triples]:
    """The leading singular triples of the gradient of the mean loss over `batches`, for each layer's frozen weight.

    In distributed training each process gives its own batches, as many as the others, and all get the triples of the
    mean over processes, the same bits in each. The model is left as it was (see `weight_gradients`).

    Args:
        model: The model, not wrapped.
        layers: Its layers, by name.
        adapter: The adapter that the directions are for.
        batches: What `loss` takes, one at a time; gone through twice.
        loss: Of the model and a batch, a scalar.
        nums: How many triples are wanted of each layer. A layer that no gradient reaches has none.

    Raises:
        ValueError: As `weight_gradients`.
        TransitionError: There is NaN or Inf in a layer's gradient.
    """
    sketches: dict[str, Sketch] = {}

    def sketch_of(name: str, like: Tensor) -> Sketch:
        if name not in sketches:
            # Another Ω for each layer, and the same in every process and run.
            sketches[name] = Sketch(layers[name].matrix_shape, nums[name], zlib.crc32(name.encode()), like)
        return sketches[name]

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        sketch_of(name, x).add(*layers[name].rows(x, gradient))

    for is_first in (True, False):
        pass_by(model, layers, batches, loss, add)
        for name in _reached_anywhere(layers, sketches):
            # Of an expert all of whose tokens are in another process, this one has nothing to add.
            place = layers[name].stepped(adapter).device
            sketch = sketch_of(name, torch.empty(0, dtype=layers[name].weight_dtype, device=place))
            if world()[1] > 1:
                torch.distributed.all_reduce(sketch.sums)
            if is_first:
                in_layer(name, partial(_turn, sketch), adapter)
    share = 1 / (len(batches) * world()[1])

    def work(name: str, sketch: Sketch) -> Triples:
        u, s, v, norm = in_layer(name, lambda adapter: sketch.triples(), adapter)
        return Triples(u.cpu(), share * s.cpu(), v.cpu(), share * norm)

    reached = {name: layers[name] for name in layers if name in sketches}
    costs = {name: float(sum(layer.matrix_shape)) for name, layer in reached.items()}
    return share_out(reached, lambda name, _: sketches[name], work, costs)


def _turn(sketch: Sketch, adapter: str) -> None:
    sketch.turn()


def _reached_anywhere(layers: Mapping[str, DirectedLayer], reached: Collection[str]) -> list[str]:
    """The layers that a gradient reached in this or another process, in the model's order."""
    _, size = world()
    known: list[Any] = [sorted(reached)]
    if size > 1:
        known = [None] * size
        torch.distributed.all_gather_object(known, sorted(reached))
    anywhere = set().union(*known)
    return [name for name in layers if name in anywhere]
