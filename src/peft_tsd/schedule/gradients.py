"""Gradients of frozen weights, for directions without a pre-launch.

The gradient of a loss with respect to a linear map's weight is `G = Σ dy xᵀ`, over tokens (or places of an image) with
input x and gradient dy of the output. It is summed up layer by layer while the backward pass goes by: the weights stay
frozen, and no parameter gets a `.grad`. A G is as large as its weight, so that layers are taken in groups, each with a
pass of its own over the batches.

Source of the change rate that G stands in for: Si et al., arXiv 2409.01035. One step of gradient descent changes a
weight by a multiple of G.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..tuner.directed import DirectedLayer

Loss = Callable[[nn.Module, Any], Tensor]


def loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    """The loss that transformers' models return: `model(**batch).loss`.

    Raises:
        ValueError: There is none, or the model does not take such a batch.
    """
    try:
        loss = getattr(model(**batch), "loss", None)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{type(model).__name__} does not take a batch as model(**batch), for directions from gradients: {error}; "
            "pass loss=, a function of the model and a batch, or give the configuration direction_source='weight'."
        ) from error
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"{type(model).__name__} returns no loss for a batch of {sorted(batch)}, for directions from gradients: "
            "give it labels, pass loss=, a function of the model and a batch, or give the configuration "
            "direction_source='weight'."
        )
    return loss


def weight_gradients(
    model: nn.Module, layers: Mapping[str, DirectedLayer], batches: Sequence[Any], loss: Loss, memory: float
) -> Iterator[dict[str, Tensor]]:
    """The gradient of the mean loss over `batches` with respect to each layer's frozen weight, (out, in), in groups;
    zero where none reaches the layer.

    The model is in evaluation mode meanwhile (but checkpoints activations where it would in training), and everything
    is put back after each group: modes, what requires gradients, random number generators. In distributed training
    each process gives its own batches, and all get the mean over processes.

    Args:
        model: The model, not wrapped.
        layers: Its layers, by name.
        batches: What `loss` takes, one at a time; gone through once for each group.
        loss: Of the model and a batch, a scalar.
        memory: Most bytes the gradients of one group take; a group has at least one layer.

    Raises:
        ValueError: `loss` gives no scalar.
    """
    for group in _groups(layers, memory):
        yield _gradients(model, group, batches, loss)


def _gradients(
    model: nn.Module, layers: Mapping[str, DirectedLayer], batches: Sequence[Any], loss: Loss
) -> dict[str, Tensor]:
    sums = {name: _zeros(layer) for name, layer in layers.items()}

    def add(name: str, x: Tensor, gradient: Tensor) -> None:
        sums[name] += layers[name].weight_gradient(x, gradient, sums[name].dtype)

    pass_by(model, layers, batches, loss, add)
    share = 1 / len(batches)
    for gradient in sums.values():
        gradient *= share
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(gradient)
            gradient /= torch.distributed.get_world_size()
    return sums


def pass_by(
    model: nn.Module,
    layers: Mapping[str, DirectedLayer],
    batches: Sequence[Any],
    loss: Loss,
    add: Callable[[str, Tensor, Tensor], None],
) -> None:
    """Take the loss of each batch back through the model, and hand over what passes each layer.

    Args:
        model, layers, batches, loss: As `weight_gradients`.
        add: Given a layer's name, its input and the gradient of its output, where one reaches it.

    Raises:
        ValueError: As `weight_gradients`.
    """
    # The one thing that requires a gradient, so that the backward pass comes by.
    anchor = torch.zeros((), requires_grad=True)

    def watch(name: str) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        def hand_over(x: Tensor, gradient: Tensor) -> None:
            add(name, x, gradient)

        return lambda module, inputs, result: _Watched.apply(result, inputs[0], anchor, hand_over)  # type: ignore[no-untyped-call]

    with undisturbed(model):
        handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
        try:
            for batch in batches:
                with torch.enable_grad():
                    value = loss(model, batch)
                    if value.ndim:
                        raise ValueError(f"The loss of a batch must be a scalar; got shape {tuple(value.shape)}.")
                    if value.requires_grad:
                        value.backward()  # type: ignore[no-untyped-call]
        finally:
            for handle in handles:
                handle.remove()


class _Watched(torch.autograd.Function):
    """The identity on a layer's output; in the backward pass it hands over the layer's input and the gradient."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, anchor: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        # Saved in this way, an input that a checkpoint drops is made again.
        ctx.save_for_backward(x)
        ctx.add = add
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        ctx.add(x, gradient)
        return gradient, None, None, None


def _groups(layers: Mapping[str, DirectedLayer], memory: float) -> Iterator[dict[str, DirectedLayer]]:
    group: dict[str, DirectedLayer] = {}
    taken = 0
    for name, layer in layers.items():
        size = math.prod(layer.matrix_shape) * _dtype(layer).itemsize
        if group and taken + size > memory:
            yield group
            group, taken = {}, 0
        group[name] = layer
        taken += size
    yield group


def _dtype(layer: DirectedLayer) -> torch.dtype:
    return torch.promote_types(layer.weight_dtype, torch.float32)


def _zeros(layer: DirectedLayer) -> Tensor:
    return torch.zeros(layer.matrix_shape, dtype=_dtype(layer), device=layer.weight_device)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Python's, NumPy's and torch's random number generators are afterwards as before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and frozen; afterwards as before, with the random number generators."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    try:
        with random_states_kept():
            for module in modes:
                # Transformers' layers checkpoint their activations in training mode alone.
                module.training = bool(getattr(module, "gradient_checkpointing", False))
            for parameter in trained:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
