"""DeepSpeed's checkpoints of version 0.1.0, which left the directions out: they are read from the adapter beside them.

Directions were frozen parameters there, and transformers saves a PEFT model under DeepSpeed without what is frozen.
Buffers are saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..distributed import zero
from ..errors import AdapterError, one_line
from ..files.adapters import PREFIX, WEIGHTS
from .checking import check_weights
from .directed import DirectedLayer
from .held import joined_as_now
from .phase import config_of, steps_taken


def restore(layers: Mapping[str, DirectedLayer], adapter: str, step: int, output: str) -> None:
    """Read the directions of a run that continues at `step` where DeepSpeed has not brought them back.

    Raises:
        ValueError: They are not in the checkpoint of that step in `output`.
    """
    trained = [parameter for layer in layers.values() for parameter in layer.parameters() if parameter.requires_grad]
    if not step or steps_taken(layers, adapter) or not any(zero.is_copied(parameter) for parameter in trained):
        return
    folder = Path(output) / f"checkpoint-{step}"
    path = (folder if adapter == "default" else folder / adapter) / WEIGHTS
    advice = (
        "DeepSpeed's checkpoints of peft-tsd 0.1.0 do not hold directions. Build the model of a run that continues "
        "with PeftModel.from_pretrained(base, CHECKPOINT, is_trainable=True)."
    )
    try:
        config = config_of(layers, adapter)
        check_weights(path, config)
        saved = load_file(path)
        if getattr(config, "joins_start", False):
            saved = joined_as_now(saved)
    except (AdapterError, OSError, SafetensorError) as error:
        raise ValueError(
            f"The directions at step {step} cannot be read from {str(path)!r}: {one_line(error)}. {advice}"
        ) from None
    held = dict(_directions(layers, adapter))
    for key, buffer in held.items():
        if key not in saved or saved[key].shape != buffer.shape:
            raise ValueError(f"{str(path)!r} does not hold {key} of shape {tuple(buffer.shape)}. {advice}")
    for key, buffer in held.items():
        buffer.copy_(saved[key])


def _directions(layers: Mapping[str, DirectedLayer], adapter: str) -> Iterator[tuple[str, Tensor]]:
    """All directions, with their names in a saved adapter."""
    for name, layer in layers.items():
        for inner, module in layer.named_modules():
            if module is layer.fixed(adapter):
                for key, buffer in module.named_buffers():
                    yield f"{PREFIX}{name}.{inner.removesuffix('.' + adapter)}.{key}", buffer
