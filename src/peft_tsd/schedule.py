"""From pre-launch over the transition to the dash: `TsdCallback` for Trainers, `advance` for any other loop.

Both count *optimizer steps*, in the adapter's own saved state, so that gradient accumulation, gradient checkpointing,
evaluation and a resumed run change nothing. The transition happens between two steps: the directions of every layer
are found first, one layer at a time, and only then is anything written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers.trainer_callback import TrainerCallback

from .config import DirectionSettings
from .layer import DirectedLayer, Identified
from .model import adapted_layers, config_of, phase_of, steps_taken, warn_in_prelaunch


class TransitionError(ValueError):
    """The transition cannot be made; nothing but the step count was changed."""


def advance(model: nn.Module, optimizer: Optimizer | Sequence[Optimizer], adapter_name: str | None = None) -> bool:
    """Count one optimizer step, and make the transition when the pre-launch is over.

    Call it once after each `optimizer.step()` of your own loop, on every process:

        ```py
        >>> loss.backward()
        >>> optimizer.step()
        >>> advance(model, optimizer)
        >>> optimizer.zero_grad()
        ```

    Args:
        model: The model with TSD adapters, wrapped (DDP, torch.compile, Accelerate) or not.
        optimizer: The optimizer of the adapter's parameters, or all of them. LoRA-Init and LoRA-TSD clear its moments
            of A and B at the transition; its schedule goes on.
        adapter_name: The adapter trained; every active, trainable adapter by default.

    Returns:
        Whether this call made the transition.

    Raises:
        ValueError: The model has no trainable TSD adapter.
        TransitionError: At the transition, the optimizer does not hold A and B, or a layer's ΔW or weight holds NaN or
            Inf. Nothing but the step count is changed then.
    """
    adapters = [adapter_name] if adapter_name is not None else trained_adapters(model)
    moved = False
    for adapter in adapters:
        layers = adapted_layers(model, adapter)
        if not layers:
            raise ValueError(f"The model has no TSD layer with an adapter {adapter!r}.")
        with torch.no_grad():
            torch._foreach_add_([layer.fixed(adapter).step for layer in layers.values()], 1)
        config = config_of(layers, adapter)
        if phase_of(layers, adapter) == "pre-launch" and steps_taken(layers, adapter) >= config.prelaunch_steps:
            transition(layers, adapter, optimizer)
            moved = True
    return moved


def trained_adapters(model: nn.Module) -> list[str]:
    """The TSD adapters of `model` that are active and trainable, in the order of their layers.

    Raises:
        ValueError: There is none.
    """
    found: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, DirectedLayer):
            for adapter in module.active_adapters:
                if module.carries(adapter) and module.trains(adapter):
                    found[adapter] = None
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no active, trainable TSD adapter. Make one with "
            "get_peft_model(base, TsdConfig(...)), or load one with is_trainable=True."
        )
    return list(found)


def transition(layers: Mapping[str, DirectedLayer], adapter: str, optimizer: Optimizer | Sequence[Optimizer]) -> None:
    """Identify the directions of every layer and write them in; restart A and B where the method says so.

    Raises:
        TransitionError: As `advance`; nothing has been written then.
    """
    restarted = [parameter for layer in layers.values() for parameter in layer.restarted(adapter)]
    owners = _owners(restarted, optimizer)
    for name, layer in layers.items():
        _named(name, layer.check_identifiable, adapter)
    found: dict[str, Identified] = {}
    for name, layer in tqdm(
        layers.items(), desc="Identifying directions", unit="layer", disable=not is_main_process()
    ):
        found[name] = _named(name, layer.identify, adapter)
    for name, layer in layers.items():
        layer.fill(adapter, found[name])
    for parameter, owner in zip(restarted, owners):
        _forget(owner, parameter)


class TsdCallback(TrainerCallback):
    """Runs the schedule of TSD adapters in transformers' Trainer and in TRL's trainers.

        ```py
        >>> Trainer(model=model, ..., callbacks=[TsdCallback()]).train()
        ```

    Attributes:
        transitions: One entry a transition made, with its `step`, `seconds` and number of `layers`.

    Raises:
        ValueError: At the start of training, where the model has no trainable TSD adapter; otherwise as `advance`.
    """

    def __init__(self) -> None:
        self.transitions: list[dict[str, float]] = []
        self._held: list[DirectionSettings] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        remaining = state.max_steps - state.global_step
        for config, layers, adapter in _trained(model):
            missing = config.prelaunch_steps - steps_taken(layers, adapter)
            if remaining < missing:
                event = f"needs {missing} more optimizer steps, will train for only {remaining}, and so end"
                warn_in_prelaunch(config, layers, adapter, event)
            else:
                # Checkpoints written on the way are no finished adapters.
                config.prelaunch_notice_given = True
                self._held.append(config)

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        start = time.perf_counter()
        if advance(model, optimizer):
            self.transitions.append(
                {
                    "step": state.global_step,
                    "seconds": time.perf_counter() - start,
                    "layers": sum(len(layers) for _, layers, _ in _trained(model)),
                }
            )

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        for config in self._held:
            config.prelaunch_notice_given = False
        for config, layers, adapter in _trained(model):
            warn_in_prelaunch(config, layers, adapter, "ends its training")


def _trained(model: nn.Module) -> list[tuple[DirectionSettings, dict[str, DirectedLayer], str]]:
    found = []
    for adapter in trained_adapters(model):
        layers = adapted_layers(model, adapter)
        found.append((config_of(layers, adapter), layers, adapter))
    return found


def _named(name: str, work: Any, adapter: str) -> Any:
    try:
        return work(adapter)
    except ValueError as error:
        raise TransitionError(
            f"Cannot identify directions in layer {name!r}: {error} Nothing was changed; the adapter is still in "
            "pre-launch, and can be saved or trained on."
        ) from error


def _owners(parameters: list[nn.Parameter], optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizer that holds each parameter.

    Raises:
        TransitionError: None of those given does.
    """
    optimizers = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    # Accelerate wraps the optimizer whose state is meant.
    optimizers = [getattr(opt, "optimizer", opt) for opt in optimizers]
    owner = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    missing = sum(id(p) not in owner for p in parameters)
    if missing:
        kinds = ", ".join(type(opt).__name__ for opt in optimizers)
        raise TransitionError(
            f"The optimizer given ({kinds}) does not hold {missing} of the {len(parameters)} A and B that restart, "
            "so that their moments cannot be cleared. Pass the optimizer that was built from this model's parameters; "
            "where it keeps flattened copies of them (DeepSpeed, FSDP1), use method='lora-dash'."
        )
    return [owner[id(p)] for p in parameters]


def _forget(optimizer: Optimizer, parameter: Tensor) -> None:
    """Bring the optimizer to the state it had before it first saw `parameter`."""
    if isinstance(optimizer, torch.optim.Adagrad):
        # The one optimizer that fills its state when it is built, not when it first steps.
        state = optimizer.state[parameter]
        state["step"].zero_()
        state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
    else:
        optimizer.state.pop(parameter, None)


def is_main_process() -> bool:
    """Whether this process is the one that writes and reports: rank 0, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
