"""The end of an automatic pre-launch, against the same rule on dense float64 rates."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from peft_tsd import PrelaunchWarning, TransitionError, TsdCallback, advance
from peft_tsd.directions.spectrum import Spectrum
from peft_tsd.schedule import prelaunch
from peft_tsd.schedule.prelaunch import checked_layers, checks_made
from peft_tsd.tuner import directed
from peft_tsd.tuner.phase import adapted_layers
from support import directions, reference, tiny
from support.trainers import adapter_bits, losses, trainer

AUTO = {"prelaunch_steps": "auto", "prelaunch_min": 4, "prelaunch_max": 12}


def adapted(method: str = "lora-tsd", **changes):
    return get_peft_model(tiny.llama(), tiny.config(method, **{**AUTO, **changes}))


def loop(model, steps: int, optimizer=None, lr: float = 1e-2):
    """Trains; yields before each step's `advance`, and after it."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(1, steps + 1):
        tiny.language_loss(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step
        advance(model, optimizer)


def highest(layer, num: int) -> set[int]:
    rates = reference.change_rates(layer.weight_matrix(), reference.effective_change(layer))
    return set(np.argsort(-rates)[:num].tolist())


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("method", ["lora-dash", "lora-init"])
def test_it_ends_where_the_directions_agree_with_those_of_the_last_check(method, threshold):
    model = adapted(method, settled_agreement=threshold)
    num = 5 if method == "lora-dash" else 4  # num_directions; r
    layers = adapted_layers(model, "default")
    before, agreements, expected = None, {}, None
    for step in loop(model, 14):
        if model.phase() == "dash":
            continue
        assert expected is None
        if step in (3, 4, 5, 7, 9):
            now = [highest(layer, num) for layer in layers.values()]
            if before:
                agreements[step] = np.mean([len(a & b) / num for a, b in zip(before, now)])
            before = now
        if (step >= 4 and agreements.get(step, 0) >= threshold) or step == 12:
            expected = step
    assert model.directions().prelaunch_steps == expected
    made = {check["step"]: check["agreement"] for check in checks_made(layers, "default")}
    assert made == pytest.approx(agreements)
    assert not any(one in prelaunch._held for one in layers.values())


def test_the_directions_are_those_of_a_pre_launch_of_that_length(monkeypatch):
    """What was factorized for the checks is used again, and gives the same bits."""
    factorized = []
    for module in (prelaunch, directed):
        monkeypatch.setattr(module, "Spectrum", lambda weight: factorized.append(weight) or Spectrum(weight))
    model = adapted(settled_agreement=0.1)
    fixed = adapted(prelaunch_steps=4)
    for one in (model, fixed):
        for _ in loop(one, 6):
            pass
        assert len(factorized) == 6
        factorized.clear()
    assert model.directions().prelaunch_steps == fixed.directions().prelaunch_steps == 4
    for name, found in model.directions().items():
        for part in ("indices", "rates", "u", "v", "delta_sigma"):
            assert torch.equal(getattr(found, part), getattr(fixed.directions()[name], part))


def test_an_end_that_never_settles_is_the_longest():
    model = adapted(settled_agreement=1.0)
    for step in loop(model, 14):
        with torch.no_grad():
            for layer in adapted_layers(model, "default").values():
                layer.lora_A["default"].weight.normal_(generator=torch.Generator().manual_seed(step))
    assert model.directions().prelaunch_steps == 12


def test_what_it_saw_is_in_the_transition_and_in_the_log(tmp_path, caplog):
    callback = TsdCallback()
    run = trainer(tmp_path, adapted(settled_agreement=0.3), [callback], max_steps=14)
    with caplog.at_level("INFO", logger="peft_tsd"):
        run.train()
    [made] = callback.transitions
    assert made["step"] == run.model.directions().prelaunch_steps
    assert [check["step"] for check in made["checks"]] == [s for s in (4, 5, 7, 9) if s <= made["step"]]
    assert all(0 <= check["agreement"] <= 1 for check in made["checks"])
    assert 0 < made["checks_seconds"] < made["prelaunch_seconds"]
    told = [record.getMessage() for record in caplog.records]
    assert sum("6 layers" in line and "were there at the last check" in line for line in told) >= len(made["checks"])
    assert any("identified" in line and "checks" in line for line in told)


@pytest.mark.parametrize("checkpoint", [2, 4, 8])
def test_a_resumed_run_decides_the_same(checkpoint, tmp_path):
    def model():
        return adapted(settled_agreement=0.95, lora_dropout=0.1)

    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 2}
    whole = trainer(tmp_path / "run", model(), **settings)
    whole.train()
    expected = adapter_bits(whole.model, tmp_path / "whole")
    callback = TsdCallback()
    again = trainer(tmp_path / "run", model(), [callback], **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
    assert whole.model.directions().prelaunch_steps > 5
    resumed = adapter_bits(again.model, tmp_path / "again")
    assert losses(again) == losses(whole)
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    if callback.transitions:
        # The checks before the interruption are told too.
        assert [check["step"] for check in callback.transitions[0]["checks"]][:2] == [4, 5]
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "again")
    assert loaded.directions().prelaunch_steps == whole.model.directions().prelaunch_steps


