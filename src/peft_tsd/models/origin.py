"""What an adapter was trained on: recorded beside it, and compared where it is used again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import AdapterError, one_line
from ..files.adapters import ORIGIN, WEIGHTS
from ..files.whole import sha256, write_text

SAMPLES = 256
"""Numbers read of every parameter."""


class Fingerprint(NamedTuple):
    """Tells one base model from another."""

    dtype: str
    """Of its weights, and how they are quantized; those of another dtype were rounded, and cannot be compared."""
    sha256: str
    """Of the names, shapes and a sample of every parameter."""

    def agrees_with(self, other: Fingerprint) -> bool:
        """Whether both can be of one model."""
        return self.dtype != other.dtype or self.sha256 == other.sha256


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a base model, before an adapter is put on it. The head, new in a classifier, is left out.

    Of each parameter `SAMPLES` numbers at even distances are read, so that a model of any size takes no time.
    """
    body = getattr(model, "base_model", model)
    digest = hashlib.sha256()
    dtype = torch.float32
    packed = set()
    for name, parameter in body.named_parameters():
        dtype = parameter.dtype
        if type(parameter) is not nn.Parameter:
            packed.add(type(parameter).__name__)
        stored = parameter.data
        flat = (stored if type(stored) is torch.Tensor else stored.dequantize()).flatten()
        places = torch.linspace(0, len(flat) - 1, min(SAMPLES, len(flat)), dtype=torch.float64).long()
        sample = flat[places.to(flat.device)].cpu().contiguous()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return Fingerprint(", ".join([str(dtype).removeprefix("torch."), *sorted(packed)]), digest.hexdigest())


def write_origin(folder: Path, base: Fingerprint) -> None:
    """Record what the adapter in `folder` was trained on, and the sum of its weights."""
    content = {"base": base._asdict(), "weights": sha256(folder / WEIGHTS)}
    write_text(folder / ORIGIN, json.dumps(content, indent=2) + "\n")


def read_fingerprint(content: Any, where: Path) -> Fingerprint | None:
    """The fingerprint that a run recorded under `base`; None where it had not come to that.

    Raises:
        AdapterError: What stands there is no fingerprint.
    """
    if "base" not in content:
        return None
    try:
        return Fingerprint(**content["base"])
    except TypeError as error:
        raise AdapterError(f"{str(where)!r} is damaged: {one_line(error)}; bring it back") from None


def check_base(folder: Path, base: Fingerprint, name: str) -> None:
    """Refuse a base model that the adapter in `folder` was not trained on, as far as that was recorded.

    Raises:
        AdapterError: It is another one; `name` is what it was given as.
    """
    path = folder / ORIGIN
    if not path.is_file():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        recorded = read_fingerprint(content, path)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise AdapterError(f"{str(path)!r} is damaged: {one_line(error)}; bring it back, or remove it") from None
    if recorded is not None and not recorded.agrees_with(base):
        raise AdapterError(
            f"{str(folder)!r} was trained on other weights than those of {name!r}; give the model it was trained on "
            "with model.name=NAME"
        )
