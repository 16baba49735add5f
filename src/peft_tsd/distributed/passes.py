"""Forward passes of a sharded model: each takes all processes, so that every one must make as many.

Where processes work on rows of their own, one is done before another. It then goes on with passes of a single token,
of which it drops what comes out, until all are done. Before each pass the processes add up how many of them have
something to do; the last sum is zero, and all leave together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from . import zero
from .sharded import is_sharded


def moves_as_one(model: nn.Module) -> bool:
    """Whether ZeRO-3 has split `model`: it fetches ahead what it has seen used, so that all must make equal passes."""
    return any(zero.is_split(parameter) for parameter in model.parameters())


@contextmanager
def in_step(model: nn.Module) -> Iterator[None]:
    """Within it each process makes as many forward passes of `model` as it needs; all enter and leave together.

    Nothing is done about a model that is not sharded; of one that moves as one all are to make the same passes.

    Args:
        model: A model of transformers' or PEFT's, on its device.
    """
    if not is_sharded(model):
        yield
        return
    outer: Any = model
    inner = outer.get_base_model() if hasattr(outer, "get_base_model") else outer
    device = next(model.parameters()).device
    token = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}
    token["attention_mask"] = torch.ones_like(token["input_ids"])

    def working(count: int) -> int:
        total = torch.tensor(count, device=device)
        dist.all_reduce(total)
        return int(total)

    if isinstance(model, FSDPModule):
        # What is in no block of its own (embeddings, the head) stays whole: writing begins below the outermost module.
        model.set_reshard_after_forward(False, recurse=False)
    with torch.no_grad():
        # Not in inference mode, whose tensors the backward passes after it could not use. It begins at the outermost
        # module, where ZeRO-3 learns which weights a layer reads of another.
        model(**token)
    if moves_as_one(model):
        yield
        return

    # Each pass goes through the body once; an adapter calls the `forward` of the model around it, and no hook of that.
    def before_pass(*_: Any) -> None:
        working(1)

    hook = inner.base_model.register_forward_pre_hook(before_pass)
    try:
        yield
    finally:
        hook.remove()
    with torch.no_grad():
        while working(0):
            inner(**token)
    if isinstance(model, FSDPModule):
        model.set_reshard_after_forward(True, recurse=False)
        model.reshard()
