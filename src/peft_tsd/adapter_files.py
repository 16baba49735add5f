"""Checks an adapter's files before anything is built from them: they may be damaged, or made to do harm.

Nothing in them is run (no pickle is read), nothing outside of their folder is opened, and no memory is taken that the
tensors do not take up on disk already.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from .config import REFUSED_FIELDS, TsdConfig, without_weights
from .dispatch import create_layer
from .errors import RecipeError, did_you_mean, one_line
from .folders import sha256

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

# Some methods call another, small, number r, which no tensor needs to have.
_ORDINARY = 1024


def check_adapter(folder: str | os.PathLike[str]) -> PeftConfig:
    """Refuse the files of an adapter that cannot be trusted to be whole and harmless.

    Checked are: that both files lie in the folder, and are not pickled; that the configuration has the types and sizes
    that its tensors confirm; tensor names; that every number is finite; that no layer lacks a part; and, where the
    folder records the sum of its weights (those of a run do), that they are as they were written. For a TSD adapter
    also that all its layers are in one phase.

    Args:
        folder: A local folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The configuration.

    Raises:
        RecipeError: In one line, what is wrong.
    """
    folder = Path(folder)
    config = check_config(folder)
    check_weights(folder / WEIGHTS, config)
    return config


def check_if_local(folder: Path) -> None:
    """`check_adapter`, where `folder` is a local one with an adapter's weights. A configuration may lie alone."""
    if (folder / CONFIG).is_file() and any((folder / name).exists() for name in (WEIGHTS, PICKLED)):
        check_adapter(folder)


def find_adapter(name: str) -> Path:
    """The folder of an adapter: a local one as it is, one of the hub fetched into its cache, without pickled files.

    Raises:
        RecipeError: There is neither.
    """
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS]))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{name!r} is no adapter's folder, and cannot be fetched: {one_line(error)}") from None


def check_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The first half of `check_adapter`: the configuration by itself."""
    folder = Path(folder)
    path = _file_in(folder, CONFIG)
    with _told(path, "cannot be used"):
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a configuration")
        kinds = {str(getattr(kind, "value", kind)): kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
        kind = content.get("peft_type")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"its peft_type is {_short(kind)}{did_you_mean(str(kind), kinds, listing=False)}")
        if kind in ("LORA", "TSD"):
            _check_lora_types(content)
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    return config


def check_weights(path: Path, config: PeftConfig) -> None:
    """The second half of `check_adapter`: the tensors in the file `path`, read one at a time."""
    path = _file_in(path.parent, path.name)
    _check_sum(path)
    shapes: dict[str, tuple[int, ...]] = {}
    whole_numbers: dict[str, Tensor] = {}
    with _told(path, "is damaged or not an adapter"), safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or re.search(r"(^|\.)__", key):
                raise ValueError(f"it holds a tensor with the name {_short(key)}")
            tensor = file.get_tensor(key)
            shapes[key] = tuple(tensor.shape)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ValueError(f"its {key} holds NaN or Inf")
            if tensor.dtype == torch.int64 and ".lora_directions." in key:
                whole_numbers[key] = tensor
            elif not tensor.is_floating_point() and ".lora_" in key:
                raise ValueError(f"its {key} is {tensor.dtype}")
        if not shapes:
            raise ValueError("it holds no tensor")
        _check_ranks(config, shapes)
        if isinstance(config, TsdConfig):
            _check_layers(config, shapes, whole_numbers.keys())
            _check_state(shapes, whole_numbers)


def check_fits(folder: str | os.PathLike[str], model: nn.Module, adapter_name: str) -> None:
    """Refuse a low-rank adapter whose tensors are not exactly those of `adapter_name` in `model`.

    PEFT passes over a tensor that is missing, and leaves a layer as it was initialized.

    Args:
        folder: The adapter's; `check_adapter` has been called.
        model: With the adapter; it may be on the meta device.
        adapter_name: Its name there.

    Raises:
        RecipeError: A tensor is missing, has no place, or another shape.
    """
    pattern = re.compile(r"\.lora_(A|B|dash|directions|embedding_A|embedding_B)\b")
    wanted = {
        key.replace(f".{adapter_name}", ""): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
        if pattern.search(key) and f".{adapter_name}" in key
    }
    path = _file_in(Path(folder), WEIGHTS)
    with _told(path, "is for another base"), safe_open(path, framework="pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if pattern.search(key)}  # noqa: SIM118
        for key in sorted(wanted.keys() ^ found.keys()):
            lacks = "it lacks" if key in wanted else "the model has no place for its"
            raise ValueError(f"{lacks} {key.removeprefix(PREFIX)}")
        for key, shape in wanted.items():
            if found[key] != shape:
                raise ValueError(f"its {key.removeprefix(PREFIX)} is of shape {found[key]}, and should be {shape}")


def check_onto(folder: str | os.PathLike[str], config: PeftConfig, skeleton: nn.Module, base_name: str) -> None:
    """Refuse a LoRA or TSD adapter that is for another base than `skeleton`, a model on the meta device.

    Raises:
        RecipeError: It does not fit; `base_name` is what the base was given as.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) not in ("LORA", "TSD"):
        return  # PEFT's other methods save what they like; it checks them as far as it can
    try:
        with torch.device("meta"):  # low_cpu_mem_usage builds each part in memory first
            adapted = PeftModel(skeleton, without_weights(copy.deepcopy(config)), adapter_name="checked")
    except Exception as error:  # PEFT takes a configuration as it is, and raises whatever it stumbles on
        raise RecipeError(f"{str(folder)!r} does not load onto {base_name!r}: {one_line(error)}") from None
    check_fits(folder, adapted, "checked")


