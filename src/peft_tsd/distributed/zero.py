"""DeepSpeed's ZeRO, as far as directions have to know of it.

Stages 1 and 2 keep a float32 copy of what is trained in the optimizer, flattened and split over the processes. Stage 3
splits the parameters themselves too: `parameter.data` is empty outside of a forward pass, and `parameter.ds_tensor`
holds this process's part of the flattened whole, of equal size in every process, so that the last is padded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def is_split(parameter: Tensor) -> bool:
    """Whether stage 3 has split `parameter`."""
    return hasattr(parameter, "ds_tensor")


def is_here(parameter: Any) -> bool:
    """Whether a parameter that was split is whole at the moment: stage 3 leaves small ones so."""
    return bool(parameter.ds_status.name == "AVAILABLE")


def is_copied(parameter: Tensor) -> bool:
    """Whether the optimizer trains a copy of `parameter`."""
    return parameter.requires_grad and (hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer"))


def gather(parameter: Any, owner: int | None = None) -> Tensor | None:
    """A split parameter, put together in every process, or in `owner` alone and None in the others."""
    group, part = parameter.ds_process_group, parameter.ds_tensor.to(parameter.device)
    members = dist.get_process_group_ranks(group)
    if owner is not None and owner not in members:
        return None
    here = owner is None or owner == dist.get_rank()
    flat = part.new_empty(part.numel() * len(members)) if here else part
    parts = list(flat.chunk(len(members)))
    if owner is None:
        dist.all_gather(parts, part, group=group)
    else:
        dist.gather(part, parts if here else None, dst=owner, group=group)
    return flat[: parameter.ds_numel].view(parameter.ds_shape) if here else None


@torch.no_grad()
def assign(parameter: Any, value: Tensor) -> None:
    """Copy `value`, which every process has, into a parameter that is split, or of which the optimizer has a copy."""
    if is_split(parameter):
        part = parameter.ds_tensor
        members = dist.get_world_size(parameter.ds_process_group)
        flat = F.pad(value.flatten(), (0, part.numel() * members - value.numel()))
        mine = flat.chunk(members)[dist.get_rank(parameter.ds_process_group)].to(part)
        part.copy_(mine)
    if not is_split(parameter) or is_here(parameter):
        parameter.data.copy_(value)
    if is_copied(parameter):
        if is_split(parameter):
            parameter._z3_optimizer.set_local_hp_param(mine.float(), parameter)
        else:
            parameter.set_full_hp_param(parameter.data.float())


@torch.no_grad()
def forget(parameter: Any, optimizer: Any) -> None:
    """Bring `optimizer`, DeepSpeed's or the one in it, to where it had not stepped with `parameter` yet.

    Steps are counted for all parameters together there: the count starts anew for all. Those that are not forgotten
    take smaller steps for a while, as in a warm-up.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    if is_split(parameter):
        keys = {key for state in optimizer.state.values() for key, value in state.items() if _is_moment(value)}
        for key in keys:
            parameter._z3_optimizer.set_local_hp_param(torch.zeros_like(parameter.ds_tensor), parameter, key)
    elif parameter._hp_mapping is not None:  # None where another process holds it
        for moment in (parameter._hp_mapping.optim_fragment or {}).values():
            moment.zero_()
    for state in (*optimizer.state.values(), *optimizer.param_groups):
        if isinstance(state.get("step"), Tensor):
            state["step"].zero_()
        elif "step" in state:
            state["step"] = 0


def _is_moment(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
