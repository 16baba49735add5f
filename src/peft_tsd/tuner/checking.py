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
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from ..errors import AdapterError, did_you_mean, one_line
from ..files.adapters import (
    CONFIG,
    LARGEST_CONFIG,
    PICKLED,
    PREFIX,
    WEIGHTS,
    check_lora_types,
    check_sum,
    file_in,
    no_constant,
    plain_name,
    short,
    told,
)
from ..models.wrapped import adapted_model
from .config import REFUSED_FIELDS, TsdConfig, without_weights
from .dispatch import create_layer

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
        AdapterError: In one line, what is wrong.
    """
    folder = Path(folder)
    config = check_config(folder)
    check_weights(folder / WEIGHTS, config)
    return config


def check_if_local(folder: Path) -> None:
    """`check_adapter`, where `folder` is a local one with an adapter's weights. A configuration may lie alone."""
    if (folder / CONFIG).is_file() and any((folder / name).exists() for name in (WEIGHTS, PICKLED)):
        check_adapter(folder)


def check_config(folder: str | os.PathLike[str]) -> PeftConfig:
    """The first half of `check_adapter`: the configuration by itself."""
    folder = Path(folder)
    path = file_in(folder, CONFIG)
    with told(path, "cannot be used"):
        if path.stat().st_size > LARGEST_CONFIG:
            raise ValueError(f"it has {path.stat().st_size:,} bytes")
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=no_constant)
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not a configuration")
        kinds = {str(getattr(kind, "value", kind)): kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
        kind = content.get("peft_type")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"its peft_type is {short(kind)}{did_you_mean(str(kind), kinds, listing=False)}")
        if kind in ("LORA", "TSD"):
            check_lora_types(content)
        config: PeftConfig = PeftConfig.from_pretrained(str(folder))
    return config


def check_weights(path: Path, config: PeftConfig) -> None:
    """The second half of `check_adapter`: the tensors in the file `path`, read one at a time."""
    path = file_in(path.parent, path.name)
    check_sum(path)
    shapes: dict[str, tuple[int, ...]] = {}
    whole_numbers: dict[str, Tensor] = {}
    filled: set[str] = set()
    with told(path, "is damaged or not an adapter"), safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            if not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key) or re.search(r"(^|\.)__", key):
                raise ValueError(f"it holds a tensor with the name {short(key)}")
            tensor = file.get_tensor(key)
            shapes[key] = tuple(tensor.shape)
            if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                raise ValueError(f"its {key} holds NaN or Inf")
            if key.endswith(".lora_directions.u") and tensor.any():
                filled.add(key.removesuffix(".lora_directions.u"))
            if tensor.dtype == torch.int64 and ".lora_directions." in key:
                whole_numbers[key] = tensor
            elif not tensor.is_floating_point() and ".lora_" in key:
                raise ValueError(f"its {key} is {tensor.dtype}")
        if not shapes:
            raise ValueError("it holds no tensor")
        _check_ranks(config, shapes)
        if isinstance(config, TsdConfig):
            _check_layers(config, shapes, whole_numbers.keys())
            _check_state(shapes, whole_numbers, filled)


