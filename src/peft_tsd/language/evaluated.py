"""Evaluation during training: transformers' Trainer decides when, the run's own task says what is measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .batch_shares import SharedBatches


class Evaluated(SharedBatches):
    """A Trainer, of which this is put before the class, that evaluates by what a run scores: the held-out loss, and
    the metric.

    Its schedule, its log and its callbacks (early stopping, trackers) are Trainer's own.

    Args:
        measure: Given the model, what is measured, by name; `loss` is one of them where there is one.
    """

    def __init__(self, *args: Any, measure: Callable[[Any], dict[str, float]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._measure = measure

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        assert self._measure is not None
        measured = {f"{metric_key_prefix}_{name}": value for name, value in self._measure(self.model).items()}
        return EvalLoopOutput(predictions=None, label_ids=None, metrics=measured, num_samples=len(self.eval_dataset))


class EvaluatedTrainer(Evaluated, Trainer):
    """transformers' Trainer, evaluated so."""
