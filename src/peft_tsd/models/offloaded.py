"""Weights that Accelerate has put away, into another memory or onto disk.

They are on the meta device but while their module is called: its hook brings them to the device that computes, and
puts them away again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def computes_on(module: nn.Module) -> torch.device | None:
    """The device that a module whose weights are offloaded computes on; None where they are not."""
    devices = [hook.execution_device for hook in _offloading(module)]
    return torch.device(devices[0]) if devices and devices[0] is not None else None


@contextmanager
def brought_in(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The weights of modules that are used without being called are there meanwhile, as in a call."""
    held = [(module, hook) for module in modules for hook in _offloading(module)]
    try:
        for module, hook in held:
            hook.pre_forward(module)
        yield
    finally:
        for module, hook in held:
            hook.post_forward(module, None)


def _offloading(module: nn.Module) -> list[Any]:
    hook: Any = getattr(module, "_hf_hook", None)
    return [one for one in getattr(hook, "hooks", (hook,)) if getattr(one, "offload", False) is True]
