"""Directions from gradients, against autograd with the base weights made trainable, in dense float64."""

import copy
import itertools
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from peft_tsd import DashConfig, PrelaunchWarning, TransitionError, TsdCallback, advance, identify_from_gradients
from peft_tsd.schedule.gradients import loss_of_output, weight_gradients
from peft_tsd.tuner.phase import adapted_layers
from support import directions, reference, tiny
from support.gradients import BATCHES, batch, dense_gradients, square
from support.layers import LAYERS, One
from support.trainers import Tokens, chosen, losses, trainer


def adapted(base=None, **changes):
    return get_peft_model(base or tiny.llama().double(), tiny.config(prelaunch_steps=0, **changes))


def assert_highest(found, weight, gradient, num: int) -> None:
    rates = reference.change_rates(weight, gradient)
    directions.assert_highest(directions.Found(found.indices.tolist(), found.rates.tolist()), rates, num)


@given(st.sampled_from(list(LAYERS)), st.integers(0, 1000))
def test_the_gradient_of_one_layer_is_that_of_autograd(kind, seed):
    torch.manual_seed(seed)
    layer, shape = LAYERS[kind]()
    base = One(layer).double()
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    model = get_peft_model(copy.deepcopy(base), tiny.config("lora-dash", target_modules=["layer"]))
    layers = adapted_layers(model, "default")
    [found] = weight_gradients(model, layers, inputs, square, 1e9)
    torch.testing.assert_close(found["layer"], dense_gradients(base, inputs, square)["layer"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("memory_gib", [1.0, 1e-9], ids=["one pass", "a pass for each layer"])
def test_the_directions_are_those_of_the_dense_gradient(method, memory_gib):
    base = tiny.llama().double()
    gradients = dense_gradients(base, BATCHES)
    model = adapted(base, **method)
    passes = []
    model.register_forward_hook(lambda *args: passes.append(1))
    identify_from_gradients(model, BATCHES, memory_gib=memory_gib)
    assert len(passes) == (3 if memory_gib == 1.0 else 3 * 6)
    assert model.phase() == "dash"
    found = model.directions()
    assert found.prelaunch_steps == 0
    for name, layer in adapted_layers(model, "default").items():
        assert_highest(
            found[name], layer.weight_matrix(), gradients[name], 4 if method["method"] == "lora-init" else 5
        )
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    assert tiny.train(model, 1)  # it learns along its directions from the first step on
    for name, p in model.named_parameters():
        if "lora_dash" in name:
            assert not torch.equal(p, before[name])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, training):
    base = tiny.llama().double()
    gradients = dense_gradients(base, BATCHES)
    model = adapted(base)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train(training)
    calls = []
    layer = adapted_layers(model, "default")["model.layers.0.self_attn.q_proj"]
    layer.base_layer.register_forward_hook(lambda *args: calls.append(1))
    identify_from_gradients(model, BATCHES)
    assert len(calls) == 2 * len(BATCHES)  # forward, and again in the backward pass
    for name, one in adapted_layers(model, "default").items():
        assert_highest(model.directions()[name], one.weight_matrix(), gradients[name], 5)


def test_checkpointing_that_no_gradient_gets_through_is_refused():
    model = adapted()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.base_model.model.disable_input_require_grads()
    model.train()
    with pytest.raises(ValueError, match="No gradient but zero reached 'model.layers.0.*enable_input_require_grads"):
        identify_from_gradients(model, BATCHES)
    assert model.phase() == "pre-launch"


def test_nothing_is_left_behind():
    base = tiny.bert().train()
    model = adapted(base, target_modules=["query", "dense"], lora_dropout=0.3, modules_to_save=["classifier"])
    model.base_model.model.bert.encoder.layer[0].eval()
    parameters = {name: (p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    weight = next(p for p in model.parameters() if p.requires_grad)
    weight.grad = torch.ones_like(weight)  # of a step being accumulated
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # noqa: NPY002
    hooks = sum(len(module._forward_hooks) for module in model.modules())

    def loss(model, one):
        random.random()
        np.random.rand()  # noqa: NPY002
        return loss_of_output(model, one) + 0 * torch.rand(())

    labels = torch.tensor([0, 1, 2, 0])
    identify_from_gradients(model, [{"input_ids": tiny.tokens(4), "labels": labels}], loss=loss)
    assert model.phase() == "dash"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert np.array_equal(states[2], np.random.get_state()[1])  # noqa: NPY002
    assert sum(len(module._forward_hooks) for module in model.modules()) == hooks
    for name, p in model.named_parameters():
        required, value = parameters[name]
        assert p.requires_grad == required
        if p is not weight:
            assert p.grad is None, name
        if "lora_" not in name:
            assert torch.equal(p, value), name
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_batch_norm_and_dropout_do_not_notice():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5))
    model = adapted(net, target_modules=["0"], num_directions=2)
    model.train()
    x = torch.randn(5, 6)
    identify_from_gradients(model, [x], loss=square)
    assert model.base_model.model[1].num_batches_tracked == 0
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5)).eval()
    net[0].load_state_dict(model.base_model.model[0].base_layer.state_dict())
    layer = adapted_layers(model, "default")["0"]
    assert_highest(model.directions()["0"], layer.weight_matrix(), dense_gradients(net, [x.double()], square)["0"], 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    model = adapted(tiny.llama().to(dtype))
    layers = adapted_layers(model, "default")
    [found] = weight_gradients(model, layers, BATCHES, loss_of_output, 1e9)
    expected = dense_gradients(tiny.llama(), BATCHES)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(gradient.flatten(), expected[name].float().flatten(), 0) > 0.98


def test_the_optimizer_forgets_what_restarts():
    model = get_peft_model(tiny.llama(), tiny.config("lora-init", prelaunch_steps=100))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 2, optimizer=optimizer)
    with pytest.raises(TransitionError, match="does not hold 12 of the 12 A and B"):
        identify_from_gradients(model, BATCHES, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    identify_from_gradients(model, BATCHES, optimizer)
    assert model.directions().prelaunch_steps == 2
    assert not optimizer.state


def test_a_global_budget():
    model = adapted(direction_budget="global", num_directions=3)
    identify_from_gradients(model, BATCHES)
    assert sum(len(one.delta_sigma) for one in model.directions().values()) == 18


# In a Trainer


def test_a_trainer_takes_its_own_first_batches_and_trains_as_without(tmp_path):
    """The same losses as with those batches handed over, so that data, order and dropout are what they would be."""
    seen = []

    def loss(model, one):
        seen.append(one)
        return loss_of_output(model, one)

    def model():
        return adapted(tiny.llama(), lora_dropout=0.1)

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            assert not run.accelerator.gradient_state.in_dataloader

    own = TsdCallback(batches=3, loss=loss)
    run = trainer(tmp_path / "a", model(), [own, Watch()], save_strategy="steps", save_steps=4, num_train_epochs=1)
    run.train()
    assert len(seen) == 3
    assert [(made["step"], made["layers"]) for made in own.transitions] == [(0, 6)]
    rows = {tuple(row.tolist()) for one in seen for row in one["input_ids"]}
    assert len(rows) == 24
    assert rows <= {tuple(Tokens()[i]["input_ids"].tolist()) for i in range(64)}
    given = trainer(tmp_path / "b", model(), [TsdCallback(batches=[dict(one) for one in seen])])
    given.train()
    assert losses(given) == losses(run)
    assert chosen(given.model) == chosen(run.model)

    again = trainer(tmp_path / "a", model(), [resumed := TsdCallback()])
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert resumed.transitions == []
    assert losses(again) == losses(run)


class Noting:
    """A collator that notes the first row of each batch."""

    def __init__(self, collate, order: list[list[int]]) -> None:
        self.collate = collate
        self.order = order

    def __call__(self, rows):
        self.order.append(rows[0]["input_ids"].tolist())
        return self.collate(rows)


def test_more_batches_than_there_are(tmp_path):
    """All of them; the first epoch is still the first."""
    orders = []
    for batches in (100, [batch()]):
        run = trainer(tmp_path, adapted(tiny.llama()), [TsdCallback(batches=batches, loss=lambda m, b: m(**b).loss)])
        order: list[list[int]] = []
        run.data_collator = Noting(run.data_collator, order)
        run.train()
        orders.append(order[-8:])
    assert orders[0] == orders[1]


def test_it_is_saved_and_loaded(tmp_path):
    model = adapted()
    identify_from_gradients(model, BATCHES)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama().double(), tmp_path)
    assert str(loaded.directions()) == str(model.directions())
    assert loaded.directions().prelaunch_steps == 0


