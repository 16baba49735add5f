"""How much memory do directions take on many GPUs, and how long, by shapes and by rates that are assumed?

    python benchmarks/many_gpus.py            # the table of docs/many-gpus.md

Nothing is measured here: the shapes are LLaMA's, the rates are the constants below, which are yours to change, and the
formulas stand beside them. LoRA-TSD on q, k, v, up and down, r = 8, s = 8, the base in bfloat16, the adapter in
float32 with AdamW, FSDP2 over W GPUs. Decimal units.
"""

from __future__ import annotations

import math
from typing import NamedTuple

GPUS = (8, 64, 256, 1024)

R, S = 8, 8
"""LoRA's rank, and directions a layer."""
OVERSAMPLING = 8
"""Columns of a sketch more than the layer holds directions (`peft_tsd.directions.sketch`)."""

# What a GPU and its network are taken to do: an H100 in nodes of 8, with a part of what its data sheet says.
OPERATIONS = 11
"""float64 operations of a factorization for each unit of k²·max: 2 for the Gram matrix, 9 for its eigendecomposition
(k = max)."""
FACTORIZING = 5e11
"""Of these, how many a second. Two CPU cores do 1e11 (`identify.py --growth`); a data sheet says 6.7e13, of which an
eigendecomposition reaches a small part."""
SKETCHING = 2e13
"""float32 operations a second of a sketch's skinny products."""
TRAINING = 4e14
"""bfloat16 operations a second of a pass through the model."""
WITHIN = 2e11
"""Bytes a second that one GPU gets from the others of its node."""
BETWEEN = 4e10
"""Bytes a second that one GPU gets from other nodes."""
NODE = 8
"""GPUs a node."""
DISK = 2e9
"""Bytes a second of the file system, for one writer."""
BATCHES, TOKENS = 4, 4096
"""Batches a GPU for the gradient, and tokens a batch."""


class Model(NamedTuple):
    """LLaMA's shapes."""

    name: str
    parameters: float
    layers: int
    hidden: int
    inner: int
    kv: int

    def weights(self) -> list[tuple[int, int]]:
        """(out, in) of the adapted weights: q, k, v, up and down of each layer."""
        h, f, kv = self.hidden, self.inner, self.kv
        return [(h, h), (kv, h), (kv, h), (f, h), (h, f)] * self.layers


MODELS = (
    Model("7B", 6.74e9, 32, 4096, 11008, 4096),
    Model("70B", 70.6e9, 80, 8192, 28672, 1024),
    Model("405B", 405.9e9, 126, 16384, 53248, 1024),
)


class Row(NamedTuple):
    """What one GPU of W holds, in bytes, and how long things take, in seconds."""

    model: str
    gpus: int
    base: float
    adapter: float
    directions: float
    sketches: float
    transition: float
    finding: float
    sketching: float
    sent: float
    checkpoint: float
    writing: float


def row(model: Model, gpus: int) -> Row:
    """The formulas."""
    weights = model.weights()
    sides = sum(out + inner for out, inner in weights)
    held = max(R, S)  # with a start along the directions
    scalars = R * sides + S * len(weights)
    # A, B and Δσ with their gradients and two moments, in float32, sharded.
    adapter = 4 * 4 * scalars / gpus
    # U, V, and A₁, B₁ of the pre-launch: whole in every process.
    directions = 4 * (held + R) * sides
    # Sums of one side and Ω or Q of the other, p columns of float32, whole in every process.
    sketches = 4 * (held + OVERSAMPLING) * sides
    # The largest weight put together, and what factorizing it takes: 4.2 k x k matrices in float64.
    largest = max(weights, key=math.prod)
    transition = 2 * math.prod(largest) + 4.2 * 8 * min(largest) ** 2
    # In turns of W weights, the costly ones first; a turn takes as long as its first.
    costs = sorted((min(shape) ** 2 * max(shape) for shape in weights), reverse=True)
    speed = WITHIN if gpus <= NODE else BETWEEN
    # Each weight is gathered by who factorizes it, one after the other, and what was found is sent to all, directions
    # and the start of A and B.
    sent = 4 * (S + R) * sides
    finding = OPERATIONS * sum(costs[::gpus]) / FACTORIZING + (2 * sum(map(math.prod, weights)) + sent) / speed
    # Two passes forward and backward, of 6 operations a parameter and token, for which FSDP gathers all weights twice;
    # in each two products with p columns a side; the sums are reduced over all, which sends them twice, and what was
    # found, in float64, is sent to all.
    tokens = BATCHES * TOKENS
    passes = max(2 * 6 * model.parameters * tokens / TRAINING, 2 * 2 * BATCHES * 2 * model.parameters / speed)
    products = 2 * 2 * tokens * (held + OVERSAMPLING) * sides / SKETCHING
    sketching = passes + products + (2 * sketches + 8 * held * sides) / speed
    # The adapter, its two moments, and the directions once.
    checkpoint = 4 * 3 * scalars + directions
    return Row(
        model.name,
        gpus,
        2 * model.parameters / gpus,
        adapter,
        directions,
        sketches,
        transition,
        finding,
        sketching,
        sent,
        checkpoint,
        checkpoint / DISK,
    )


def size(number: float) -> str:
    """Bytes, in GB with two digits that count."""
    return f"{number / 1e9:.2g}" if number < 1e11 else f"{number / 1e9:.0f}"


def seconds(number: float) -> str:
    """A time that is read at once."""
    if number < 90:
        return f"{number:.2g} s"
    if number < 5400:
        return f"{number / 60:.0f} min"
    return f"{number / 3600:.1f} h"


def table() -> str:
    """What the page has."""
    heads = ("", "GPUs", "base", "adapter", "directions", "sketches", "transition", "sent", "checkpoint")
    times = ("from weights", "from gradients", "writing")
    lines = [heads + times, ("---",) * (len(heads) + len(times))]
    for model in MODELS:
        for gpus in GPUS:
            one = row(model, gpus)
            sizes = (one.base, one.adapter, one.directions, one.sketches, one.transition, one.sent, one.checkpoint)
            took = (one.finding, one.sketching, one.writing)
            lines.append((one.model, str(gpus), *map(size, sizes), *map(seconds, took)))
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


if __name__ == "__main__":
    print(table())