def _file_in(folder: Path, name: str) -> Path:
    """The regular file `name` in `folder`. In the hub's cache it may be a link to that repository's blobs."""
    path = folder / name
    if not path.is_file():
        if name == WEIGHTS and (folder / PICKLED).exists():
            raise RecipeError(
                f"{str(folder)!r} has {PICKLED}, which is pickled and not read; load the adapter where you trust it "
                f"and save it again with save_pretrained, which writes {WEIGHTS}"
            )
        raise RecipeError(f"{str(folder)!r} has no {name}; give the whole folder of an adapter")
    blobs = folder.resolve().parent.parent / "blobs" if folder.resolve().parent.name == "snapshots" else None
    if path.resolve().parent not in (folder.resolve(), blobs):
        raise RecipeError(f"{str(path)!r} is a link out of its folder, to {str(path.resolve())!r}; put the file there")
    return path


def _check_sum(path: Path) -> None:
    """Refuse weights that changed since the run that made them recorded their sum."""
    record = path.parent / ORIGIN
    if not record.is_file():
        return
    with _told(record, "is damaged"):
        expected = json.loads(_file_in(path.parent, ORIGIN).read_text(encoding="utf-8"))["weights"]
    if sha256(path) != expected:
        raise RecipeError(
            f"{str(path)!r} is not as it was written: its SHA-256 is not the one in {ORIGIN}; get it again, or remove "
            f"{ORIGIN} if you changed it yourself"
        )


def _check_lora_types(content: dict[str, Any]) -> None:
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
            raise ValueError(f"its {key} is {_short(value)}")
    for key in ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"):
        given = content.get(key)
        for pattern in [given] if isinstance(given, str) else given if isinstance(given, dict) else ():
            _check_pattern(key, pattern)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"its {key} has {_short(pattern)}, no regular expression: {error}") from None