# What can go wrong


def test_steps_without_directions_are_refused(tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"prelaunch_steps=0 and no directions: call identify_from_gradients"):
        advance(model, torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.warns(PrelaunchWarning, match="takes them from gradients: pass callbacks"):
        model.save_pretrained(tmp_path)


def test_bad_arguments_are_named():
    model = adapted()
    with pytest.raises(ValueError, match="batches is empty"):
        identify_from_gradients(model, [])
    with pytest.raises(ValueError, match="memory_gib must be a positive number of GiB; got 0"):
        identify_from_gradients(model, BATCHES, memory_gib=0)
    with pytest.raises(ValueError, match="no TSD layer with an adapter 'other'"):
        identify_from_gradients(model, BATCHES, adapter_name="other")
    with pytest.raises(ValueError, match=r"returns no loss for a batch of \['input_ids'\], .*: give it labels"):
        identify_from_gradients(model, [{"input_ids": tiny.tokens()}])
    with pytest.raises(ValueError, match=r"loss of a batch must be a scalar; got shape \(4, 9, 64\)"):
        identify_from_gradients(model, BATCHES, loss=lambda m, b: m(**b).logits)
    for batches in (0, True):
        with pytest.raises(ValueError, match=f"batches must be a positive number of batches.*got {batches}"):
            TsdCallback(batches=batches)
    assert model.phase() == "pre-launch"
    identify_from_gradients(model, BATCHES)
    with pytest.raises(ValueError, match="adapter 'default' have been identified before"):
        identify_from_gradients(model, BATCHES)


def test_a_gradient_that_is_not_finite_names_its_layer():
    model = adapted()
    with pytest.raises(TransitionError, match="layer 'model.layers.*Nothing was changed"):
        identify_from_gradients(model, BATCHES, loss=lambda m, b: m(**b).loss * float("nan"))
    assert model.phase() == "pre-launch"


def test_the_memory_is_that_of_a_training_step_and_of_one_group():
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=512, num_hidden_layers=6, num_attention_heads=4)
    )
    model = adapted(base).train()
    layers = adapted_layers(model, "default")
    whole = sum(layer.weight_matrix().numel() * 4 for layer in layers.values())
    one = {**batch(), "input_ids": (ids := torch.randint(0, 256, (4, 64))), "labels": ids}

    def sums(memory: float) -> None:
        for group in weight_gradients(model, layers, [one, one], loss_of_output, memory):
            group.clear()

    step = peak_bytes(lambda: loss_of_output(model, one).backward())
    assert peak_bytes(lambda: sums(1e9)) <= step + 1.1 * whole
    assert peak_bytes(lambda: sums(whole / 6)) <= step + 1.1 * whole / 6


def peak_bytes(work) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


# Beside another method of PEFT's


@pytest.mark.parametrize("settings", [{"prelaunch_steps": 0}, {"prelaunch_steps": "auto"}], ids=str)
def test_directions_beside_another_method(settings):
    base = tiny.llama().double()
    gradients = dense_gradients(base, BATCHES)
    method = LoHaConfig(r=2, target_modules=["q_proj", "down_proj"])
    model = get_peft_model(
        base,
        DashConfig(
            peft=method,
            num_directions=3,
            direction_budget="global",
            prelaunch_min=3,
            prelaunch_max=5,
            **settings,
        ),
    )
    layers = adapted_layers(model, "default")
    if settings["prelaunch_steps"] == 0:
        identify_from_gradients(model, BATCHES)
        for name, found in model.directions().items():
            assert_highest(found, layers[name].weight_matrix(), gradients[name], len(found.indices))
    tiny.train(model, 5, lr=1e-3)
    assert model.directions().prelaunch_steps in ((0,) if settings["prelaunch_steps"] == 0 else (3, 4, 5))
    assert sum(len(one.delta_sigma) for one in model.directions().values()) == 3 * len(layers)
