"""From pre-launch over the transition to the dash: `TsdCallback` for Trainers, `advance` for any other loop.

Both count *optimizer steps that were taken*, in the adapter's own saved state, so that gradient accumulation, skipped
steps, gradient checkpointing, evaluation and a resumed run change nothing. The transition happens between two steps:
the directions of every layer are found first, one layer at a time, and only then is anything written.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from ..distributed.replicas import check_alike
from ..distributed.sharded import is_main_process, world
from ..models.wrapped import unwrapped
from ..tuner.directed import DirectedLayer, Identified
from ..tuner.held import FixedDirections
from ..tuner.phase import adapted_layers, any_layer, config_of, phase_of, steps_taken
from .first_step import step_down
from .gradients import Loss, loss_of_output, weight_gradients
from .missed import note_counted
from .moments import check_groups
from .prelaunch import prelaunch_is_over
from .sketches import along_gradients
from .taken import counts_now
from .transition import identified, transition

log = logging.getLogger(__name__)

# What was done once for an adapter, by what its first layer holds, or all: an adapter's own, as a layer is not.
_known: WeakSet[FixedDirections] = WeakSet()
_waits: WeakSet[FixedDirections] = WeakSet()
_checked: WeakSet[FixedDirections] = WeakSet()


def advance(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], adapter_name: str | None = None) -> bool:
    """Count an optimizer step that was taken, and make the transition when the pre-launch is over.

    Call it once after each `optimizer.step()` of your own loop, on every process. Where that did nothing, because a
    wrapper accumulates gradients (Accelerate, DeepSpeed) or leaves out a step that overflows (GradScaler), nor does
    this:

        ```py
        >>> loss.backward()
        >>> optimizer.step()
        >>> advance(model, optimizer)
        >>> optimizer.zero_grad()
        ```

    A layer that has not changed by the end of the pre-launch (an expert that saw no token) has no task-specific
    directions, and goes on without. Where none has, as with a learning rate of 0, the transition waits for the first
    step that changes any; both are said in a warning.

    Args:
        model: The model with TSD adapters, wrapped (DDP, torch.compile, Accelerate) or not.
        optimizer: The optimizer of the adapter's parameters, wrapped or not, or all of them. LoRA-Init and LoRA-TSD
            clear its moments of A and B at the transition; its schedule goes on.
        adapter_name: The adapter trained; every active, trainable adapter by default.

    Returns:
        Whether this call made the transition.

    Raises:
        ValueError: The model has no trainable TSD adapter, or one without a pre-launch whose directions have not been
            identified from gradients; or adapters are merged; or processes begin with different directions; or the
            optimizer trains Δσ at LoRA+'s rate for B.
        TransitionError: At the transition, the optimizer does not hold A and B, or a layer's ΔW or weight holds NaN or
            Inf (which a check of an automatic pre-launch may find before). Nothing but the step count is changed then.
    """
    adapters = [adapter_name] if adapter_name is not None else trained_adapters(model)
    moved = False
    for adapter in adapters:
        layers = adapted_layers(model, adapter)
        if not layers:
            raise ValueError(f"The model has no TSD layer with an adapter {adapter!r}.")
        check_unmerged(layers, adapter)
        check_replicas(layers, adapter)
        waiting = phase_of(layers, adapter) == "pre-launch"
        config = config_of(layers, adapter)
        note_counted(config)
        config.settle_prelaunch()
        if waiting and config.needs_gradients and steps_taken(layers, adapter) >= config.longest_prelaunch:
            where = "before the first step" if config.prelaunch_steps == 0 else "before the step after those"
            raise ValueError(
                f"Adapter {adapter!r} has prelaunch_steps={config.prelaunch_steps} and no directions: call "
                f"identify_from_gradients(model, batches, optimizer) {where}, or give it "
                + ("a pre-launch." if config.direction_source == "weight" else "direction_source='weight'.")
            )
        first = any_layer(layers).fixed(adapter)
        if first not in _known:
            check_groups(layers, adapter, optimizer)
            _known.add(first)
        if not counts_now(any_layer(layers), adapter, optimizer):
            continue
        with torch.no_grad():
            torch._foreach_add_([layer.fixed(adapter).step for layer in layers.values()], 1)
        if waiting and not config.needs_gradients and prelaunch_is_over(layers, adapter):
            if transition(layers, adapter, optimizer):
                moved = True
            else:
                _say_it_waits(layers, adapter)
    return moved


def identify_from_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    adapter_name: str | None = None,
    *,
    loss: Loss = loss_of_output,
    memory_gib: float = 1.0,
) -> None:
    """Make the transition now, from the gradient G of the mean loss over `batches` with respect to each frozen weight.

    With `direction_source="gradient"` the directions are the leading singular directions of G, found by sketches in
    two passes over the first half of the batches; then a first step is taken along them, as long as lowers the loss of
    the other half most (with `first_step=False` none is, and all batches are for the gradient). With `"weight"` they
    are the core directions of highest `|u_iᵀ G v_i| / (σ_i + ε)`, so that LoRA-Dash learns along its directions, and
    LoRA-Init starts from them, without a pre-launch:

        ```py
        >>> model = get_peft_model(base, TsdConfig(prelaunch_steps=0, ...))
        >>> identify_from_gradients(model, islice(dataloader, 8))
        ```

    Call it before the first step (with directions of the gradient: after `prelaunch_steps`), on every process, with as
    many batches of its own: all find the directions of the mean. No weight is written to and no `.grad` left, and
    training goes on as it would have: modes and random number generators are put back. A layer whose gradient
    is zero has no directions, and goes on without.

    Args:
        model: The model with TSD adapters, wrapped (DDP, torch.compile, Accelerate) or not.
        batches: A few batches, on the model's device.
        optimizer: The optimizer, or all of them; needed where it has stepped before.
        adapter_name: The adapter; every active, trainable adapter by default.
        loss: The loss of the model and a batch, a scalar; `model(**batch).loss` by default.
        memory_gib: With `direction_source="weight"`, most memory that gradients take at one time, on the weights'
            device. A gradient is as large as its weight in float32; layers are taken in groups that fit (at least one
            layer each), with a pass over the batches for each group.

    Raises:
        ValueError: There is no such adapter, no batch, no loss, or no gradient but zero in any layer; or the
            directions have been identified before.
        TransitionError: As `advance`.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give a few batches of training data.")
    if not memory_gib > 0:
        raise ValueError(f"memory_gib must be a positive number of GiB; got {memory_gib!r}.")
    bare = unwrapped(model)
    for adapter in [adapter_name] if adapter_name is not None else trained_adapters(bare):
        layers = adapted_layers(bare, adapter)
        if not layers:
            raise ValueError(f"The model has no TSD layer with an adapter {adapter!r}.")
        check_unmerged(layers, adapter)
        check_replicas(layers, adapter)
        if phase_of(layers, adapter) == "dash":
            raise ValueError(f"The directions of adapter {adapter!r} have been identified before.")
        config = config_of(layers, adapter)
        steps = config.begins_with_step
        half = -(-len(batches) // 2) if steps else len(batches)
        if config.direction_source == "gradient":
            find = partial(along_gradients, bare, batches[:half], loss)
        else:
            find = partial(_from_gradients, bare, batches, loss, memory_gib * 2**30)
        # What was compiled before a hook was put on a layer in it does not call the hook.
        with torch.compiler.set_stance("force_eager"):
            found = transition(layers, adapter, optimizer, find)
            if steps and found:
                step_down(bare, layers, adapter, found, batches[half:] or batches, loss)
        if not found:
            raise ValueError(
                f"No gradient but zero reached {next(iter(layers))!r} or any of {len(layers)} layers: give a loss "
                "that depends on them, and batches whose labels are not all ignored; where activations are "
                "checkpointed with use_reentrant=True, call model.enable_input_require_grads() before."
            )


def check_unmerged(layers: Mapping[str, DirectedLayer], adapter: str) -> None:
    """Refuse to train while adapters are merged.

    Raises:
        ValueError: They are.
    """
    merged = [layer for layer in layers.values() if layer.merged]
    try:
        for layer in merged:
            layer.check_unmerged()
    except ValueError as error:
        raise ValueError(f"Adapter {adapter!r} cannot be trained: {error}") from None


def _say_it_waits(layers: Mapping[str, DirectedLayer], adapter: str) -> None:
    first = any_layer(layers).fixed(adapter)
    if first not in _waits and is_main_process():
        log.warning(
            "The pre-launch of adapter %r is over after %d steps, and no layer has changed: a learning rate of 0, or "
            "no gradient. The directions are identified after the first step that changes any.",
            adapter,
            steps_taken(layers, adapter),
        )
    _waits.add(first)


def _from_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    memory: float,
    layers: Mapping[str, DirectedLayer],
    adapter: str,
) -> dict[str, Identified | None]:
    """The directions of every layer from the gradient of its frozen weight."""
    found: dict[str, Identified | None] = {}
    for group in weight_gradients(model, layers, batches, loss, memory):
        found |= identified({name: layers[name] for name in group}, adapter, group.pop)
    return {name: found[name] for name in layers}


def check_replicas(layers: Mapping[str, DirectedLayer], adapter: str) -> None:
    """Refuse, the first time, processes that do not hold the same directions, or have not taken as many steps.

    Raises:
        ValueError: As `check_alike`.
    """
    held = {name: layer.fixed(adapter) for name, layer in layers.items()}
    if not _checked.issuperset(held.values()):
        check_alike({name: fixed.digest() for name, fixed in held.items()} if world()[1] > 1 else {}, adapter)
        _checked.update(held.values())


def trained_adapters(model: nn.Module) -> list[str]:
    """The TSD adapters of `model` that are active and trainable, in the order of their layers.

    Raises:
        ValueError: There is none.
    """
    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, DirectedLayer):
            for adapter in module.active_adapters:
                if module.carries(adapter) and module.trains(adapter):
                    found[adapter] = None
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no active, trainable TSD adapter. Make one with "
            "get_peft_model(base, TsdConfig(...)), or load one with is_trainable=True."
        )
    return list(found)
