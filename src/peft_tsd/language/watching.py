"""Who watches a training: Trainer's trackers, which draw its curves, and early stopping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
    get_reporting_integration_callbacks,
)

from ..errors import RecipeError, check_choice
from ..runs.folder import RunFolder
from ..runs.log import file_only
from ..schedule.stepping import trained_adapters
from ..tuner.phase import adapted_layers, phase_of
from .progress import Record


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker that Trainer does not know, or whose package is not installed.

    Raises:
        InputError: With the nearest one, or what to install.
    """
    for name in names:
        check_choice("training.report_to", name, list(INTEGRATION_TO_CALLBACK))
        if name not in get_available_reporting_integrations():
            raise RecipeError(f"training.report_to={name} needs the package {name}: pip install {name}")


def trackers(names: Sequence[str], folder: RunFolder) -> list[TrainerCallback]:
    """Trainer's own callbacks for these trackers. TensorBoard's files go into the run folder."""
    found: list[TrainerCallback] = [kind() for kind in get_reporting_integration_callbacks(list(names))]
    for tracker in found:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is None:  # no TENSORBOARD_LOGGING_DIR
            tracker.logging_dir = str(folder.path / "tensorboard")
    return found


class EarlyStop(EarlyStoppingCallback):
    """transformers' early stopping on the held-out loss, for a run that may be stopped and continued.

    Whenever the loss is the lowest so far a checkpoint is saved, to which Trainer returns in the end. Evaluations of
    the pre-launch do not count: a run that ended there would have no directions. How many have been in vain is kept
    with the run's progress.

    Args:
        patience: Evaluations in a row without a lower loss, at which training ends.
        record: The run's.
        folder: The run's, which may have been moved since its last checkpoint.
    """

    def __init__(self, patience: int, record: Record, folder: RunFolder) -> None:
        super().__init__(early_stopping_patience=patience)
        self._progress = record.progress
        self._folder = folder
        self.early_stopping_patience_counter = self._progress.get("evaluations_in_vain", 0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = str(self._folder.checkpoint(state.best_global_step))

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], model: nn.Module, **kwargs: Any
    ) -> None:
        if in_prelaunch(model):
            return
        super().on_evaluate(args, state, control, metrics, **kwargs)
        in_vain = self._progress["evaluations_in_vain"] = self.early_stopping_patience_counter
        if in_vain == 0:
            self._progress["best_step"] = state.global_step
            control.should_save = True
        elif in_vain >= self.early_stopping_patience and state.global_step < state.max_steps:
            self._progress["stopped_early"] = True
            control.should_save = True
            file_only(
                f"step {state.global_step}: stopped early, with a held-out loss of {metrics['eval_loss']:.4f}; the "
                f"lowest was {state.best_metric:.4f} at step {self._progress['best_step']}"
            )


def in_prelaunch(model: nn.Module) -> bool:
    """Whether an adapter of the model that is being trained has yet to get its directions."""
    try:
        adapters = trained_adapters(model)
    except ValueError:  # of another method
        return False
    return any(phase_of(adapted_layers(model, adapter), adapter) == "pre-launch" for adapter in adapters)
