"""The directions of whatever model carries an adapter: PEFT's own, or one that `add_adapter` has put it into."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .directed import DirectedLayer
from .phase import adapted_layers, any_layer, check_one_phase, config_of, phase_of, prelaunch_length, steps_taken
from .table import Directions, directions_of


def directions_in(model: nn.Module, adapter_name: str | None = None) -> Directions:
    """The directions identified in every layer of a model: arrays for programs, a table when printed.

    For a model without PEFT's wrapper, such as one of transformers', diffusers' or sentence-transformers' after
    `add_adapter`; on a `PeftModel` it is what `model.directions()` gives.

        ```py
        >>> model = AutoModelForCausalLM.from_pretrained(base)
        >>> model.add_adapter(TsdConfig(...))
        >>> Trainer(model=model, ..., callbacks=[TsdCallback()]).train()
        >>> print(directions_in(model))
        ```

    Args:
        model: Whatever holds the layers.
        adapter_name: The adapter; the active one by default.

    Raises:
        ValueError: There is no such adapter, it is still in pre-launch, or its layers are in different phases.
    """
    active = [
        adapter
        for module in model.modules()
        if isinstance(module, DirectedLayer)
        for adapter in module.active_adapters
        if module.carries(adapter)
    ]
    adapter = adapter_name if adapter_name is not None else next(iter(active), None)
    layers = {} if adapter is None else adapted_layers(model, adapter)
    if adapter is None or not layers:
        named = "active TSD adapter" if adapter is None else f"TSD layer with an adapter {adapter!r}"
        raise ValueError(f"{type(model).__name__} has no {named}.")
    return found_in(layers, adapter)


def found_in(layers: Mapping[str, DirectedLayer], adapter: str) -> Directions:
    """The directions of an adapter, from its layers.

    Raises:
        ValueError: As `directions_in`.
    """
    check_one_phase(layers, adapter)
    if phase_of(layers, adapter) == "pre-launch":
        raise ValueError(
            f"Adapter {adapter!r} has no directions yet: it has taken {steps_taken(layers, adapter)} of its "
            f"{prelaunch_length(config_of(layers, adapter))} pre-launch steps."
        )
    found = {name: directions_of(layer, adapter) for name, layer in layers.items()}
    return Directions(found, int(any_layer(layers).fixed(adapter).identified_at))
