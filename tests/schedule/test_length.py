"""How long a pre-launch is of which nothing was said: the paper's 100 steps, but not more than a fifth of the run."""

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, PeftConfig, get_peft_model

from peft_tsd import DashConfig, PrelaunchWarning, TsdConfig
from peft_tsd.errors import RecipeError
from peft_tsd.recipes.adapters import adapter_config
from peft_tsd.recipes.shared import RunRecipe, Saving
from support import tiny
from support.trainers import trainer


@given(st.integers(1, 10_000))
def test_it_is_a_fifth_of_the_run_and_at_most_100_steps(steps):
    config = TsdConfig(direction_source="weight")
    config.settle_prelaunch(steps)
    assert 1 <= config.prelaunch_steps <= 100
    assert config.prelaunch_steps == 1 or config.prelaunch_steps * 5 <= steps
    assert config.prelaunch_steps == 100 or (config.prelaunch_steps + 1) * 5 > steps


@pytest.mark.parametrize(
    ("given", "settled"),
    [({}, 100), ({"prelaunch_steps": 7}, 7), ({"prelaunch_steps": "auto"}, "auto"), ({"prelaunch_steps": 0}, 0)],
)
def test_a_number_that_was_given_stays_and_a_run_of_no_known_length_has_the_papers(given, settled):
    config = TsdConfig(direction_source="weight", **given)
    config.settle_prelaunch()
    config.settle_prelaunch(20)  # once
    assert config.prelaunch_steps == settled


def test_directions_of_the_gradient_are_found_before_the_first_step():
    for config in (
        TsdConfig(direction_source="gradient"),
        DashConfig(peft=LoHaConfig(target_modules=["q_proj"]), direction_source="gradient"),
    ):
        assert config.prelaunch_steps == 0
    assert TsdConfig(direction_source="gradient", prelaunch_steps=5).prelaunch_steps == 5


def test_a_trainers_run_of_ten_steps_does_not_end_as_plain_lora(tmp_path):
    config = tiny.config(prelaunch_steps=None)
    model = get_peft_model(tiny.llama(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrelaunchWarning)
        trainer(tmp_path, model, max_steps=10).train()
        model.save_pretrained(tmp_path / "adapter")
    assert model.directions().prelaunch_steps == 2
    # What it was is saved; going on for longer changes nothing of it.
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).prelaunch_steps == 2


@pytest.mark.parametrize("stopped", [1, 3])
def test_a_run_that_is_resumed_has_the_same_length(tmp_path, stopped):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 11}
    trainer(tmp_path, get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=None)), **saving).train()
    again = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=None))
    checkpoint = str(tmp_path / f"checkpoint-{stopped}")
    trainer(tmp_path / "again", again, **saving).train(resume_from_checkpoint=checkpoint)
    assert again.directions().prelaunch_steps == 2


def test_a_loop_of_ones_own_has_the_papers():
    config = tiny.config(prelaunch_steps=None)
    model = get_peft_model(tiny.llama(), config)
    with pytest.raises(ValueError, match="it has taken 0 of its at most 100 pre-launch steps"):
        model.directions()
    tiny.train(model, 1)
    assert config.prelaunch_steps == 100
    assert model.phase() == "pre-launch"


def test_it_is_saved_as_unsaid_until_training_begins(tmp_path):
    TsdConfig(target_modules=["q_proj"], direction_source="weight").save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).prelaunch_steps is None


def test_a_recipe_knows_the_length_of_its_run():
    settings = {"adapter": {"target_modules": ["q_proj"]}, "directions": {"direction_source": "weight"}}
    recipe = RunRecipe(training=Saving(), output="run", **settings)
    assert recipe.directions.prelaunch_steps is None
    for steps, settled in ((60, 12), (1000, 100)):
        assert adapter_config(recipe, None, steps).prelaunch_steps == settled
        recipe.check_length(steps)
    with pytest.raises(RecipeError, match="training is 1 steps long, and directions.prelaunch_steps=1 of them"):
        recipe.check_length(1)
