"""The machine a run is done on."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import version
from typing import Any

import torch
from accelerate import PartialState  # type: ignore[import-untyped]

from ..distributed.sharded import world


def environment(*packages: str) -> dict[str, Any]:
    """Versions and hardware, for whoever reads a run's metrics later."""
    _, size = world()
    listed = ("peft-tsd", "torch", "transformers", "peft", "accelerate", *packages)
    return {
        "versions": {"python": platform.python_version(), **{name: version(name) for name in listed}},
        "machine": {
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            **({"processes": size} if size > 1 else {}),
        },
    }


def current_device() -> torch.device:
    """The device that Accelerate gives this process."""
    device: torch.device = PartialState().device
    return device


def peak_memory() -> int | None:
    """Most memory that was in use: the accelerator's where there is one, otherwise this process's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
