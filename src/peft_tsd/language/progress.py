"""The progress of a training: shown, recorded, and kept with every checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import TrainerCallback

from ..distributed.sharded import is_main_process, whole_state
from ..errors import RecipeError
from ..files.adapters import WEIGHTS
from ..models.origin import Fingerprint, write_origin
from ..runs.folder import RunFolder
from ..runs.log import file_only
from ..runs.machine import peak_memory
from ..runs.processes import by_main, gathered
from ..runs.stopping import Stop
from ..schedule.callback import TsdCallback
from ..schedule.gradients import random_states_kept

# What Trainer adds to every evaluation.
_SPEED = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second")


class Record(TrainerCallback):
    """Shows and records progress, stops when asked, and marks checkpoints as complete."""

    def __init__(
        self,
        folder: RunFolder,
        steps: int,
        made_of: Fingerprint,
        stop: Stop,
        schedule: TsdCallback | None,
        before: dict[str, Any] | None,
    ) -> None:
        self._folder = folder
        self._steps = steps
        self._made_of = made_of
        self._stop = stop
        self.took_steps = False
        self._schedule = schedule
        self._transitions_before = before["transitions"] if before else []
        self.progress = before or begun()
        self._bar: Any = None
        self._started = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar = tqdm(
            total=self._steps, initial=state.global_step, desc="training", unit="step", disable=not is_main_process()
        )

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress["seconds"] += time.perf_counter() - self._started
        self.progress["steps_timed"] += 1
        self.took_steps = True
        self.progress["step"] = state.global_step
        self._bar.update()
        if self._stop.agreed():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if "loss" not in logs:
            return
        loss = logs["loss"]
        self._bar.set_postfix(loss=f"{loss:.3f}")
        file_only(f"step {state.global_step}: loss {loss:.4f}")
        if not math.isfinite(loss):
            raise RecipeError(
                f"the loss is {loss} at step {state.global_step}: training diverged; lower optimizer.learning_rate, "
                "or use model.dtype=float32"
            )
        entry = {"step": state.global_step, "loss": loss, "learning_rate": logs["learning_rate"]}
        self.progress["loss"] = [*self.progress["loss"], entry]

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        measured = {name.removeprefix("eval_"): metrics[name] for name in metrics if not name.startswith(_SPEED)}
        measured.pop("epoch", None)
        file_only(f"step {state.global_step}: held out: " + ", ".join(f"{k} {v:.4f}" for k, v in measured.items()))
        self.progress["evaluations"] = [*self.progress.get("evaluations", []), {"step": state.global_step, **measured}]

    def on_save(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self._update()
        checkpoint = self._folder.checkpoint(state.global_step)
        # Parts of an adapter cannot be checked, or scored: the whole lies beside what a sharded run continues from.
        adapter = whole_state(model, model.prefix) if isinstance(model, PeftModel) else None

        def complete() -> None:
            if adapter is not None:
                model.save_pretrained(checkpoint, state_dict=adapter)
            if (checkpoint / WEIGHTS).is_file():
                write_origin(checkpoint, self._made_of)
            self._folder.mark_complete(checkpoint, self.progress)

        gathered(None)  # each has written its part
        by_main(complete)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        self._update()

    def close(self) -> None:
        """End the bar's line, so that what is said next has its own."""
        if self._bar is not None:
            self._bar.close()

    def _update(self) -> None:
        made = self._schedule.transitions if self._schedule else []
        self.progress["transitions"] = [*self._transitions_before, *made]
        self.progress["peak_memory_bytes"] = max(self.progress.get("peak_memory_bytes") or 0, peak_memory() or 0)


class BeforeTraining(TrainerCallback):
    """Does something with the model as it is trained, sharded or not, before its first step in this process."""

    def __init__(self, work: Callable[[Any], None]) -> None:
        self._work = work

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        with random_states_kept():
            self._work(model)


def begun() -> dict[str, Any]:
    """The progress of a run that has taken no step."""
    return {"step": 0, "seconds": 0.0, "steps_timed": 0, "loss": [], "transitions": [], "peak_memory_bytes": None}
