"""The best model of a Trainer, and early stopping by it, over a transition that is made on the way."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import EarlyStoppingCallback, TrainerCallback

from peft_tsd import TsdCallback
from support import tiny
from support.trainers import adapter_bits, trainer

PRELAUNCH = 4

SCORES = {1: 0.9, 2: 0.8, 3: 0.7, 4: 0.1, 5: 0.3, 6: 0.2, 7: 0.3, 8: 0.2}
"""By step, more being better: the plain LoRA of the pre-launch is far better than anything after it."""


class Scores(TrainerCallback):
    """Adds to what an evaluation found."""

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        metrics["eval_score"] = SCORES[state.global_step]


class Stops(TrainerCallback):
    """Ends training between two evaluations."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == PRELAUNCH + 1


def with_prelaunch(out, direction_source, callbacks=(), **changes):
    config = tiny.config(prelaunch_steps=PRELAUNCH, direction_source=direction_source)
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True, **changes}
    model = get_peft_model(tiny.llama(), config)
    return trainer(out, model, callbacks=[Scores(), *callbacks, TsdCallback()], **settings)


@pytest.mark.parametrize("direction_source", ["weight", "gradient"])
def test_patience_and_the_best_score_begin_anew_at_the_transition(direction_source, tmp_path):
    training = with_prelaunch(
        tmp_path, direction_source, [EarlyStoppingCallback(early_stopping_patience=3)], max_steps=20,
        eval_steps=1, save_steps=1, metric_for_best_model="score", greater_is_better=True,
    )  # fmt: skip
    training.train()
    # Two of the pre-launch were worse than its first. Of those after it the second is best, and three were no better.
    assert training.state.global_step == 8
    assert training.state.best_global_step == 5
    assert training.state.best_metric == SCORES[5]
    assert training.model.phase() == "dash"
    assert training.model.directions().prelaunch_steps == PRELAUNCH
    best = load_file(tmp_path / "checkpoint-5" / "adapter_model.safetensors")
    brought_back = adapter_bits(training.model, tmp_path / "adapter")
    assert brought_back.keys() == best.keys()
    assert all(torch.equal(brought_back[name], best[name]) for name in best)


@pytest.mark.parametrize("direction_source", ["weight", "gradient"])
def test_where_nothing_is_evaluated_after_the_transition_the_end_of_training_stays(direction_source, tmp_path):
    training = with_prelaunch(
        tmp_path, direction_source, [Stops()], max_steps=20, eval_steps=3, save_steps=3, metric_for_best_model="score",
        greater_is_better=True,
    )  # fmt: skip
    training.train()
    assert [row["step"] for row in training.state.log_history if "eval_loss" in row] == [3]
    assert training.state.global_step == PRELAUNCH + 1
    assert training.model.phase() == "dash"
    assert all(bool(found.delta_sigma.any()) for found in training.model.directions().values())
