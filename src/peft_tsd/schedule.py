"""From pre-launch over the transition to the dash: `TsdCallback` for Trainers, `advance` for any other loop.

Both count *optimizer steps*, in the adapter's own saved state, so that gradient accumulation, gradient checkpointing,
evaluation and a resumed run change nothing. The transition happens between two steps: the directions of every layer
are found first, one layer at a time, and only then is anything written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm
from transformers.trainer_callback import TrainerCallback

from . import zero
from .budget import over_chance, spread
from .config import DirectionSettings
from .directions import LowRank
from .distributed import held_parts, is_main_process, share_out, whole
from .errors import TransitionError as TransitionError
from .errors import in_layer
from .gradients import Loss, loss_of_output, random_states_kept, weight_gradients
from .layer import DirectedLayer, Identified
from .model import adapted_layers, config_of, phase_of, steps_taken, warn_in_prelaunch
from .prelaunch import checks_made, held_spectrum, prelaunch_is_over, release
from .zero_checkpoints import hold_copies, restore

log = logging.getLogger(__name__)


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
        ValueError: The model has no trainable TSD adapter, or one without a pre-launch whose directions have not been
            identified from gradients.
        TransitionError: At the transition, the optimizer does not hold A and B, or a layer's ΔW or weight holds NaN or
            Inf (which a check of an automatic pre-launch may find before). Nothing but the step count is changed then.
    """
    adapters = [adapter_name] if adapter_name is not None else trained_adapters(model)
    moved = False
    for adapter in adapters:
        layers = adapted_layers(model, adapter)
        if not layers:
            raise ValueError(f"The model has no TSD layer with an adapter {adapter!r}.")
        waiting = phase_of(layers, adapter) == "pre-launch"
        if waiting and config_of(layers, adapter).prelaunch_steps == 0:
            raise ValueError(
                f"Adapter {adapter!r} has prelaunch_steps=0 and no directions: call identify_from_gradients(model, "
                "batches, optimizer) before the first step, or give it a pre-launch."
            )
        with torch.no_grad():
            steps = [part for layer in layers.values() for part in held_parts(layer.fixed(adapter).step)]
            torch._foreach_add_(steps, 1)
        over = waiting and prelaunch_is_over(layers, adapter)
        if over:
            transition(layers, adapter, optimizer)
            moved = True
        checks = config_of(layers, adapter).check_steps if waiting else ()
        hold_copies(layers, adapter, anew=over or (bool(checks) and steps_taken(layers, adapter) in checks))
    return moved


