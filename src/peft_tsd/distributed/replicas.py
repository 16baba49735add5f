"""Buffers that every process holds whole: DDP is to leave them alone, and all processes must begin with the same.

DDP takes buffers for what a forward pass changes, and sends those of rank 0 to all at the beginning of each. Beside
the time that takes, what has been written to so is of no use to the backward pass of the forward pass before. Buffers
that it leaves alone it does not send when it is built either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .sharded import world


def leave_out_of_ddp(module: nn.Module, names: Collection[str]) -> None:
    """Have DDP, should it be built around `module`, not send around the buffers `names` of it."""
    names = {*getattr(module, "_ddp_params_and_buffers_to_ignore", ()), *names}
    setting: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    setting(module, sorted(names))


def check_alike(digests: Mapping[str, int], adapter: str) -> None:
    """Refuse processes that do not hold the same. Every process must call it.

    Args:
        digests: Of what this process holds, by layer.
        adapter: For the message.

    Raises:
        ValueError: In every process, where two differ.
    """
    _, size = world()
    if size == 1:
        return
    known: list[Mapping[str, int]] = [{} for _ in range(size)]
    dist.all_gather_object(known, digests)
    for rank, other in enumerate(known):
        differing = [name for name in {**known[0], **other} if known[0].get(name) != other.get(name)]
        if differing:
            raise ValueError(
                f"Process {rank} holds other directions of adapter {adapter!r} than process 0, in {len(differing)} of "
                f"{len(known[0])} layers, such as {differing[0]!r}: load the adapter in every process, or make it "
                "after torch.manual_seed with the same seed in each."
            )
