"""The best model of a Trainer, and the transition."""

import logging

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
    [said] = [record.getMessage() for record in caplog.records if "before the transition," in record.getMessage()]
    assert said.startswith("loss ")
