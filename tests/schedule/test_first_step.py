"""The first step down the gradient: where it goes, how long it is, and that it never makes the loss worse."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, get_peft_model

from peft_tsd import DashConfig, TsdConfig, export_lora, identify_from_gradients
from peft_tsd.schedule.callback import warms_up
from peft_tsd.schedule.first_step import FIRST_TRIED, MOST_TRIED, WORTH_HALVING, best_length
from peft_tsd.tuner.phase import adapted_layers
from support import tiny
from support.gradients import batch, dense_gradients
from support.trainers import losses, trainer

METHODS = ["lora-dash", "lora-init", "lora-tsd"]
# Of nine tokens each: fewer than a sketch has columns, so that it is exact.
PAIR = [batch(0, rows=1), batch(1, rows=1)]


def begun(method="lora-tsd", batches=PAIR, dtype=torch.float64, **changes):
    settings = {"prelaunch_steps": 0, "direction_source": "gradient", **changes}
    model = get_peft_model(tiny.llama().to(dtype), tiny.config(method, **settings)).to(dtype)
    identify_from_gradients(model, batches)
    return model


def loss_on(model, batches) -> float:
    with torch.no_grad():
        return float(sum(model.eval()(**one).loss for one in batches) / len(batches))


@pytest.mark.parametrize("method", METHODS)
def test_it_goes_down_the_leading_directions_by_one_length(method):
    model = begun(method, [PAIR[0], PAIR[0]], num_directions=2, r=2)
    gradients = dense_gradients(tiny.llama(), PAIR[:1])
    lengths = []
    for name, layer in adapted_layers(model, "default").items():
        change = layer.get_delta_weight("default").detach().double()
        u, _, v_transposed = torch.linalg.svd(gradients[name])
        lengths.append(float(torch.linalg.matrix_norm(change, 2)))
        torch.testing.assert_close(change, -lengths[-1] * u[:, :2] @ v_transposed[:2], rtol=0, atol=1e-4 * lengths[-1])
    assert min(lengths) > 0
    assert max(lengths) / min(lengths) < 1 + 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_falls(method):
    # Of random tokens one batch teaches nothing about another.
    one = PAIR[:1]
    assert loss_on(begun(method, batches=one), one) < loss_on(tiny.llama().double(), one) - 0.01


@pytest.mark.parametrize("changes", [{"selection": "random"}, {"lora_dropout": 0.5}, {"dash_lr_ratio": 30.0}])
def test_it_never_makes_the_loss_worse(changes):
    before = loss_on(tiny.llama().double(), PAIR[1:])
    assert loss_on(begun(**changes), PAIR[1:]) <= before


def test_beside_another_method():
    config = DashConfig(
        peft=LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS), prelaunch_steps=0, direction_source="gradient"
    )
    model = get_peft_model(tiny.llama(), config)
    identify_from_gradients(model, PAIR[:1])
    assert all(bool((found.delta_sigma < 0).all()) for found in model.directions().values())
    assert loss_on(model, PAIR[:1]) < loss_on(tiny.llama(), PAIR[:1])


@pytest.mark.parametrize("method", METHODS)
def test_without_it_the_model_begins_where_it_was(method):
    assert loss_on(begun(method, first_step=False), PAIR) == loss_on(tiny.llama().double(), PAIR)


def test_it_is_in_the_export(tmp_path):
    model = begun(batches=PAIR[:1], dtype=torch.float32)
    export_lora(model, tmp_path / "lora")
    plain = tiny.llama()
    plain.load_adapter(str(tmp_path / "lora"))
    ids = tiny.tokens(seed=9)
    torch.testing.assert_close(plain(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_trainer_takes_it(tmp_path):
    first = {}
    for step in (True, False):
        model = get_peft_model(
            tiny.llama(), tiny.config(prelaunch_steps=0, direction_source="gradient", first_step=step)
        )
        training = trainer(tmp_path / str(step), model, gradient_accumulation_steps=2, max_steps=2)
        training.train()
        first[step] = losses(training)[0]
        [callback] = [one for one in training.callback_handler.callbacks if hasattr(one, "transitions")]
        assert callback.transitions[0]["step"] == 0
    assert first[True] < first[False] - 0.01


@pytest.mark.parametrize(
    ("changes", "schedule", "is_said"),
    [
        ({}, {}, True),
        ({}, {"warmup_steps": 2}, False),
        ({}, {"warmup_steps": 2, "lr_scheduler_type": "constant"}, True),
        ({"first_step": False}, {}, False),
        ({"prelaunch_steps": 1}, {}, False),
    ],
    ids=str,
)
def test_a_trainer_without_warm_up_is_told_what_it_costs(tmp_path, caplog, changes, schedule, is_said):
    settings = {"prelaunch_steps": 0, "direction_source": "gradient", **changes}
    trainer(tmp_path, get_peft_model(tiny.llama(), tiny.config(**settings)), max_steps=2, **schedule).train()
    told = [record.getMessage() for record in caplog.records if "warmup_steps=5" in record.getMessage()]
    assert len(told) == is_said
    assert all("adapter 'default'" in one for one in told)


def test_a_schedule_that_does_not_say_how_high_it_rises_is_told_by_the_rate_of_the_training():
    """DeepSpeed's own, which leaves no `initial_lr`; and where there is no optimizer to ask, nothing is said."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1e-6)
    assert warms_up(optimizer, 1e-3)
    optimizer.param_groups[0]["lr"] = 1e-3
    assert not warms_up(optimizer, 1e-3)
    assert warms_up(None, 1e-3)


