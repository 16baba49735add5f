"""Directions of the gradient: found by sketches, learned along and started from, without a look at a weight."""

import copy
import math

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from torch import nn

from peft_tsd import DashConfig, TsdConfig, export_lora, identify_from_gradients
from peft_tsd.errors import TransitionError
from peft_tsd.schedule.gradients import loss_of_output
from peft_tsd.schedule.sketches import gradient_triples
from peft_tsd.tuner.layer import INIT_ROW_NORM
from peft_tsd.tuner.phase import adapted_layers
from support import tiny
from support.gradients import BATCHES, batch, dense_gradients, square
from support.layers import LAYERS, One
from support.trainers import adapter_bits, losses, trainer

METHODS = ["lora-dash", "lora-init", "lora-tsd"]


def adapted(base=None, method="lora-tsd", **changes):
    settings = {"prelaunch_steps": 0, "direction_source": "gradient", "first_step": False, **changes}
    return get_peft_model(base or tiny.llama().double(), tiny.config(method, **settings))


def sine(found: torch.Tensor, true: torch.Tensor) -> float:
    """Of the largest angle between the spaces that two sets of orthonormal columns span."""
    found, true = found.double(), true.double()
    return float(torch.linalg.matrix_norm(true - found @ (found.mT @ true), 2))


@pytest.mark.parametrize("kind", LAYERS)
def test_triples_are_those_of_the_dense_gradient(kind):
    torch.manual_seed(1)
    layer, shape = LAYERS[kind]()
    base = One(layer).double()
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    model = get_peft_model(copy.deepcopy(base), tiny.config("lora-dash", target_modules=["layer"]))
    [found] = gradient_triples(
        model, adapted_layers(model, "default"), "default", inputs, square, {"layer": 4}
    ).values()
    gradient = dense_gradients(base, inputs, square)["layer"]
    u, s, v_transposed = torch.linalg.svd(gradient)
    # Small layers: the sketch has as many columns as the matrix, and is exact.
    n = min(4, int((s > 1e-9 * s[0]).sum()))
    torch.testing.assert_close(found.s[:n], s[:n], rtol=1e-8, atol=0)
    assert sine(found.u[:, :n], u[:, :n]) < 1e-6
    assert sine(found.v[:, :n], v_transposed[:n].mT) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_a_model_starts_from_them_and_its_loss_stays(method):
    base = tiny.llama().double()
    few = [batch(rows=1)]  # of nine tokens: fewer than a sketch has columns, so that it is exact
    gradients = dense_gradients(base, few)
    model = adapted(base, method)
    before = model(**BATCHES[0]).loss
    identify_from_gradients(model, few)
    assert torch.equal(model(**BATCHES[0]).loss, before)
    for name, found in model.directions().items():
        u, s, v_transposed = torch.linalg.svd(gradients[name])
        torch.testing.assert_close(found.sigma.double(), s[: len(found.sigma)], rtol=1e-4, atol=1e-9)
        if method != "lora-init":
            assert sine(found.u[:, :2], u[:, :2]) < 1e-3
            assert sine(found.v[:, :2], v_transposed[:2].mT) < 1e-3
        if method != "lora-dash":
            a = adapted_layers(model, "default")[name].lora_A["default"].weight
            torch.testing.assert_close(a.norm(dim=1), torch.full((4,), INIT_ROW_NORM).double(), rtol=1e-6, atol=0)
            assert sine(v_transposed[:4].mT, (a[:2] / INIT_ROW_NORM).mT) < 1e-3


def test_the_first_step_of_a_start_goes_down_the_gradient():
    # To first order a step of B changes W by -η s² G AᵀA: with A from the gradient it keeps most of G.
    kept = {}
    for source in ("gradient", "random"):
        model = adapted(method="lora-init")
        if source == "gradient":
            identify_from_gradients(model, BATCHES)
        gradients = dense_gradients(tiny.llama().double(), BATCHES)
        kept[source] = sum(
            float((gradients[name] @ layer.lora_A["default"].weight.double().mT).norm())
            for name, layer in adapted_layers(model, "default").items()
        )
    assert kept["gradient"] > 1.5 * kept["random"]


