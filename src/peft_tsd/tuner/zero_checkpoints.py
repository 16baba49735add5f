"""Directions in DeepSpeed's checkpoints, which leave out what is frozen.

Transformers saves a PEFT model under DeepSpeed without its frozen parameters, and directions are such. What
ZeRO-3 has split cannot be put together by the one process that saves, so that process holds a copy. And what a
checkpoint's engine does not bring back is read from the adapter in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..distributed import zero
from ..distributed.sharded import is_main_process, shape_of, whole, write
from ..errors import one_line
from ..files.adapters import PREFIX, WEIGHTS
from .directed import DirectedLayer
from .held import FixedDirections


def hold_copies(layers: Mapping[str, DirectedLayer], adapter: str, *, anew: bool) -> None:
    """Have the main process hold a copy of directions that are split. Every process must call it.

    Args:
        layers: All layers of the adapter.
        adapter: Its name.
        anew: They have changed.
    """
    for layer in layers.values():
        fixed = layer.fixed(adapter)
        if zero.is_split(fixed.step) and (anew or fixed.copies is None):
            copies = {name: whole(parameter).cpu() for name, parameter in fixed.named_parameters()}
            fixed.copies = copies if is_main_process() else {}


def completed(model: nn.Module, adapter: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """`state_dict` of `model` with the directions of `adapter` that were left out, from the copies.

    Raises:
        RuntimeError: There are none: no step was taken.
    """
    found = dict(state_dict)
    for name, fixed in model.named_modules():
        if not (isinstance(fixed, FixedDirections) and name.endswith(f".{adapter}") and zero.is_split(fixed.step)):
            continue
        if fixed.copies is None:
            raise RuntimeError(
                f"The directions of adapter {adapter!r} are split over processes; they can be saved after a step."
            )
        if not fixed.copies:  # another process writes the file
            continue
        # This process has the one number that changes at every step.
        copies = fixed.copies | {"step": zero.held_parts(fixed.step)[0][:1].cpu()}
        found.update({f"{name}.{key}": value for key, value in copies.items()})
    return found


def restore(layers: Mapping[str, DirectedLayer], adapter: str, step: int, output: str) -> None:
    """Read the directions of a run that continues at `step` where DeepSpeed has not brought them back.

    Raises:
        ValueError: They are not in the checkpoint of that step in `output`.
    """
    trained = [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
    taken = next(iter(layers.values())).fixed(adapter).step
    if not step or int(whole(taken)) or not any(zero.is_copied(parameter) for parameter in trained):
        return
    folder = Path(output) / f"checkpoint-{step}"
    path = (folder if adapter == "default" else folder / adapter) / WEIGHTS
    advice = (
        "DeepSpeed's checkpoints do not hold directions. Build the model of a run that continues with "
        "PeftModel.from_pretrained(base, CHECKPOINT, is_trainable=True)."
    )
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"The directions at step {step} cannot be read from {str(path)!r}: {one_line(error)}. {advice}"
        ) from None
    for key, parameter in _fixed_parameters(layers, adapter):
        value = saved.get(PREFIX + key)
        if value is None or value.shape != shape_of(parameter):
            raise ValueError(f"{str(path)!r} does not hold {key} of shape {tuple(shape_of(parameter))}. {advice}")
        write(parameter, value)


def _fixed_parameters(layers: Mapping[str, DirectedLayer], adapter: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of all directions, with their names in a saved adapter, less `PREFIX`."""
    for name, layer in layers.items():
        for inner, module in layer.named_modules():
            if module is layer.fixed(adapter):
                for key, parameter in module.named_parameters():
                    yield f"{name}.{inner.removesuffix('.' + adapter)}.{key}", parameter
