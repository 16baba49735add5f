"""Models in wrappers: torch.compile, DDP, DataParallel, FSDP, DeepSpeed, an average of weights, a module of one's own.

A wrapper holds what it wraps as a child, whose name then stands in the name of every module and tensor below it
(`_orig_mod.`, `module.`). Files hold the names that modules have in the bare model.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..files.adapters import name_in_base

# The child that each kind of wrapper holds the wrapped module as. By the names of classes, for some of them come with
# packages that may not be there. Accelerate's own wrappers are these too.
_CHILD = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
}


def _child(module: nn.Module) -> str | None:
    """The name of the child that `module` wraps, if it is a wrapper."""
    for kind in type(module).__mro__:
        child = _CHILD.get(kind.__name__)
        if child is not None and child in module._modules:
            return child
    return None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without the wrappers around it; one that is in none as it is."""
    while (child := _child(model)) is not None:
        model = model._modules[child]  # type: ignore[assignment]
    # Accelerate's compile_regions makes a copy of the model around compiled blocks, and keeps the model itself so.
    original = vars(model).get("_orig_mod")
    return original if isinstance(original, nn.Module) else model


def adapted_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules of `model` that carry adapters, each with its configurations in `peft_config`, by name.

    One, named "", where the model is adapted itself; one or more where it is a module of one's own that holds such,
    as one that trains a denoiser and a text encoder does.
    """
    bare = unwrapped(model)
    if _has_adapters(bare):
        return {"": bare}
    found: dict[str, nn.Module] = {}
    for name, module in bare.named_modules():
        if not any(name.startswith(f"{outer}.") for outer in found) and _has_adapters(module):
            found[name] = unwrapped(module)
    return found


def _has_adapters(module: nn.Module) -> bool:
    configs: Any = getattr(module, "peft_config", None)
    return isinstance(configs, dict) and bool(configs)


def adapted_model(model: nn.Module) -> nn.Module:
    """The one model in `model` that carries adapters, or `model` itself where none does.

    Raises:
        ValueError: There are several.
    """
    parts = adapted_parts(model)
    if len(parts) > 1:
        raise ValueError(
            f"{type(model).__name__} holds several adapted models, {', '.join(parts)}; give one of them, "
            f"model.{next(iter(parts))}."
        )
    return next(iter(parts.values()), unwrapped(model))


def modules_in_base(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with the name it has in the base model; wrappers themselves are left out.

    Of a module of one's own that holds several adapted models, the names begin with those of the models in it.
    """
    parts = adapted_parts(model)
    root = next(iter(parts.values())) if len(parts) == 1 else unwrapped(model)
    for name, module in _plain(root, "", set()):
        yield name_in_base(name), module


def _plain(module: nn.Module, name: str, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, without wrappers and without the parts that they add to names."""
    while (child := _child(module)) is not None:
        module = module._modules[child]  # type: ignore[assignment]
    if id(module) in seen:
        return
    seen.add(id(module))
    yield name, module
    for key, inner in module._modules.items():
        if inner is not None:
            yield from _plain(inner, f"{name}.{key}" if name else key, seen)


def check_saveable(model: nn.Module) -> None:
    """Refuse a model one of whose blocks is wrapped by itself so that its tensors cannot be told by their names.

    Raises:
        ValueError: Wrapping the block left a part in them that may as well be a name of the model's own.
    """
    for name, module in unwrapped(model).named_modules():
        if _child(module) == "module":
            raise ValueError(
                f"{name} is wrapped by itself, in a {type(module).__name__}, and its adapter cannot be saved or "
                f"loaded under the names that other programs know. Put {name}.module in its place first, and wrap the "
                "whole model instead."
            )
