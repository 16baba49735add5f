"""Steps that nobody counts: said while they are taken, and not where the adapter is saved, hours later.

`advance` comes after a step, so that a step which was not counted is known when the next one is taken. Every optimizer
of PyTorch's comes by, and is watched for its first steps if it trains an adapter in pre-launch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..distributed.sharded import is_main_process
from ..tuner.directed import LAYERS, DirectedLayer
from ..tuner.phase import PrelaunchWarning, how_to_get_directions
from ..tuner.settings import DirectionSettings


@dataclass
class _Step:
    """The last step of an optimizer that is watched."""

    number: int
    trained: dict[str, DirectedLayer]
    """A layer of each adapter that the optimizer trains."""
    parameters: list[nn.Parameter]
    """Of those layers."""
    gradients: list[tuple[ReferenceType[Tensor], int]]
    """What was there at this step, and its version."""


_steps = 0  # taken while an optimizer is watched, by any

_watched: WeakKeyDictionary[Optimizer, _Step | None] = WeakKeyDictionary()
"""None for an optimizer that need not be watched any more, or at all."""


def note_counted(config: DirectionSettings) -> None:
    """The steps so far of the adapter with this configuration were counted, or found to be none."""
    config.counted_at = _steps


def _watch(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    global _steps
    last = _watched.get(optimizer)
    if last is None and optimizer in _watched:
        return
    if all(float(group.get("lr", 1)) == 0 for group in optimizer.param_groups):
        return  # a warm-up, or torch.distributed.checkpoint, which makes an optimizer's state by such a step
    if last is not None:
        if _unchanged(last):
            return  # no backward pass since: an optimizer that steps in parts
        for adapter, layer in last.trained.items():
            if layer.settings(adapter).counted_at < last.number and not layer.fixed(adapter).identified:
                _say_not_counted(layer.settings(adapter), adapter)
        _watched[optimizer] = None
        return
    trained, parameters = _trained_by(optimizer)
    if not trained:
        _watched[optimizer] = None
        return
    gradients = [(ref(p.grad), p.grad._version) for p in parameters if p.grad is not None]
    if gradients:  # otherwise nothing was moved
        _steps += 1
        _watched[optimizer] = _Step(_steps, trained, parameters, gradients)


register_optimizer_step_post_hook(torch.compiler.disable(_watch))  # type: ignore[no-untyped-call]


def _trained_by(optimizer: Optimizer) -> tuple[dict[str, DirectedLayer], list[nn.Parameter]]:
    """The adapters whose parameters `optimizer` holds, each with one of its layers; and the parameters of these."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    trained: dict[str, DirectedLayer] = {}
    parameters: list[nn.Parameter] = []
    for layer in list(LAYERS):
        for adapter in layer.active_adapters:
            if adapter in trained or not layer.carries(adapter) or not layer.trains(adapter):
                continue
            own = [p for name, p in layer.named_parameters() if f".{adapter}." in f".{name}." and id(p) in held]
            if own:
                trained[adapter] = layer
                parameters += own
    return trained, parameters


def _unchanged(last: _Step) -> bool:
    """Whether the gradients are those that were there at the `last` step."""
    there = [p.grad for p in last.parameters if p.grad is not None]
    return len(there) == len(last.gradients) > 0 and all(
        grad is seen() and grad._version == version for grad, (seen, version) in zip(there, last.gradients)
    )


def _say_not_counted(config: DirectionSettings, adapter: str) -> None:
    if config.prelaunch_notice_given:
        return
    config.prelaunch_notice_given = True
    if not is_main_process():
        return
    why = "with prelaunch_steps=0 they come from gradients: " if config.prelaunch_steps == 0 else ""
    warnings.warn(
        f"Adapter {adapter!r} ({config.method}) took an optimizer step that nobody counted, and stays in pre-launch, "
        f"without task-specific directions: {why}{how_to_get_directions(config)}",
        PrelaunchWarning,
        stacklevel=4,
    )