@pytest.mark.parametrize("method", METHODS)
def test_save_load_export_and_merge(method, tmp_path):
    model = adapted(tiny.llama(), method)
    identify_from_gradients(model, BATCHES)
    tiny.train(model, 4)
    ids = tiny.tokens(seed=9)
    trained = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "native")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native")
    assert torch.equal(loaded(ids).logits, trained)
    assert loaded.phase() == "dash"
    export_lora(model, tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    torch.testing.assert_close(plain(ids).logits, trained, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_beside_another_method():
    config = DashConfig(
        peft=LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS), prelaunch_steps=0, direction_source="gradient"
    )
    model = get_peft_model(tiny.llama(), config)
    identify_from_gradients(model, BATCHES)
    tiny.train(model, 3)
    assert all(bool(found.delta_sigma.any()) for found in model.directions().values())


def test_the_weight_is_not_looked_at(monkeypatch):
    model = adapted()
    for layer in adapted_layers(model, "default").values():
        monkeypatch.setattr(layer, "weight_matrix", lambda: pytest.fail("a weight was read"))
        monkeypatch.setattr(layer, "weight_in", lambda owner: pytest.fail("a weight was read"))
    identify_from_gradients(model, BATCHES)
    assert model.phase() == "dash"


def test_it_works_on_four_bits():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 48, quant_type="nf4", compute_dtype=torch.float32)
    layer.load_state_dict(nn.Linear(64, 48).state_dict())
    base = One(layer.to("cpu"))
    model = get_peft_model(base, tiny.config("lora-tsd", target_modules=["layer"], direction_source="gradient"))
    inputs = [torch.randn(6, 64)]
    identify_from_gradients(model, inputs, loss=square)
    [found] = model.directions().values()
    # Six tokens: G is dyᵀ x, whose row space their inputs span.
    spanned = torch.linalg.qr(inputs[0].mT.double()).Q
    assert sine(spanned, found.v) < 1e-5


def test_a_control_has_other_directions_of_the_same_norms():
    found = {}
    for selection in ("tsd", "random"):
        model = adapted(selection=selection)
        identify_from_gradients(model, BATCHES)
        found[selection] = model.directions()
    for name, one in found["random"].items():
        torch.testing.assert_close(one.v.mT @ one.v, torch.eye(one.v.shape[1]).to(one.v), rtol=0, atol=1e-5)
        assert sine(found["tsd"][name].v, one.v) > 0.3


def test_the_same_directions_each_time_and_for_half_of_the_batches_each(tmp_path):
    bits = []
    for number in range(2):
        model = adapted(tiny.llama())
        identify_from_gradients(model, BATCHES)
        bits.append(adapter_bits(model, tmp_path / str(number)))
    assert all(torch.equal(bits[0][key], bits[1][key]) for key in bits[0])


@pytest.mark.parametrize("prelaunch_steps", [0, 3])
def test_a_trainer_finds_them_by_itself(tmp_path, prelaunch_steps):
    model = adapted(tiny.llama(), prelaunch_steps=prelaunch_steps)
    training = trainer(tmp_path, model, max_steps=12)
    training.train()
    assert model.directions().prelaunch_steps == prelaunch_steps
    assert losses(training)[-1] < losses(training)[0]
    [callback] = [one for one in training.callback_handler.callbacks if hasattr(one, "transitions")]
    assert [made["step"] for made in callback.transitions] == [prelaunch_steps]


def test_a_loop_of_ones_own_is_told_to_identify():
    model = adapted(tiny.llama(), prelaunch_steps=2)
    with pytest.raises(ValueError, match=r"prelaunch_steps=2 and no directions: call identify_from_gradients"):
        tiny.train(model, 4)
    identify_from_gradients(model, [batch()])
    tiny.train(model, 1)
    assert model.directions().prelaunch_steps == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"direction_source": "gradients"}, "direction_source.*'gradients'.*'gradient'"),
        ({"selection": "top"}, "selection='top' cannot be combined with direction_source='gradient'"),
        ({"dash_unit": "sigma"}, "dash_unit='sigma' cannot be combined"),
        ({"direction_budget": "global"}, "direction_budget='global' cannot be combined"),
        ({"prelaunch_steps": "auto"}, "prelaunch_steps='auto' waits for change rates"),
    ],
)
def test_what_goes_by_the_weight_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TsdConfig(**{"direction_source": "gradient", **changes})


def test_a_layer_that_no_gradient_reaches_is_left_out():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.used(x)

    model = get_peft_model(Two(), tiny.config(target_modules=["used", "unused"], direction_source="gradient"))
    with pytest.raises(ValueError, match="No gradient but zero reached 'used' or any of 2 layers"):
        identify_from_gradients(model, [torch.randn(4, 8)], loss=lambda model, x: square(model, x) * 0)
    assert model.phase() == "pre-launch"
    identify_from_gradients(model, [torch.randn(4, 8)], loss=square)
    assert model.phase() == "dash"
    assert [len(found.indices) > 0 for found in model.directions().values()] == [True, False]


def test_a_gradient_that_is_not_finite_is_refused_with_its_layer_and_nothing_is_changed():
    model = get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=0, direction_source="gradient"))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def endless(model, batch):
        return loss_of_output(model, batch) * math.inf

    with pytest.raises(TransitionError, match=r"layer '.*q_proj'.*NaN or Inf.*still in pre-launch"):
        identify_from_gradients(model, [batch(0)], loss=endless)
    assert model.phase() == "pre-launch"
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    identify_from_gradients(model, [batch(0)])
    assert model.phase() == "dash"
