"""`TsdCallback`: the schedule in transformers' Trainer and TRL's trainers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers.trainer_callback import TrainerCallback

from ..errors import in_layer
from ..tuner.directed import DirectedLayer
from ..tuner.phase import adapted_layers, check_one_phase, config_of, phase_of, steps_taken, warn_in_prelaunch
from ..tuner.settings import DirectionSettings
from ..tuner.zero_checkpoints import restore
from .curves import curves, number_of_directions
from .gradients import Loss, loss_of_output, random_states_kept
from .moments import check_groups
from .prelaunch import checks_made
from .stepping import advance, check_replicas, check_unmerged, identify_from_gradients, log, trained_adapters

START_BATCHES = 8
"""How many batches tell enough of a dense gradient, or of inputs, to start from, where nobody says how many."""

NO_WARM_UP = (
    "The learning rate is at its full height from the first optimizer step on, which can undo much of the first step "
    "along the gradient that adapter %r has just begun with. Let it rise over a few steps, as warmup_steps=5 does."
)


class TsdCallback(TrainerCallback):
    """Runs the schedule of TSD adapters in transformers' Trainer and in TRL's trainers.

        ```py
        >>> Trainer(model=model, ..., callbacks=[TsdCallback()]).train()
        ```

    An adapter without a pre-launch (`prelaunch_steps=0`) gets its directions before the first step, from the gradients
    of a few batches (`identify_from_gradients`); one with directions of the gradient, after its pre-launch.

    A first step along the gradient can be undone in part by a learning rate at its full height: where training begins
    without warm-up, the log warns of that.

    A pre-launch for directions of the weight of which no length was said takes a fifth of the run, 100 steps at most.

    The best model so far (`load_best_model_at_end`, early stopping) is forgotten at a transition, which is logged with
    the loss before and after it: a checkpoint from before is the plain LoRA of the pre-launch.

    What Trainer logs of the training gets `tsd_phase` (0 in the pre-launch, 1 after it), `tsd_delta_sigma` (the mean
    |Δσ|) and, once, `tsd_transition_step` and `tsd_transition_seconds`. Trainer's trackers (`report_to`) come before
    the callbacks that it is given; for these numbers to be in their curves, put the callback before them:

        ```py
        >>> trainer = Trainer(model=model, args=TrainingArguments(report_to="tensorboard"), ...)
        >>> TsdCallback().add_to(trainer)
        >>> trainer.train()
        ```

    Args:
        batches: Those batches, or how many of the Trainer's training batches to take, the first ones of the first
            epoch. They are trained on all the same. By default, for directions of the gradient those of two optimizer
            steps, one for the gradient and one to find the first step's length; 8 for directions of the weight.
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

    def __init__(self, batches: int | Sequence[Any] | None = None, loss: Loss = loss_of_output) -> None:
        if isinstance(batches, int) and (isinstance(batches, bool) or batches < 1):
            raise ValueError(f"batches must be a positive number of batches, or batches; got {batches!r}.")
        self.batches = batches
        self.loss = loss
        self.transitions: list[dict[str, Any]] = []
        self._batches: list[Any] = []
        self._loss_before: float | None = None
        self._changed_at: int | None = None  # until the loss after the transition has been logged
        self._last_logged = 0
        self._held: list[DirectionSettings] = []
        self._began = 0.0
        self._checks_seconds = 0.0
        self._logged = 0
        self._numbers: dict[str, int] = {}
        self._added = False

    def add_to(self, trainer: Any) -> TsdCallback:
        """Put this callback before all others of a Trainer, its trackers among them, in place of `callbacks=`.

        Args:
            trainer: transformers' Trainer, or one of TRL's.

        Returns:
            The callback.
        """
        handler = trainer.callback_handler
        handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        self._added = True
        return self

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
        self._last_logged = state.global_step
        for config, layers, adapter in _trained(model):
            config.settle_prelaunch(state.max_steps)
            check_unmerged(layers, adapter)
            check_one_phase(layers, adapter)
            if optimizer is not None:
                check_groups(layers, adapter, optimizer)
            for name, layer in layers.items():
                in_layer(name, layer.check_layout, adapter)
            restore(layers, adapter, state.global_step, args.output_dir)
            check_replicas(layers, adapter)
            if config.needs_gradients and phase_of(layers, adapter) == "pre-launch":
                # Now, also for later: a dataloader in use must not be read from its beginning.
                given = self.batches
                if given is None:
                    given = (
                        START_BATCHES if config.direction_source == "weight" else 2 * args.gradient_accumulation_steps
                    )
                self._batches = first_batches(given, train_dataloader) if isinstance(given, int) else list(given)
                self._identify_if_due(model, optimizer, layers, adapter, state)
                begun = config.begins_with_step and phase_of(layers, adapter) == "dash"
                if begun and state.is_world_process_zero and not warms_up(optimizer, args.learning_rate):
                    log.warning(NO_WARM_UP, adapter)
            if config.prelaunch_steps == 0:
                continue
            shortest = config.prelaunch_min if config.prelaunch_steps == "auto" else config.longest_prelaunch
            missing = shortest - steps_taken(layers, adapter)
            if remaining < missing:
                event = f"needs {missing} more optimizer steps, will train for only {remaining}, and so end"
                length = "prelaunch_min" if config.prelaunch_steps == "auto" else "prelaunch_steps"
                cause = f"Train for {missing - remaining} steps more, or lower {length} to at most {remaining}."
                warn_in_prelaunch(config, layers, adapter, event, cause)
            else:
                # Checkpoints written on the way are no finished adapters.
                config.prelaunch_notice_given = True
                self._held.append(config)
        self._began = time.perf_counter()
        trackers = [name for name in (args.report_to or ()) if name != "none"]
        if trackers and not self._added:
            log.info(
                "%s show the curves of Trainer alone; TsdCallback().add_to(trainer), in place of callbacks=, has the "
                "phase and the mean |Δσ| in them too",
                ", ".join(trackers),
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Optimizer, **kwargs: Any
    ) -> None:
        start = time.perf_counter()
        moved = advance(model, optimizer)
        if moved:
            for _, layers, adapter in _trained(model):
                fixed = next(iter(layers.values())).fixed(adapter)
                if fixed.identified_at == fixed.step:
                    self._record(state, start, layers, adapter)
        else:
            self._checks_seconds += time.perf_counter() - start
        if self._batches:
            trained = _trained(model)
            for _, layers, adapter in trained:
                self._identify_if_due(model, optimizer, layers, adapter, state)
            if all(phase_of(layers, adapter) == "dash" for _, layers, adapter in trained):
                self._batches = []

    def _identify_if_due(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        layers: Mapping[str, DirectedLayer],
        adapter: str,
        state: Any,
    ) -> None:
        """From the gradients of the batches, where a pre-launch that ends with them is over."""
        config = config_of(layers, adapter)
        waits = config.needs_gradients and phase_of(layers, adapter) == "pre-launch"
        if waits and steps_taken(layers, adapter) >= config.longest_prelaunch:
            start = time.perf_counter()
            identify_from_gradients(model, self._batches, optimizer, adapter, loss=self.loss)
            self._record(state, start, layers, adapter)

    def _record(self, state: Any, start: float, layers: Mapping[str, DirectedLayer], adapter: str) -> None:
        now = time.perf_counter()
        made: dict[str, Any] = {"step": state.global_step, "seconds": now - start, "layers": len(layers)}
        if config_of(layers, adapter).prelaunch_steps == "auto":
            made["checks"] = checks_made(layers, adapter)
            made["checks_seconds"] = self._checks_seconds
            made["prelaunch_seconds"] = start - self._began
        self.transitions.append(made)
        log.info("directions of adapter %r identified: %s", adapter, made)
        self._changed_at = state.global_step
        self._loss_before = next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None)
        if state.best_model_checkpoint is not None:
            log.info(
                "the best checkpoint so far, of step %s, is from before the transition: the best is looked for anew",
                state.best_global_step,
            )
        # `load_best_model_at_end` would bring back the plain LoRA of the pre-launch, and early stopping measure by it.
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self, args: Any, state: Any, control: Any, model: nn.Module, logs: dict[str, float], **kwargs: Any
    ) -> None:
        if "loss" not in logs:
            return
        self._note_loss(state.global_step, logs["loss"])
        shown = self._curves(model)
        logs.update(shown)
        # What Trainer keeps, and saves with a checkpoint, is a copy.
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(shown)

    def _note_loss(self, step: int, loss: float) -> None:
        """Log the loss before and after the transition. Trainer logs the mean of the steps since it last did."""
        if self._changed_at is not None:
            if step == self._changed_at:
                self._loss_before = loss
            elif self._last_logged >= self._changed_at:
                if self._loss_before is not None:
                    log.info(
                        "loss %.4f before the transition of step %d, %.4f after it, in steps %d to %d",
                        self._loss_before, self._changed_at, loss, self._last_logged + 1, step,
                    )  # fmt: skip
                self._changed_at = None
        self._last_logged = step

    def _curves(self, model: nn.Module) -> dict[str, float]:
        trained = _trained(model)
        shown: dict[str, float] = {}
        for _, layers, adapter in trained:
            ending = f"_{adapter}" if len(trained) > 1 else ""
            if adapter not in self._numbers and phase_of(layers, adapter) == "dash":
                self._numbers[adapter] = number_of_directions(layers, adapter)
            found = curves(layers, adapter, self._numbers.get(adapter, 0))
            shown |= {name + ending: value for name, value in found.items()}
        for made in self.transitions[self._logged :]:
            shown |= {"tsd_transition_step": made["step"], "tsd_transition_seconds": made["seconds"]}
        self._logged = len(self.transitions)
        return shown

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


def warms_up(optimizer: Optimizer | None, learning_rate: float) -> bool:
    """Whether a learning rate is still to rise, as a schedule at its first step has it; where nobody knows, it is.

    Args:
        optimizer: As training begins with it.
        learning_rate: How high it rises where the schedule does not say so (DeepSpeed's own).
    """
    groups = [] if optimizer is None else optimizer.param_groups
    return not groups or any(group["lr"] < group.get("initial_lr", learning_rate) for group in groups)


def first_batches(number: int, dataloader: Any) -> list[Any]:
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
