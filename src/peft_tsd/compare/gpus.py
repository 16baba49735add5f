"""The GPUs of this machine, for runs that are to have one each."""

from __future__ import annotations

import os

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"
"""The environment variable that says which GPUs a process sees; CUDA reads it when it is first used."""


def visible_gpus() -> list[str]:
    """Those that this process may use, as `VISIBLE` names them: by number, or as it is set (ids, parts by MIG)."""
    count = gpu_count()
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(number) for number in range(count)]
    # CUDA stops at the first that there is not.
    return [name.strip() for name in given.split(",")][:count]


def gpu_count() -> int:
    """How many GPUs this process sees. Only counted: CUDA is not set up in it."""
    return torch.cuda.device_count()
