"""Every method a recipe can name, trained on a tiny model: what is trained, kept, and scored again."""

from typing import get_args

import pytest
import torch
from peft import AdaLoraConfig
from safetensors.torch import load_file

from peft_tsd.compare.plan import METHODS, MORE_METHODS
from peft_tsd.language import training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import Recipe, load_recipe
from peft_tsd.recipes.adapters import adapter_config, is_adalora
from peft_tsd.recipes.methods import METHODS as TABLE
from peft_tsd.runs.stopping import Interrupted
from support import text_models

# q_proj is 32 x 32 and down_proj 32 x 48, in each of two layers; three directions a layer.
SIZES = [(32, 32), (32, 48)] * 2
DASH = 3 * len(SIZES)
LORA = 2 * sum(out + inner for out, inner in SIZES)
TRAINED = {
    "lora": LORA,
    "dora": LORA + sum(out for out, _ in SIZES),
    "pissa": LORA,
    # A rank of 3 = 1.5 · 2, and one singular value each.
    "adalora": LORA // 2 * 3 + 3 * len(SIZES),
    "loha": 2 * LORA,
    "vera": sum(out + 64 for out, _ in SIZES),
    # Blocks of 8, each a skew-symmetric matrix.
    "oft": sum(inner // 8 * 28 for _, inner in SIZES),
}


@pytest.fixture
def place(tmp_path):
    return text_models.place_in(tmp_path, 20)


def test_compare_knows_every_method():
    assert set(METHODS + MORE_METHODS) == set(get_args(Recipe.model_fields["method"].annotation))


# Those that start from batches have tests of their own (language/test_starts.py).
@pytest.mark.parametrize(
    "method",
    [n for n, row in TABLE.items() if row.trains == "adapter" and row.directions != "own" and not row.from_batches],
)
def test_a_run_trains_keeps_and_scores_it(place, method):
    recipe = load_recipe(str(text_models.write_recipe(place)), [f"method={method}"])
    result = training.train(recipe)
    of_peft, _, beside = method.partition("-")
    assert result.metrics["trainable_parameters"] == TRAINED[of_peft] + (DASH if beside else 0)
    assert result.metrics["loss"][-1]["loss"] < result.metrics["loss"][0]["loss"]
    change = result.metrics["phase_change"]
    assert (change["step"] if beside else change) == (4 if beside else None)
    if beside:
        # A layer of which AdaLoRA has left nothing has no directions.
        moved = torch.cat([layer.delta_sigma.abs() for layer in result.model.directions().values()])
        assert len(moved) >= 3
        assert moved.min() > 0
    # A new model with what was kept scores, and computes, the same.
    assert evaluate(str(result.folder.path))["score"] == result.metrics["score"]["after"]


def test_a_stopped_run_of_another_method_goes_on_to_the_same_end(place, monkeypatch):
    recipe = text_models.write_recipe(place)
    whole = training.train(load_recipe(str(recipe), ["method=loha-dash", f"output={place / 'whole'}"]))
    from support.runs import interrupt_at

    interrupt_at(monkeypatch, "step 7:")
    overrides = ["method=loha-dash", f"output={place / 'stopped'}"]
    with pytest.raises(Interrupted):
        training.train(load_recipe(str(recipe), overrides))
    monkeypatch.undo()
    stopped = training.train(load_recipe(str(recipe), [*overrides, "resume=true"]))
    left, right = (load_file(r.folder.adapter / "adapter_model.safetensors") for r in (whole, stopped))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_adalora_spends_its_budget_within_the_run(place):
    recipe = load_recipe(str(text_models.write_recipe(place)), ["method=adalora"])
    config = adapter_config(recipe, "CAUSAL_LM", steps=100)
    assert isinstance(config, AdaLoraConfig)
    assert is_adalora(config)
    assert (config.init_r, config.target_r, config.total_step) == (3, 2, 100)
    assert 0 < config.tinit < config.total_step - config.tfinal
    # After the last step every layer together has the budget of LoRA.
    model = training.train(recipe).model
    kept = [int(parameter.count_nonzero()) for name, parameter in model.named_parameters() if ".lora_E." in name]
    assert sum(kept) == 2 * len(SIZES)
