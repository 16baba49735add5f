"""Parameters that are sharded over the processes: by FSDP2, as `DTensor`s, or by ZeRO-3 (see `zero`).

Reading one takes all processes, so that what reads them must be called in each process, at the same time.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from . import zero


def world() -> tuple[int, int]:
    """This process's rank, and how many processes there are; (0, 1) outside of distributed training."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_main_process() -> bool:
    """Whether this process is the one that writes and reports: rank 0, or the only one."""
    return world()[0] == 0


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter of `module` is sharded."""
    return any(isinstance(parameter, DTensor) or zero.is_split(parameter) for parameter in module.parameters())


def shape_of(parameter: Tensor) -> torch.Size:
    """The shape of a parameter, whole."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """`tensor`, detached, and put together in every process where it is sharded."""
    if isinstance(tensor, DTensor):
        together: Tensor = tensor.full_tensor()
        return together.detach()
    if zero.is_split(tensor) and not zero.is_here(tensor):
        found = zero.gather(tensor)
        assert found is not None
        return found
    return tensor.detach()


def whole_state(model: nn.Module, prefix: str | None) -> dict[str, Tensor] | None:
    """The state dict of a sharded model, whole; None where nothing is sharded. Every process must ask.

    Args:
        model: The model.
        prefix: Of an adapter's parameters: those, and whatever is trained, are put together, and frozen ones of the
            base are left out. None for all.
    """
    if not is_sharded(model):
        return None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        parameter = parameters.get(name, tensor)
        if prefix is None or name not in parameters or prefix in name or parameter.requires_grad:
            state[name] = whole(parameter).cpu()
    return state


@torch.no_grad()
def assign(parameter: Tensor, value: Tensor) -> None:
    """Copy `value`, which every process has, into `parameter`, or into this process's shard of it."""
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        value = value.to(parameter.to_local()).expand(parameter.shape)
        everywhere = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)
        parameter.to_local().copy_(everywhere.redistribute(mesh, parameter.placements).to_local())
    else:
        zero.assign(parameter, value.to(parameter).expand(shape_of(parameter)))


def gathered(parameter: Tensor, owner: int) -> Tensor | None:
    """A sharded parameter put together in the process `owner`; None in the others. Every process must ask.

    Raises:
        ValueError: It is sharded in another way than by FSDP or ZeRO.
    """
    if zero.is_split(parameter):
        return zero.gather(parameter, owner)
    assert isinstance(parameter, DTensor)
    split = [(axis, placement) for axis, placement in enumerate(parameter.placements) if placement != Replicate()]
    axis, placement = split[0] if len(split) == 1 else (0, None)
    if type(placement) is not Shard:
        raise ValueError(
            f"its base weight is laid out over processes as {parameter.placements}; what can be put together is one "
            "sharded dimension, as FSDP2 makes it. Train without tensor parallelism."
        )
    group = parameter.device_mesh.get_group(axis)
    members = dist.get_process_group_ranks(group)
    if owner not in members:  # of another replica, which puts its own shards together
        return None
    # The sharded dimension first: equal parts but for the last ones, which are padded.
    size = parameter.shape[placement.dim]
    rows = -(-size // len(members))
    part: Tensor = parameter.to_local().detach().movedim(placement.dim, 0)
    part = F.pad(part, (0, 0) * (part.ndim - 1) + (0, rows - len(part))).contiguous()
    if dist.get_rank() != owner:
        dist.gather(part, dst=owner, group=group)
        return None
    together = part.new_empty(rows * len(members), *part.shape[1:])
    dist.gather(part, list(together.chunk(len(members))), dst=owner, group=group)
    return together[:size].movedim(0, placement.dim)
