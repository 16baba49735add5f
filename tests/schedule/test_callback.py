"""The best model of a Trainer, and the transition."""

import logging

import pytest
from peft import get_peft_model

from peft_tsd import TsdCallback
from support import tiny
from support.trainers import trainer


def test_the_best_model_is_never_one_from_before_the_transition(tmp_path, caplog):
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=4))
    callback = TsdCallback()
    training = trainer(
        tmp_path, model, callbacks=[callback], eval_strategy="steps", eval_steps=2, save_strategy="steps",
        save_steps=2, load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    evaluate = training.evaluate

    def evaluated(*args, **kwargs):
        metrics = evaluate(*args, **kwargs)
        if training.state.global_step < 4:
            metrics["eval_loss"] = -100.0
        return metrics

    training.evaluate = evaluated
    with caplog.at_level(logging.INFO, logger="peft_tsd"):
        training.train()
    assert training.state.best_global_step >= 4  # evaluated after the transition of that step
    assert model.phase() == "dash"
    assert model.directions().prelaunch_steps == 4
    assert "of step 2, is from before the transition" in caplog.text


@pytest.mark.parametrize("source", ["weight", "gradient"])
@pytest.mark.parametrize(
    ("every", "before", "after"), [(1, 4, (5, 5)), (2, 4, (5, 6)), (4, 4, (5, 8)), (3, 3, (7, 9))], ids=str
)
def test_the_loss_before_the_transition_and_after_it_is_logged(tmp_path, caplog, source, every, before, after):
    """What Trainer logs at a step is of the steps since it last did: of one that has steps of both, neither."""
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=4, direction_source=source))
    training = trainer(tmp_path, model, callbacks=[TsdCallback()], max_steps=10, logging_steps=every)
    with caplog.at_level(logging.INFO, logger="peft_tsd"):
        training.train()
    losses = {row["step"]: row["loss"] for row in training.state.log_history if "loss" in row}
    [said] = [record.getMessage() for record in caplog.records if record.getMessage().startswith("loss ")]
    then = f"{losses[after[1]]:.4f} after it, in steps {after[0]} to {after[1]}"
    assert said == f"loss {losses[before]:.4f} before the transition of step 4, {then}"
