"""Where an adapter is between pre-launch and dash, read from its layers; and the warning of one used too early."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Literal
from weakref import WeakSet

from torch import nn

from ..models.wrapped import modules_in_base
from .directed import DirectedLayer
from .held import FixedDirections
from .settings import DirectionSettings

Phase = Literal["pre-launch", "dash"]


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, DirectedLayer]:
    """The layers of `model` that carry `adapter`, by the name each has in the base model, in the model's order."""
    return {
        name: module
        for name, module in modules_in_base(model)
        if isinstance(module, DirectedLayer) and module.carries(adapter)
    }


def config_of(layers: Mapping[str, DirectedLayer], adapter: str) -> DirectionSettings:
    """The configuration of an adapter, from its layers."""
    return any_layer(layers).settings(adapter)


def steps_taken(layers: Mapping[str, DirectedLayer], adapter: str) -> int:
    """Optimizer steps the adapter has taken, as its layers recorded them."""
    return int(any_layer(layers).fixed(adapter).step)


def phase_of(layers: Mapping[str, DirectedLayer], adapter: str) -> Phase:
    """The phase of an adapter, read from its layers."""
    return "dash" if any_layer(layers).fixed(adapter).identified else "pre-launch"


def check_one_phase(layers: Mapping[str, DirectedLayer], adapter: str) -> None:
    """Refuse an adapter of which only some layers have made the transition.

    Raises:
        ValueError: It is so; the message names one layer of each.
    """
    phases = {layer.fixed(adapter).identified: name for name, layer in reversed(list(layers.items()))}
    if len(phases) > 1:
        raise ValueError(
            f"Adapter {adapter!r} is in two phases at once: {phases[False]!r} is in pre-launch and {phases[True]!r} "
            "has made the transition, as where a state was loaded in part. Load the whole adapter."
        )


def any_layer(layers: Mapping[str, DirectedLayer]) -> DirectedLayer:
    # Steps are counted, and directions written, in all layers of an adapter together: one read tells of all.
    return next(iter(layers.values()))


def prelaunch_length(config: DirectionSettings) -> str:
    """How many steps the pre-launch takes, for messages."""
    return f"{'at most ' * (config.prelaunch_steps in (None, 'auto'))}{config.longest_prelaunch}"


def how_to_get_directions(config: DirectionSettings) -> str:
    """What to do where nobody runs the schedule, for messages."""
    call = (
        "identify_from_gradients(model, batches) before the first step"
        if config.prelaunch_steps == 0
        else "advance(model, optimizer) after each optimizer step"
    )
    return f"pass callbacks=[TsdCallback()] to the Trainer, or call {call} of your own loop."


class PrelaunchWarning(UserWarning):
    """An adapter is used as finished while it is still the plain LoRA of its pre-launch."""


_had_directions: WeakSet[FixedDirections] = WeakSet()
"""Of adapters that made the transition in this process, what their first layers hold."""


def note_transition(layers: Mapping[str, DirectedLayer], adapter: str) -> None:
    """Remember that `adapter` has directions now, in case a state of before is restored."""
    _had_directions.add(any_layer(layers).fixed(adapter))


def warn_in_prelaunch(
    config: DirectionSettings,
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    event: str,
    cause: str = "",
) -> None:
    """Say once for each config that `adapter` has no directions yet, and why: `cause`, or what is likely."""
    if config.prelaunch_notice_given or not layers or phase_of(layers, adapter) == "dash":
        return
    config.prelaunch_notice_given = True
    steps = steps_taken(layers, adapter)
    if cause:
        pass
    elif any_layer(layers).fixed(adapter) in _had_directions:
        cause = (
            f"It had its directions, and was restored to its state after step {steps}, before the transition (as "
            "load_best_model_at_end does where an early checkpoint was the best): restore one of after it, or let the "
            "pre-launch end before the first evaluation."
        )
    elif config.prelaunch_steps == 0:
        cause = f"With prelaunch_steps=0 it takes them from gradients: {how_to_get_directions(config)}"
    elif steps == 0:
        cause = f"No step was ever counted: {how_to_get_directions(config)}"
    else:
        lower = "prelaunch_max" if config.prelaunch_steps == "auto" else "prelaunch_steps"
        length = prelaunch_length(config)
        cause = f"It has counted {steps} of its {length} pre-launch steps: train longer, or lower {lower}."
    warnings.warn(
        f"Adapter {adapter!r} ({config.method}) {event} while still in pre-launch: it has no "
        f"task-specific directions yet. {cause}",
        PrelaunchWarning,
        stacklevel=3,
    )


def warn_of_native_state(config: DirectionSettings, model: nn.Module, adapter: str) -> None:
    """Say once for each config that the state of an adapter put into a denoiser of diffusers' is not what pipelines
    load: of its tensors they read LoRA's, and pass over what was learned along the directions."""
    kinds = {(kind.__name__, kind.__module__.partition(".")[0]) for kind in type(model).__mro__}
    if config.native_notice_given or ("ModelMixin", "diffusers") not in kinds:
        return
    config.native_notice_given = True
    warnings.warn(
        f"The state of adapter {adapter!r} ({config.method}) is for going on with training; save_lora_weights of a "
        "pipeline would write a file that load_lora_weights reads only in part. Write the file for pipelines with "
        "peft_tsd.diffusion.save_lora_weights(FOLDER, unet=unet), or export_lora(unet, FOLDER).",
        stacklevel=4,
    )