@given(st.integers(1, 90), st.integers(1, 12))
def test_a_large_model_is_checked_in_few_layers_evenly_spread(number, fit):
    class Layer(directed.DirectedLayer, torch.nn.Module):
        matrix_shape = (3 * 4096, 4096)

    layers = {str(i): Layer() for i in range(number)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prelaunch, "HELD_BYTES", fit * 8 * 4096**2)
        chosen = [int(name) for name in checked_layers(layers)]
    assert len(chosen) == min(number, fit)
    assert chosen[0] == 0
    if len(chosen) > 1:
        assert chosen[-1] == number - 1
        gaps = np.diff(chosen)
        assert gaps.min() >= 1
        assert gaps.max() - gaps.min() <= 1


def test_few_layers_decide_for_all(monkeypatch):
    monkeypatch.setattr(prelaunch, "CHECKED_LAYERS", 2)
    model = adapted(settled_agreement=0.3)
    tiny.train(model, 14)
    assert model.phase() == "dash"
    layers = list(adapted_layers(model, "default").values())
    seen = [bool(layer.fixed("default").candidates[0] >= 0) for layer in layers]
    assert seen == [True, False, False, False, False, True]
    assert {tuple(layer.fixed("default").agreement.tolist()) for layer in layers} == {
        tuple(layers[0].fixed("default").agreement.tolist())
    }


def test_a_check_names_a_diverged_layer():
    model = adapted()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 2, optimizer=optimizer)
    optimizer.step()
    layer = adapted_layers(model, "default")["model.layers.1.self_attn.v_proj"]
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    with pytest.raises(TransitionError, match="layer 'model.layers.1.self_attn.v_proj': .*B.* holds 1 NaN"):
        advance(model, optimizer)
    assert model.phase() == "pre-launch"


def test_a_model_in_an_automatic_prelaunch_says_how_long_it_may_take(tmp_path):
    model = adapted()
    tiny.train(model, 2)
    with pytest.raises(ValueError, match="has taken 2 of its at most 12 pre-launch steps"):
        model.directions()
    with pytest.warns(PrelaunchWarning, match="counted 2 of its at most 12 .* or lower prelaunch_max"):
        model.save_pretrained(tmp_path)


def test_a_run_too_short_for_any_end_says_so(tmp_path):
    with pytest.warns(PrelaunchWarning, match="needs 4 more optimizer steps, will train for only 3"):
        trainer(tmp_path, adapted(), max_steps=3).train()


def test_evaluation_and_accumulation_change_nothing(tmp_path):
    found = []
    for changes in (
        {"per_device_train_batch_size": 8},
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 1,
        },
    ):
        run = trainer(tmp_path, adapted(settled_agreement=0.75), max_steps=14, **changes)
        run.train()
        found.append(run.model)
    assert found[0].directions().prelaunch_steps == found[1].directions().prelaunch_steps
    directions.assert_same(*map(directions.of, found))
