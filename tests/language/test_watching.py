"""Curves that trackers draw of a run, and early stopping."""

import json
import sys

import pytest
from peft import get_peft_model

from peft_tsd import TsdCallback
from peft_tsd.errors import InputError
from peft_tsd.language.recipe import load_recipe
from peft_tsd.runs.stopping import Interrupted
from support import text_models, tiny
from support.runs import assert_same_result, interrupt_at, run
from support.trainers import trainer


def scalars(folder) -> dict[str, dict[int, float]]:
    """What TensorBoard's own reader finds: values by step, by tag."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    read = accumulator.EventAccumulator(str(folder))
    read.Reload()
    return {tag: {e.step: e.value for e in read.Scalars(tag)} for tag in read.Tags()["scalars"]}


def test_tensorboard_shows_the_phase_the_transition_and_the_evaluations(place):
    result = run(text_models.write_recipe(place), "training.report_to=tensorboard", "evaluation.every=3")
    shown = scalars(place / "run" / "tensorboard")
    losses = {row["step"]: row["loss"] for row in result.metrics["loss"]}
    assert shown["train/loss"] == pytest.approx(losses)
    # 4 steps of pre-launch.
    assert shown["train/tsd_phase"] == {step: float(step >= 4) for step in range(1, 13)}
    assert shown["train/tsd_transition_step"] == {4: 4.0}
    assert shown["train/tsd_transition_seconds"] == pytest.approx({4: result.metrics["phase_change"]["seconds"]})
    assert list(shown["train/tsd_delta_sigma"]) == list(range(4, 13))
    assert shown["train/tsd_delta_sigma"][4] == 0
    found = result.model.directions()
    moved = [abs(float(x)) for layer in found.values() for x in layer.delta_sigma]
    assert shown["train/tsd_delta_sigma"][12] == pytest.approx(sum(moved) / len(moved), rel=1e-5)
    for name in ("loss", "exact_match"):
        evaluated = {row["step"]: row[name] for row in result.metrics["evaluations"]}
        assert shown[f"eval/{name}"] == pytest.approx(evaluated)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora-init"},
        {"direction_budget": "global", "max_directions": 7},
        {"prelaunch_steps": 0},
        {"r": 4, "num_directions": 2},
    ],
    ids=["no dash", "spread", "from gradients", "a start along more than are learned along"],
)
def test_ones_own_trainer_shows_them_too(tmp_path, changes):
    model = get_peft_model(tiny.llama(), tiny.config(**{"prelaunch_steps": 4, **changes}))
    pytest.importorskip("tensorboard")
    training = trainer(tmp_path, model, callbacks=[], report_to="tensorboard")
    assert TsdCallback().add_to(training).transitions == []
    training.train()
    [folder] = (tmp_path / "runs").iterdir()
    shown = scalars(folder)
    start = changes.get("prelaunch_steps", 4)
    assert shown["train/tsd_phase"] == {step: float(step >= start) for step in range(1, 9)}
    assert list(shown["train/tsd_transition_step"].values()) == [start]
    moved = [abs(float(x)) for layer in model.directions().values() for x in layer.delta_sigma]
    if moved:
        assert shown["train/tsd_delta_sigma"][8] == pytest.approx(sum(moved) / len(moved), rel=1e-5)
    else:
        assert "train/tsd_delta_sigma" not in shown
    # Trainer's history, which a checkpoint keeps, has the same.
    kept = [row for row in training.state.log_history if "loss" in row]
    assert [row["tsd_phase"] for row in kept] == list(shown["train/tsd_phase"].values())


def test_given_as_a_callback_it_comes_after_the_trackers_and_says_so(tmp_path, caplog):
    pytest.importorskip("tensorboard")
    with caplog.at_level("INFO", logger="peft_tsd"):
        training = trainer(tmp_path, report_to="tensorboard")
        training.train()
    assert "tensorboard show the curves of Trainer alone; TsdCallback().add_to(trainer)" in caplog.text
    assert training.state.log_history[-2]["tsd_phase"] == 1


def test_a_tracker_that_is_not_there_is_refused_before_anything_starts(place, monkeypatch):
    recipe = text_models.write_recipe(place)
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(InputError, match="training.report_to=trackio needs the package trackio: pip install trackio"):
        run(recipe, "training.report_to=[trackio]")
    with pytest.raises(InputError, match="training.report_to='tensorbord' is not known; did you mean 'tensorboard'"):
        run(recipe, "training.report_to=tensorbord")
    assert not (place / "run").exists()
    assert load_recipe(str(recipe), ["training.report_to=none"]).training.report_to == []


# A rate at which the held-out loss of the tiny model soon rises again.
STOPS = (
    "evaluation.every=2", "evaluation.patience=1", "evaluation.before=false", "training.steps=40",
    "optimizer.learning_rate=10.0", "optimizer.schedule=constant", "data.test_size=2", "task.max_new_tokens=1",
    "directions.keep_prelaunch=false",  # so that the loss rises at the transition
)  # fmt: skip


def test_a_run_ends_when_the_held_out_loss_has_stopped_falling(place):
    result = run(text_models.write_recipe(place), *STOPS)
    metrics = result.metrics
    after = [row for row in metrics["evaluations"] if row["step"] >= 4]
    best = min(range(len(after)), key=lambda i: after[i]["loss"])
    assert metrics["stopped_early"]
    assert len(after) == best + 2
    # The pre-launch has a lower loss than the evaluation after it, which is none in vain all the same.
    assert metrics["evaluations"][0]["loss"] < after[0]["loss"]
    assert metrics["steps"] == after[-1]["step"] < 40
    # It ends with the adapter of the best evaluation, whatever came before the transition.
    assert metrics["best_step"] == after[best]["step"]
    assert metrics["score"]["loss"] == pytest.approx(after[best]["loss"], rel=1e-5)
    assert result.model.phase() == "dash"
    said = (
        f"stopped early, with a held-out loss of {after[-1]['loss']:.4f}; the lowest was {after[best]['loss']:.4f} at"
    )
    assert said in result.folder.log.read_text()


@pytest.mark.parametrize("line", [pytest.param("step 7:", marks=pytest.mark.long), "stopped early"])
def test_a_run_that_is_stopped_and_continued_stops_early_just_as_well(place, monkeypatch, line):
    recipe = text_models.write_recipe(place)
    whole = run(recipe, *STOPS)
    with monkeypatch.context() as patch:
        start = line if line != "stopped early" else f"step {whole.metrics['steps']}: stopped"
        interrupt_at(patch, start, where="watching" if line == "stopped early" else "progress")
        with pytest.raises(Interrupted):
            run(recipe, *STOPS, "output=stopped")
    # The folder may be moved meanwhile.
    (place / "stopped").rename(place / "moved")
    moved = run(place / "moved" / "recipe.yaml", "resume=true")
    assert_same_result(whole.folder, moved.folder)
    assert json.loads(moved.folder.metrics.read_text())["best_step"] == whole.metrics["best_step"]


def test_patience_without_evaluations_is_refused(place):
    with pytest.raises(InputError, match="evaluation.patience=3 counts evaluations during training; say how often"):
        load_recipe(str(text_models.write_recipe(place)), ["evaluation.patience=3"])
