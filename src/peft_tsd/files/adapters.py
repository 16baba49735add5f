"""The files of a saved adapter: their names, and opening them safely."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from ..errors import AdapterError, one_line
from .whole import sha256

CONFIG, WEIGHTS, PICKLED, ORIGIN = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "origin.json",
)

LARGEST_CONFIG = 16 * 2**20
"""Bytes; the configuration of an adapter that names every layer of a large model has less than one MiB."""

PREFIX = "base_model.model."
"""What the names of tensors in an adapter's file start with."""


# What a wrapped block has in the names of what is below it: torch.compile, FSDP1, activation checkpoints.
_WRAPPING = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)")


def plain_name(name: str) -> str:
    """The name of a module or tensor without what torch.compile and its like have put into it."""
    return _WRAPPING.sub("", name)


def name_in_base(name: str) -> str:
    """The name that a module of an adapted model has in the base model, whatever the model is wrapped in."""
    return plain_name(name).split(PREFIX, 1)[-1]


def find_adapter(name: str) -> Path:
    """The folder of an adapter: a local one as it is, one of the hub fetched into its cache, without pickled files.

    Raises:
        AdapterError: There is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{name!r} is no adapter's folder, and cannot be fetched: {one_line(error)}") from None


def file_in(folder: Path, name: str) -> Path:
    """The regular file `name` in `folder`. In the hub's cache it may be a link to that repository's blobs."""
    path = folder / name
    if not path.is_file():
        if name == WEIGHTS and (folder / PICKLED).exists():
            raise AdapterError(
                f"{str(folder)!r} has {PICKLED}, which is pickled and not read; load the adapter where you trust it "
                f"and save it again with save_pretrained, which writes {WEIGHTS}"
            )
        raise AdapterError(f"{str(folder)!r} has no {name}; give the whole folder of an adapter")
    blobs = folder.resolve().parent.parent / "blobs" if folder.resolve().parent.name == "snapshots" else None
    if path.resolve().parent not in (folder.resolve(), blobs):
        raise AdapterError(
            f"{str(path)!r} is a link out of its folder, to {str(path.resolve())!r}; put the file there"
        )
    return path


def check_sum(path: Path) -> None:
    """Refuse weights that changed since the run that made them recorded their sum."""
    record = path.parent / ORIGIN
    if not record.is_file():
        return
    with told(record, "is damaged"):
        expected = json.loads(file_in(path.parent, ORIGIN).read_text(encoding="utf-8"))["weights"]
    if sha256(path) != expected:
        raise AdapterError(
            f"{str(path)!r} is not as it was written: its SHA-256 is not the one in {ORIGIN}; get it again, or remove "
            f"{ORIGIN} if you changed it yourself"
        )


def check_lora_types(content: dict[str, Any]) -> None:
    """What PEFT's dataclasses take unchecked, and layers are built from."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def rank(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value > 0

    def names(value: Any) -> bool:
        return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))

    def flag(value: Any) -> bool:
        return isinstance(value, bool)

    def each(check: Any) -> Any:
        return lambda value: isinstance(value, dict) and all(map(check, value.values()))

    checks: dict[str, Any] = {
        "r": rank,
        "lora_alpha": number,
        "lora_dropout": lambda value: number(value) and 0 <= value < 1,
        "rank_pattern": each(rank),
        "alpha_pattern": each(number),
        "target_modules": names,
        "exclude_modules": names,
        "modules_to_save": names,
        "use_rslora": flag,
        "fan_in_fan_out": flag,
        "lora_bias": flag,
        "bias": lambda value: value in ("none", "all", "lora_only"),
    }
    optional = {"rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "modules_to_save"}
    for key, check in checks.items():
        value = content.get(key)
        if key in content and not (value is None and key in optional) and not check(value):
            raise ValueError(f"its {key} is {short(value)}")
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        given = content.get(key)
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else ():
            _check_pattern(key, pattern)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"its {key} has {short(pattern)}, no regular expression: {error}") from None


def no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except AdapterError:
        raise
    except Exception as error:  # what reads a hostile file may stumble on anything in it
        raise AdapterError(f"{str(path)!r} {what}: {one_line(error)}") from None
