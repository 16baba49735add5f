"""Which optimizer steps were taken.

A loop may call `step()` of a wrapped optimizer that does nothing: Accelerate's between the micro-batches that it
accumulates, a GradScaler's or DeepSpeed's where gradients overflow. What the wrapper says of it is not enough: with a
fused optimizer the scaler calls `step()`, and the kernel leaves everything as it is. So steps are counted where they
happen: in the innermost optimizer, after its own `step()`, less those that its kernel was told to leave out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..tuner.directed import DirectedLayer

Optimizers = Optimizer | Sequence[Optimizer]

_COUNT = "_peft_tsd_steps"
"""An optimizer's own count, where it is left: how often it stepped, and how often in vain."""

_IN_BACKWARD = ("AdaLomo", "Lomo")
"""Optimizers that step in the backward pass, and whose `step()` is not called."""

# The code of what PyTorch puts around `step()`, and calls hooks from. Before 2.7, torch.compile took it off again.
_HOOKED = Optimizer.profile_hook_step(lambda: None).__code__

_counted: WeakKeyDictionary[DirectedLayer, dict[str, WeakKeyDictionary[Any, int]]] = WeakKeyDictionary()


def _count(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    calls, in_vain = getattr(optimizer, _COUNT, (0, 0))
    # Set by GradScaler while it steps an optimizer that checks for overflow itself. Not read here: that would wait.
    overflow: Tensor | None = getattr(optimizer, "found_inf", None)
    if overflow is not None:
        with torch.no_grad():
            in_vain = in_vain + overflow.ne(0)
    setattr(optimizer, _COUNT, (calls + 1, in_vain))


register_optimizer_step_post_hook(_count)


def steps_of(optimizer: Any) -> int | None:
    """Steps that `optimizer`, or what it wraps, has taken since this package was imported; None where none tells."""
    inner = list(_nested(optimizer))
    if not any(map(_tells, inner)):
        return None
    counts = [getattr(one, _COUNT, (0, 0)) for one in inner]
    return sum(calls - int(in_vain) for calls, in_vain in counts)


def counts_now(layer: DirectedLayer, adapter: str, optimizer: Optimizers) -> bool:
    """Whether any of the optimizers has taken a step that was not counted yet for `adapter`. It is counted by this.

    Args:
        layer: Any layer of the adapter, always the same.
        adapter: Its name.
        optimizer: The optimizer, or all of them. One that does not tell counts as having stepped.
    """
    counted = _counted.setdefault(layer, {}).setdefault(adapter, WeakKeyDictionary())
    stepped = False
    for one in optimizer if isinstance(optimizer, Sequence) else [optimizer]:
        steps = steps_of(one)
        if steps is None:
            stepped = True
        elif steps > counted.get(one, 0):
            counted[one], stepped = steps, True
    return stepped


def _nested(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those it holds: `optimizer`, `base`, `base_optimizer`, ..., whatever a wrapper calls it."""
    seen: set[int] = set()
    waiting = [optimizer]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        held = vars(one) if hasattr(one, "__dict__") else {}
        waiting += [value for name, value in held.items() if isinstance(value, Optimizer) or name == "optimizer"]


def _tells(optimizer: Any) -> bool:
    """Whether the steps of `optimizer` itself come by."""
    if not isinstance(optimizer, Optimizer) or type(optimizer).__name__ in _IN_BACKWARD:
        return False
    step = getattr(type(optimizer), "step", None)
    return hasattr(optimizer, _COUNT) or getattr(step, "__code__", None) is _HOOKED
