"""What a training step needs, found before a weight is read: the step is taken on shapes alone.

On the meta device a tensor has a shape and no numbers. The denoiser's forward pass is done there with the adapter, the
resolution and the batch of the recipe: what does not fit together fails there, and what autograd keeps for the
backward pass is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import RecipeError, one_line


class Need(NamedTuple):
    """Bytes of device memory."""

    weights: int
    """Frozen weights."""
    trained: int
    """The adapters with their gradients and Adam's two moments, and the directions that they hold."""
    activations: int
    """What the backward pass needs of the forward pass, of one batch."""

    @property
    def total(self) -> int:
        return sum(self)


def step_need(models: Sequence[nn.Module], forward: Callable[[], Tensor], dtype: torch.dtype) -> Need:
    """Bytes that a training step needs.

    Args:
        models: The models that take part, on the meta device, with their adapters.
        forward: A forward pass of the whole batch.
        dtype: Of the frozen weights.
    """
    parameters = [parameter for model in models for parameter in model.parameters()]
    frozen = sum(p.numel() for p in parameters if not p.requires_grad)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    held = sum(buffer.nbytes for model in models for buffer in model.buffers())
    return Need(frozen * dtype.itemsize, trained * 4 * 4 + held, _saved_bytes(forward, parameters))


def _saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    owned = {p.untyped_storage()._cdata for p in parameters}
    # By the storage, because many saved tensors are views of one. The tensors are kept, so that none is given twice.
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in owned:
            kept[storage] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
        output = forward()
    del output
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what accelerators' fused kernels keep; on the meta device it would write out its matrix."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3])  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("shapes alone have no gradient")


def check_memory(need: Need, free: int, batch_size: int, resolution: int, checkpointing: bool) -> None:
    """Refuse a run that the accelerator cannot hold.

    Raises:
        RecipeError: With what is needed, what is free and what would need less.
    """
    if need.total <= free:
        return
    less = [f"a smaller data.resolution than {resolution}"]
    if batch_size > 1:
        less.insert(0, f"a smaller training.batch_size than {batch_size} with more training.gradient_accumulation")
    if not checkpointing:
        less.insert(0, "training.gradient_checkpointing=true")
    parts = f"weights {_gib(need.weights)}, adapter {_gib(need.trained)}, activations {_gib(need.activations)}"
    raise RecipeError(
        f"a training step needs about {_gib(need.total)} GiB of the accelerator's memory ({parts}) and "
        f"{_gib(free)} are free; give {', or '.join(less)}, or model.dtype=bfloat16"
    )


def free_memory() -> int | None:
    """Bytes free on the accelerator, or None where there is none."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None


def out_of_memory(error: BaseException, batch_size: int, resolution: int) -> RecipeError:
    """What to say when memory ran out all the same."""
    return RecipeError(
        f"out of memory with training.batch_size={batch_size} and data.resolution={resolution}: give smaller ones, "
        f"training.gradient_checkpointing=true or model.dtype=bfloat16, and resume=true ({one_line(error)[:120]})"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