def check_fits(folder: str | os.PathLike[str], model: nn.Module, adapter_name: str) -> None:
    """Refuse a low-rank adapter whose tensors are not exactly those of `adapter_name` in `model`.

    PEFT passes over a tensor that is missing, and leaves a layer as it was initialized.

    Args:
        folder: The adapter's; `check_adapter` has been called.
        model: With the adapter; it may be on the meta device.
        adapter_name: Its name there.

    Raises:
        AdapterError: A tensor is missing, has no place, or another shape.
    """
    pattern = re.compile(r"\.lora_(A|B|dash|directions|embedding_A|embedding_B)\b")
    wanted = {
        plain_name(key.replace(f".{adapter_name}", "")): tuple(tensor.shape)
        for key, tensor in adapted_model(model).state_dict().items()
        if pattern.search(key) and f".{adapter_name}" in key
    }
    path = file_in(Path(folder), WEIGHTS)
    with told(path, "is for another base"), safe_open(path, framework="pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys() if pattern.search(key)}  # noqa: SIM118
        for layer in [key.removesuffix("lora_directions.taken") for key in wanted if key.endswith("directions.taken")]:
            if f"{layer}lora_directions.a0" in found:
                wanted = _apart(wanted, layer)
        for key in sorted(wanted.keys() ^ found.keys()):
            lacks = "it lacks" if key in wanted else "the model has no place for its"
            raise ValueError(f"{lacks} {key.removeprefix(PREFIX)}")
        for key, shape in wanted.items():
            if found[key] != shape:
                raise ValueError(f"its {key.removeprefix(PREFIX)} is of shape {found[key]}, and should be {shape}")


def check_onto(folder: str | os.PathLike[str], config: PeftConfig, skeleton: nn.Module, base_name: str) -> None:
    """Refuse a LoRA or TSD adapter that is for another base than `skeleton`, a model on the meta device.

    Raises:
        AdapterError: It does not fit; `base_name` is what the base was given as.
    """
    if str(getattr(config.peft_type, "value", config.peft_type)) not in ("LORA", "TSD"):
        return  # PEFT's other methods save what they like; it checks them as far as it can
    try:
        with torch.device("meta"):  # low_cpu_mem_usage builds each part in memory first
            adapted = PeftModel(skeleton, without_weights(copy.deepcopy(config)), adapter_name="checked")
    except Exception as error:  # PEFT takes a configuration as it is, and raises whatever it stumbles on
        raise AdapterError(f"{str(folder)!r} does not load onto {base_name!r}: {one_line(error)}") from None
    check_fits(folder, adapted, "checked")


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
            name = key.removesuffix(".lora_A.weight").removeprefix(PREFIX)
            pattern, rank = _rank_of(config, name)
            if len(shape) < 2 or shape[0] != rank:
                # A pattern is read as the end of a name, so that one meant for `proj_out` takes `block.proj_out` too.
                if len(shape) >= 2 and pattern != name and f"{PREFIX}{pattern}.lora_A.weight" in shapes:
                    raise ValueError(
                        f"its rank_pattern gives {name!r} the rank of {pattern!r}, {rank}, and its tensor has "
                        f"{shape[0]}; write {'^' + pattern!r} in {CONFIG}, or export the adapter again"
                    )
                raise ValueError(f"its {key} is of shape {shape}, and its configuration says r={rank}")


def _rank_of(config: LoraConfig, name: str) -> tuple[str, int]:
    """The pattern that says the rank of the layer `name`, itself where none does, and that rank."""
    patterns: dict[str, int] = config.rank_pattern or {}
    pattern = get_pattern_key(patterns, name)
    return pattern, int(patterns.get(pattern, config.r))


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
    def expected(a: tuple[int, ...], out: int, apart: bool) -> dict[str, Any]:
        parts = _parts(config, a, out)
        if not apart:
            return parts
        shapes = _apart({name: shape for name, (shape, _) in parts.items()})
        return {name: (shape, name in parts and parts[name][1]) for name, shape in shapes.items()}

    for layer, found in layers.items():
        name = layer.removeprefix(PREFIX)
        shape_a, shape_b = (found.get(f"lora_{factor}.weight", ((), False))[0] for factor in "AB")
        if not (shape_a and shape_b):
            raise ValueError(f"layer {name!r} lacks 'lora_A.weight' or 'lora_B.weight'")
        apart = config.joins_start and "lora_directions.a0" in found
        wanted = expected(shape_a, shape_b[0], apart)
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


def _apart(shapes: dict[str, tuple[int, ...]], layer: str = "") -> dict[str, tuple[int, ...]]:
    """`shapes` by name, with those of LoRA-TSD's `"svd"` start in one layer as 0.1.0 saved them: directions and start
    apart. What the names of the layer's parts begin with is `layer`."""
    held = f"{layer}lora_directions."
    out, in_size = shapes[f"{held}u"][0], shapes[f"{held}v"][1]
    slots, rank = shapes[f"{layer}lora_dash.weight"][0], shapes[f"{layer}lora_A.weight"][0]
    apart = {"u": (out, slots), "v": (slots, in_size), "a0": (rank, in_size), "b0": (out, rank)}
    others = {name: shape for name, shape in shapes.items() if name not in (f"{held}taken", f"{held}to_unit")}
    return {**others, **{held + name: shape for name, shape in apart.items()}}


def _kind(part: tuple[tuple[int, ...], bool]) -> str:
    return f"of shape {part[0]}" + (" in whole numbers" if part[1] else "")


def _check_state(
    shapes: dict[str, tuple[int, ...]], whole_numbers: dict[str, Tensor], filled: Collection[str]
) -> None:
    """Refuse step counts and positions in the spectrum that no training leaves; `filled` are the layers with a U."""
    seen: dict[str, str] = {}
    for key, tensor in sorted(whole_numbers.items(), key=lambda one: one[0].endswith(".indices")):
        layer, _, part = key.partition(".lora_directions.")
        if part == "step":
            sound, name, state = int(tensor[0]) >= 0, "step", str(int(tensor[0]))
        elif part == "indices":
            a, b = shapes[f"{layer}.lora_A.weight"], shapes[f"{layer}.lora_B.weight"]
            chosen = tensor[tensor >= 0].tolist()
            in_spectrum = all(index < min(b[0], math.prod(a[1:])) for index in chosen)
            # Those chosen come first, each of them once; the rest is -1.
            first = tensor.tolist() == chosen + [-1] * (len(tensor) - len(chosen)) and len(set(chosen)) == len(chosen)
            # A layer that had not changed at the transition has none.
            fits = int(whole_numbers[f"{layer}.lora_directions.identified_at"]) >= 0 if chosen else layer not in filled
            sound = in_spectrum and first and fits
            name, state = "", ""
        elif part == "identified_at":
            sound, name, state = int(tensor) >= -1, "phase", "dash" if int(tensor) >= 0 else "pre-launch"
        else:
            continue
        if not sound:
            raise ValueError(f"its {key} holds {short(tensor.tolist())}")
        if name and seen.setdefault(name, state) != state:
            raise ValueError(f"its layers differ in their {name}: {seen[name]} and {state}")