def identify_from_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    adapter_name: str | None = None,
    *,
    loss: Loss = loss_of_output,
    memory_gib: float = 1.0,
) -> None:
    """Make the transition now, without a pre-launch: by change rates of the gradient of the frozen weights.

    `δ_i = |u_iᵀ G v_i| / (σ_i + ε)`, with G the gradient of the mean loss over `batches` with respect to the weight.
    So LoRA-Dash learns along its directions, and LoRA-Init starts from them, from the first step on:

        ```py
        >>> model = get_peft_model(base, TsdConfig(prelaunch_steps=0, ...))
        >>> identify_from_gradients(model, islice(dataloader, 8))
        ```

    Call it before the first step, on every process, with batches of its own: all find the directions of the mean. No
    weight is written to and no `.grad` left, and training goes on as it would have: modes and random number generators
    are put back. Rates are in the unit of G over σ; their order is what counts.

    Args:
        model: The model with TSD adapters, wrapped (DDP, torch.compile, Accelerate) or not.
        batches: A few batches, on the model's device.
        optimizer: The optimizer, or all of them; needed where it has stepped before.
        adapter_name: The adapter; every active, trainable adapter by default.
        loss: The loss of the model and a batch, a scalar; `model(**batch).loss` by default.
        memory_gib: Most memory that gradients take at one time, on the weights' device. A gradient is as large as its
            weight in float32; layers are taken in groups that fit (at least one layer each), with a pass over the
            batches for each group.

    Raises:
        ValueError: There is no such adapter, no batch, no loss, or no gradient in any layer; or the directions have
            been identified before.
        TransitionError: As `advance`.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty; give a few batches of training data.")
    if not memory_gib > 0:
        raise ValueError(f"memory_gib must be a positive number of GiB; got {memory_gib!r}.")
    bare = extract_model_from_parallel(model, keep_torch_compile=False)
    for adapter in [adapter_name] if adapter_name is not None else trained_adapters(bare):
        layers = adapted_layers(bare, adapter)
        if not layers:
            raise ValueError(f"The model has no TSD layer with an adapter {adapter!r}.")
        if phase_of(layers, adapter) == "dash":
            raise ValueError(f"The directions of adapter {adapter!r} have been identified before.")
        transition(layers, adapter, optimizer, partial(_from_gradients, bare, batches, loss, memory_gib * 2**30))


def _from_gradients(
    model: nn.Module,
    batches: Sequence[Any],
    loss: Loss,
    memory: float,
    layers: Mapping[str, DirectedLayer],
    adapter: str,
) -> dict[str, Identified]:
    """The directions of every layer from the gradient of its frozen weight."""
    found: dict[str, Identified] = {}
    for group in weight_gradients(model, layers, batches, loss, memory):
        found |= _identified({name: layers[name] for name in group}, adapter, group.pop)
    return {name: found[name] for name in layers}


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


def _from_lora(layers: Mapping[str, DirectedLayer], adapter: str) -> dict[str, Identified]:
    """The directions of every layer from what its LoRA has learned."""
    with tqdm(total=len(layers), desc="Identifying directions", unit="layer", disable=not is_main_process()) as bar:
        return _identified(layers, adapter, lambda name: layers[name].learned_change(adapter), bar.update)


def _identified(
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    change_of: Callable[[str], Tensor | LowRank],
    on_turn: Callable[[int], object] = lambda done: None,
) -> dict[str, Identified]:
    """The directions of every layer, each found by one process and known to all."""

    def read(name: str, owner: int) -> tuple[Tensor | None, Tensor | LowRank]:
        return in_layer(name, lambda _: (layers[name].weight_in(owner), change_of(name)), adapter)

    def work(name: str, given: tuple[Tensor | None, Tensor | LowRank]) -> Identified:
        weight, change = given
        layer = layers[name]
        return in_layer(
            name, partial(layer.identify, change=change, spectrum=held_spectrum(layer), weight=weight), adapter
        )

    return share_out(layers, read, work, {name: layer.cost for name, layer in layers.items()}, on_turn)


def transition(
    layers: Mapping[str, DirectedLayer],
    adapter: str,
    optimizer: Optimizer | Sequence[Optimizer] | None,
    identify: Callable[[Mapping[str, DirectedLayer], str], dict[str, Identified]] = _from_lora,
) -> None:
    """Identify the directions of every layer and write them in; restart A and B where the method says so.

    Args:
        layers: All layers of the adapter.
        adapter: Its name.
        optimizer: Forgets the moments of what restarts; None where it has none yet.
        identify: Finds what to write, and writes nothing.

    Raises:
        TransitionError: As `advance`; nothing has been written then.
    """
    config = config_of(layers, adapter)
    restarted = [parameter for layer in layers.values() for parameter in layer.restarted(adapter)]
    owners = [] if optimizer is None else _owners(restarted, optimizer)
    for name, layer in layers.items():
        in_layer(name, layer.check_identifiable, adapter)
    try:
        found = identify(layers, adapter)
    finally:
        release(layers)
    if config.direction_budget == "global":
        slots = config.direction_slots
        scores = {name: over_chance(one.chosen.rates[:slots], one.chance) for name, one in found.items()}
        counts = spread(scores, config.num_directions * len(layers))
        found = {name: one.limited_to(counts[name]) for name, one in found.items()}
    for name, layer in layers.items():
        layer.fill(adapter, found[name])
    for parameter, owner in zip(restarted, owners):
        _forget(owner, parameter)


class TsdCallback(TrainerCallback):
    """Runs the schedule of TSD adapters in transformers' Trainer and in TRL's trainers.

        ```py
        >>> Trainer(model=model, ..., callbacks=[TsdCallback()]).train()
        ```

    An adapter without a pre-launch (`prelaunch_steps=0`) gets its directions before the first step, from the gradients
    of a few batches (`identify_from_gradients`).

    Args:
        batches: Those batches, or how many of the Trainer's training batches to take, the first ones of the first
            epoch. They are trained on all the same.
        loss: Of the model and a batch, for them alone; the model's own by default.

    Attributes:
        transitions: One entry a transition made, with its `step`, `seconds` and number of `layers`; `checks`, where an
            automatic pre-launch made any: the `step` of each and its `agreement` with the one before; and then
            `checks_seconds`, what they took in this process, with factorizing weights that the transition then need
            not, and `prelaunch_seconds`, what training took until then.

    Raises:
        ValueError: At the start of training, where the model has no trainable TSD adapter; otherwise as `advance` and
            `identify_from_gradients`.
    """

    def __init__(self, batches: int | Sequence[Any] = 8, loss: Loss = loss_of_output) -> None:
        if isinstance(batches, int) and (isinstance(batches, bool) or batches < 1):
            raise ValueError(f"batches must be a positive number of batches, or batches; got {batches!r}.")
        self.batches = batches
        self.loss = loss
        self.transitions: list[dict[str, Any]] = []
        self._held: list[DirectionSettings] = []
        self._began = 0.0
        self._checks_seconds = 0.0

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        remaining = state.max_steps - state.global_step
        for config, layers, adapter in _trained(model):
            for name, layer in layers.items():
                in_layer(name, layer.check_layout, adapter)
            restore(layers, adapter, state.global_step, args.output_dir)
            if config.prelaunch_steps == 0:
                if phase_of(layers, adapter) == "pre-launch":
                    start = time.perf_counter()
                    batches = self.batches
                    if isinstance(batches, int):
                        batches = _first(batches, train_dataloader)
                    identify_from_gradients(model, batches, optimizer, adapter, loss=self.loss)
                    self._record(state.global_step, start, layers, adapter)
                continue
            shortest = config.prelaunch_min if config.prelaunch_steps == "auto" else config.prelaunch_steps
            missing = shortest - steps_taken(layers, adapter)
            if remaining < missing:
                event = f"needs {missing} more optimizer steps, will train for only {remaining}, and so end"
                warn_in_prelaunch(config, layers, adapter, event)
            else:
                # Checkpoints written on the way are no finished adapters.
                config.prelaunch_notice_given = True
                self._held.append(config)
        self._began = time.perf_counter()

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        start = time.perf_counter()
        moved = advance(model, optimizer)
        if moved:
            for _, layers, adapter in _trained(model):
                fixed = next(iter(layers.values())).fixed(adapter)
                if whole(fixed.identified_at) == whole(fixed.step):
                    self._record(state.global_step, start, layers, adapter)
        else:
            self._checks_seconds += time.perf_counter() - start

    def _record(self, step: int, start: float, layers: Mapping[str, DirectedLayer], adapter: str) -> None:
        now = time.perf_counter()
        made: dict[str, Any] = {"step": step, "seconds": now - start, "layers": len(layers)}
        if config_of(layers, adapter).prelaunch_steps == "auto":
            made["checks"] = checks_made(layers, adapter)
            made["checks_seconds"] = self._checks_seconds
            made["prelaunch_seconds"] = start - self._began
        self.transitions.append(made)
        log.info("directions of adapter %r identified: %s", adapter, made)

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


def _first(number: int, dataloader: Any) -> list[Any]:
    """The first batches of a Trainer's dataloader, which gives them again when training begins."""
    if dataloader is None:
        raise ValueError("There is no training dataloader to take batches from; pass TsdCallback(batches=[...]).")
    sampler, batch_sampler = getattr(dataloader, "sampler", None), getattr(dataloader, "batch_sampler", None)
    owners = (dataloader, sampler, getattr(batch_sampler, "sampler", None))
    generators = [g for g in (getattr(owner, "generator", None) for owner in owners) if g is not None]
    states = [generator.get_state() for generator in generators]
    with random_states_kept():
        batches = list(islice(dataloader, number))
    for generator, state in zip(generators, states):
        generator.set_state(state)
    # Accelerate holds a dataloader for the one in use until it has been read to its end.
    in_use = getattr(dataloader, "gradient_state", None)
    if in_use is not None and in_use.active_dataloader is dataloader:
        dataloader.end()
    return batches


