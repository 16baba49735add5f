"""On quantized base weights: starts, budgets, units, when directions are identified, and how models are prepared."""

import copy
import pickle

import pytest
import torch
from peft import EvaConfig, initialize_lora_eva_weights, prepare_model_for_kbit_training

from peft_tsd import identify_from_gradients
from peft_tsd.models.packed import is_quantized
from support import directions, tiny
from support.quantized_models import TARGETS, adapted, dequantized_twin, layers_of, loaded, logits, quantized, whole

pytestmark = pytest.mark.filterwarnings("ignore:(Unm|M)erge lora module")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    whole().save_pretrained(path)
    return path


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
@pytest.mark.parametrize("kind", ["bnb-nf4", "hqq-4bit"])
def test_starts_taken_from_the_dequantized_weight(kind, init, folder):
    base = quantized(kind, folder)
    twin = adapted(dequantized_twin(base), "lora-dash", init_lora_weights=init)
    model = adapted(base, "lora-dash", init_lora_weights=init)
    if init != "orthogonal":  # the one start that changes the function
        with model.disable_adapter():
            before = logits(model)
        torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    for layer, other in zip(layers_of(model).values(), layers_of(twin).values()):
        assert is_quantized(layer.get_base_layer())
        assert layer.lora_A["default"].weight.dtype == torch.float32
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        torch.testing.assert_close(product, other.lora_B["default"].weight @ other.lora_A["default"].weight)
        assert layer.lora_A["default"].weight.norm() > 0.1
    tiny.train(model, 4)
    assert model.phase() == "dash"


def test_a_start_from_activations(folder):
    data = [{"input_ids": tiny.tokens(8, 9, seed=seed)} for seed in range(3)]
    config = EvaConfig(rho=1.0)
    model = adapted(quantized("bnb-nf4", folder), "lora-dash", init_lora_weights="eva", eva_config=config)
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in layers_of(model).items()}
    initialize_lora_eva_weights(model, data)
    for name, layer in layers_of(model).items():
        assert not torch.equal(layer.lora_A["default"].weight, before[name])
    tiny.train(model, 4)
    assert model.phase() == "dash"


def test_starts_for_full_weights_are_refused(folder):
    base = quantized("bnb-nf4", folder)
    with pytest.raises(ValueError, match=r"q_proj is quantized \(Linear4bit\), and init_lora_weights='corda'"):
        adapted(base, "lora-dash", init_lora_weights="corda")


@pytest.mark.parametrize("kind", ["bnb-nf4", "hqq-4bit", "aqlm"])
def test_directions_from_gradients(kind, folder):
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base), prelaunch_steps=0), adapted(base, prelaunch_steps=0)
    for one in (model, twin):
        identify_from_gradients(one, [{"input_ids": tiny.tokens(), "labels": tiny.tokens()}])
    directions.assert_same(directions.of(model), directions.of(twin))


@pytest.mark.parametrize("kind", ["bnb-nf4", "hqq-4bit"])
def test_an_automatic_prelaunch(kind, folder):
    settings = {"prelaunch_steps": "auto", "prelaunch_min": 3, "prelaunch_max": 6, "settled_agreement": 0.6}
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base), **settings), adapted(base, **settings)
    for one in (model, twin):
        tiny.train(one, 7)
    assert model.directions().prelaunch_steps == twin.directions().prelaunch_steps
    directions.assert_same(directions.of(model), directions.of(twin), rtol=1e-2)


@pytest.mark.parametrize("settings", [{"direction_budget": "global"}, {"dash_unit": "layer"}, {"dash_unit": "sigma"}])
def test_budgets_and_units(settings, folder):
    base = quantized("bnb-nf4", folder)
    twin, model = adapted(dequantized_twin(base), **settings), adapted(base, **settings)
    for one in (model, twin):
        tiny.train(one, 6)
    for layer, other in zip(layers_of(model).values(), layers_of(twin).values()):
        fixed, expected = layer.fixed("default"), other.fixed("default")
        places = [expected.indices.tolist().index(i) for i in fixed.indices.tolist()]  # those nearly tied may differ
        torch.testing.assert_close(fixed.u.abs(), expected.u.abs()[:, places], rtol=1e-3, atol=1e-4)
        assert (fixed.unit is None) == ("dash_unit" not in settings)
        if fixed.unit is not None:
            torch.testing.assert_close(fixed.unit, expected.unit[places])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_as_models_are_prepared_for_it(dtype, bits, folder):
    from transformers import BitsAndBytesConfig

    base = loaded(folder, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}), dtype)
    model = adapted(prepare_model_for_kbit_training(base))
    assert model.base_model.model.is_gradient_checkpointing
    before = tiny.language_loss(model, 0).item()
    tiny.train(model.train(), 8)
    assert model.phase() == "dash"
    assert tiny.language_loss(model, 0).item() < before - 0.005
    assert all(layer.lora_A["default"].weight.dtype == torch.float32 for layer in layers_of(model).values())
    assert logits(model).isfinite().all()


def test_checkpointing_changes_nothing(folder):
    found = []
    for checkpointing in (False, True):
        base = quantized("bnb-nf4", folder)
        model = adapted(prepare_model_for_kbit_training(base, use_gradient_checkpointing=checkpointing))
        found.append((tiny.train(model.train(), 6), logits(model)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_rows_with_adapters_of_their_own(folder):
    model = adapted(quantized("hqq-4bit", folder))
    tiny.train(model, 6)
    model.eval()
    model.add_adapter("other", tiny.config(target_modules=TARGETS))
    with torch.no_grad():
        mixed = model(tiny.tokens(), adapter_names=["default", "__base__"]).logits
    torch.testing.assert_close(mixed[0], logits(model)[0])
    with model.disable_adapter():
        torch.testing.assert_close(mixed[1], logits(model)[1])


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-8bit", "gptq", "torchao-int8"])
def test_copies(kind, folder):
    model = adapted(quantized(kind, folder))
    tiny.train(model, 6)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    if kind == "bnb-nf4":
        layer = next(iter(layers_of(model).values()))
        again = pickle.loads(pickle.dumps(layer))
        assert type(again) is type(layer)
        assert torch.equal(again.weight_matrix(), layer.weight_matrix())