def _check_ranks(config: PeftConfig, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse ranks that the tensors do not have: layers would be built, in full, by what the configuration says."""
    # A method with directions beside it holds its own configuration in one field.
    r = getattr(getattr(config, "peft", config), "r", None)
    largest = max(max(shape, default=0) for shape in shapes.values())
    if isinstance(r, int) and r > max(largest, _ORDINARY):
        raise ValueError(f"its configuration says r={r}, and no tensor is that large")
    if not isinstance(config, LoraConfig) or config.peft_type not in ("LORA", "TSD"):
        return
    if not isinstance(config, TsdConfig) and any(getattr(config, field, None) for field in REFUSED_FIELDS):
        return  # PEFT's variants of LoRA whose factors have shapes of their own
    for key, shape in shapes.items():
        if key.endswith(".lora_A.weight"):
            rank = _rank_of(config, key.removesuffix(".lora_A.weight"))
            if len(shape) < 2 or shape[0] != rank:
                raise ValueError(f"its {key} is of shape {shape}, and its configuration says r={rank}")


def _rank_of(config: LoraConfig, layer: str) -> int:
    patterns: dict[str, int] = config.rank_pattern or {}
    return int(patterns.get(get_pattern_key(patterns, layer.removeprefix(PREFIX)), config.r))


def _check_layers(config: TsdConfig, shapes: dict[str, tuple[int, ...]], whole_numbers: Collection[str]) -> None:
    """Refuse a layer that has not exactly the parts that its configuration and the shapes of A and B ask for."""
    layers: dict[str, dict[str, Any]] = {}
    for key, shape in shapes.items():
        layer, marked, part = key.partition(".lora_")
        if marked:
            layers.setdefault(layer, {})[f"lora_{part}"] = (shape, key in whole_numbers)
    if not layers:
        raise ValueError("it has no LoRA layer")

    @cache
    def expected(a: tuple[int, ...], out: int) -> dict[str, Any]:
        return _parts(config, a, out)

    for layer, found in layers.items():
        name = layer.removeprefix(PREFIX)
        shape_a, shape_b = (found.get(f"lora_{factor}.weight", ((), False))[0] for factor in "AB")
        if not (shape_a and shape_b):
            raise ValueError(f"layer {name!r} lacks 'lora_A.weight' or 'lora_B.weight'")
        wanted = expected(shape_a, shape_b[0])
        for part in sorted(wanted.keys() | found.keys()):
            if part not in found:
                raise ValueError(f"layer {name!r} lacks {part!r}")
            if part not in wanted:
                raise ValueError(f"layer {name!r} has {part!r}, which has no place in its configuration")
            if wanted[part] != found[part]:
                raise ValueError(f"{part!r} of layer {name!r} is {_kind(found[part])}, not {_kind(wanted[part])}")


def _parts(config: TsdConfig, a: tuple[int, ...], out: int) -> dict[str, tuple[tuple[int, ...], bool]]:
    """The shapes of a layer's parts, and whether they are whole numbers: from the layer itself, built without memory
    on a base weight of the shape that A (r, in) or (r, in, kh, kw) and B have."""
    with torch.device("meta"):
        base: nn.Module = nn.Linear(a[1], out) if len(a) == 2 else nn.Conv2d(a[1], out, (a[2], a[3]))
        layer = create_layer(base, "checked", config, r=a[0], lora_alpha=config.lora_alpha)
    return {
        key.replace(".checked", ""): (tuple(tensor.shape), not tensor.is_floating_point())
        for key, tensor in layer.state_dict().items()
        if key.startswith("lora_")
    }


def _kind(part: tuple[tuple[int, ...], bool]) -> str:
    return f"of shape {part[0]}" + (" in whole numbers" if part[1] else "")


def _check_state(shapes: dict[str, tuple[int, ...]], whole_numbers: dict[str, Tensor]) -> None:
    """Refuse step counts and positions in the spectrum that no training leaves."""
    seen: dict[str, str] = {}
    for key, tensor in whole_numbers.items():
        layer, _, part = key.partition(".lora_directions.")
        if part == "step":
            sound, name, state = int(tensor[0]) >= 0, "step", str(int(tensor[0]))
        elif part == "indices":
            a, b = shapes[f"{layer}.lora_A.weight"], shapes[f"{layer}.lora_B.weight"]
            chosen = tensor[tensor >= 0].tolist()
            in_spectrum = all(index < min(b[0], math.prod(a[1:])) for index in chosen)
            # Those chosen come first, each of them once; the rest is -1.
            first = tensor.tolist() == chosen + [-1] * (len(tensor) - len(chosen)) and len(set(chosen)) == len(chosen)
            sound, name, state = in_spectrum and first, "phase", "dash" if chosen else "pre-launch"
        else:
            continue
        if not sound:
            raise ValueError(f"its {key} holds {_short(tensor.tolist())}")
        if seen.setdefault(name, state) != state:
            raise ValueError(f"its layers differ in their {name}: {seen[name]} and {state}")


def _no_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else text[:77] + "..."


@contextmanager
def _told(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:  # what reads a hostile file may stumble on anything in it
        raise RecipeError(f"{str(path)!r} {what}: {one_line(error)}") from None