def _owners(parameters: list[nn.Parameter], optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizer that holds each parameter.

    Raises:
        TransitionError: None of those given does.
    """
    optimizers = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    # Accelerate wraps the optimizer whose state is meant.
    optimizers = [getattr(opt, "optimizer", opt) for opt in optimizers]
    owner = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    owner |= {id(p): optimizers[0] for p in parameters if zero.is_copied(p)}
    missing = sum(id(p) not in owner for p in parameters)
    if missing:
        kinds = ", ".join(type(opt).__name__ for opt in optimizers)
        raise TransitionError(
            f"The optimizer given ({kinds}) does not hold {missing} of the {len(parameters)} A and B that restart, "
            "so that their moments cannot be cleared. Pass the optimizer that was built from this model's parameters; "
            "where it keeps flattened copies of them, use method='lora-dash'."
        )
    return [owner[id(p)] for p in parameters]


def _forget(optimizer: Optimizer, parameter: Tensor) -> None:
    """Bring the optimizer to the state it had before it first saw `parameter`."""
    if zero.is_copied(parameter):
        zero.forget(parameter, optimizer)
    elif isinstance(optimizer, torch.optim.Adagrad):
        # The one optimizer that fills its state when it is built, not when it first steps.
        state = optimizer.state[parameter]
        state["step"].zero_()
        state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
    else:
        optimizer.state.pop(parameter, None)