@given(st.floats(-8, 8), st.floats(-4, 4), st.floats(-2, 2))
def test_on_a_parabola_the_length_is_within_a_factor_of_two(log_best, log_depth, log_slope):
    best, depth = 10**log_best, 10**log_depth
    tried = []

    def loss_at(length):
        tried.append(length)
        return 1.5 * depth + depth * (length / best - 1) ** 2

    # The slope that is known is that of the loss, or one of its order.
    length, before, after = best_length(loss_at, 2 * depth / best * 10 ** (log_slope / 8))
    assert best / 2 < length < 2 * best
    assert after < before
    assert len(tried) <= 9


@given(st.integers(0, 6))
def test_it_is_the_best_of_all_doublings(k):
    """The best may be as much longer than the first tried as there are tries."""
    best = FIRST_TRIED * 2.0**k
    tried = []

    def loss_at(length):
        tried.append(length)
        return 1.0 + (abs(math.log2(length / best)) if length else 9)

    # The loss at zero is 10.
    assert best_length(loss_at, 10.0)[0] == best
    assert len(tried) == len(set(tried)) == k + 3 <= 1 + MOST_TRIED


@given(st.floats(-5, 5), st.floats(1, 4), st.floats(-6, 6))
def test_on_a_convex_curve_what_shorter_lengths_could_add_is_a_fifth_of_the_gain_at_most(log2_best, power, log2_depth):
    best, depth = FIRST_TRIED * 2.0**log2_best, 2.0**log2_depth
    tried = []

    def loss_at(length):
        tried.append(length)
        return depth * (1 + abs(length / best - 1) ** power)

    length, before, after = best_length(loss_at, loss_at(0.0))
    others = [loss_at(length * 2.0**k) for k in range(-8, 9)]
    assert after - min(others) <= WORTH_HALVING * (before - after) * (1 + 1e-9)
    assert len(tried) - 1 - len(others) <= 1 + MOST_TRIED


def test_shorter_lengths_are_not_tried_where_doubling_costs_little():
    tried = []

    def loss_at(length):
        tried.append(length)
        return {0.0: 8.0, 0.5: 1.0, 1.0: 2.0, 2.0: 3.0}[length]

    assert best_length(loss_at, 8.0) == (1.0, 8.0, 2.0)
    assert tried == [0.0, 1.0, 2.0]
    tried.clear()
    curve = {0.0: 8.0, 0.25: 5.0, 0.5: 1.0, 1.0: 2.0, 2.0: math.nan}
    assert best_length(curve.__getitem__, 8.0) == (0.5, 8.0, 1.0)


def test_where_no_length_is_better_none_is_taken():
    assert best_length(lambda length: 1 + length, 1.0) == (0.0, 1.0, 1.0)
    assert best_length(lambda length: 1.0 if length == 0 else math.nan, 1.0) == (0.0, 1.0, 1.0)
    assert best_length(lambda length: 0.0, 1.0) == (0.0, 0.0, 0.0)


def test_what_is_no_switch_is_refused():
    with pytest.raises(ValueError, match="first_step must be True or False; got 'yes'"):
        TsdConfig(first_step="yes")
