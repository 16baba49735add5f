"""Quantized base weights: the same directions and the same function as on the de-quantized model, in every kind."""

import copy
import importlib.util
import pickle
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import (
    EvaConfig,
    LoHaConfig,
    PeftModel,
    get_peft_model,
    initialize_lora_eva_weights,
    prepare_model_for_kbit_training,
)
from safetensors.torch import load_file
from torch import nn

from peft_tsd import DashConfig, TransitionError, export_lora, identify_from_gradients
from peft_tsd.errors import InputError
from peft_tsd.explore.recorder import frozen_weight
from peft_tsd.language import training
from peft_tsd.language.evaluating import evaluate
from peft_tsd.language.recipe import load_recipe
from peft_tsd.models.packed import from_outputs, is_quantized, keep_as_stored
from peft_tsd.runs.folder import RunFolder
from peft_tsd.tuner.quantized import QuantizedLayer
from support import reference, text_models, tiny
from support.quantized_models import (
    EXACT,
    KINDS,
    MERGEABLE,
    TARGETS,
    dequantized_twin,
    library_weight,
    loaded,
    need,
    quantized,
    whole,
)

pytestmark = pytest.mark.filterwarnings("ignore:(Unm|M)erge lora module")


ROUNDING = {
    **dict.fromkeys(["bnb-nf4", "bnb-fp4", "hqq-4bit"], 0.2),
    "torchao-fp8": 0.04,
    **dict.fromkeys(["bnb-8bit", "torchao-int8", "hqq-8bit"], 0.01),
}
"""How far quantizing moves a weight, relative to its norm."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    whole().save_pretrained(path)
    return path


def adapted(model, method="lora-tsd", **changes):
    torch.manual_seed(3)
    return get_peft_model(model, tiny.config(method, **{"target_modules": TARGETS, **changes}))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_directions")}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(tiny.tokens()).logits


def stored(model):
    """All that is stored of the base weights, bit for bit: of tensors in tensors, the innermost."""

    def inner(tensor):
        if hasattr(tensor, "__tensor_flatten__"):
            return [part for name in tensor.__tensor_flatten__()[0] for part in inner(getattr(tensor, name))]
        return [tensor.detach().contiguous().view(-1).view(torch.uint8).clone()]

    bits = {}
    for name, layer in layers_of(model).items():
        for key, tensor in layer.get_base_layer().state_dict().items():
            if isinstance(tensor, torch.Tensor):
                bits |= {(name, key, i): part for i, part in enumerate(inner(tensor))}
    assert len(bits) >= 2 * len(layers_of(model))  # more than a bias each
    return bits


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("kind", KINDS)
def test_the_directions_are_those_of_the_dequantized_weight(kind, folder):
    base = quantized(kind, folder)
    twin = adapted(dequantized_twin(base), prelaunch_steps=50)
    model = adapted(base, prelaunch_steps=50)
    others = layers_of(twin)
    for name, layer in layers_of(model).items():
        assert isinstance(layer, QuantizedLayer)
        # Drawn alike; PEFT rounds it to float16 on layers that compute in that.
        off = layer.lora_A["default"].weight - others[name].lora_A["default"].weight
        assert off.abs().max() <= (1e-4 if kind in ("gptq", "awq") else 0)
    tiny.train(model, 3)
    logits(model)  # an evaluation on the way must not change what is found
    for name, layer in layers_of(model).items():
        weight = library_weight(layer.get_base_layer())
        assert torch.equal(layer.weight_matrix(), weight)
        other = others[name]
        other.load_state_dict({k: v for k, v in layer.state_dict().items() if k.startswith("lora_")}, strict=False)
        found, expected = layer.identify("default").chosen, other.identify("default").chosen
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.rates, expected.rates)
        change = reference.effective_change(layer)
        assert change.abs().max() > 1e-3
        rates = reference.change_rates(weight.float(), change)
        torch.testing.assert_close(found.rates.double(), torch.from_numpy(rates)[found.indices], rtol=1e-4, atol=0)
        assert set(found.indices[:5].tolist()) == set((-rates).argsort()[:5].tolist())


@pytest.mark.parametrize("kind", EXACT)
def test_training_over_the_transition_is_that_of_the_dequantized_model(kind, folder):
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base)), adapted(base)
    losses, expected = tiny.train(model, 6), tiny.train(twin, 6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    for name, found in model.directions().items():
        assert torch.equal(found.indices, twin.directions()[name].indices)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["bnb-8bit", "gptq", "awq"])
def test_training_where_activations_are_rounded_too(kind, folder):
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base)), adapted(base)
    losses, expected = tiny.train(model, 6), tiny.train(twin, 6)
    assert model.phase() == "dash"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_not_written_to_and_is_there_without_the_adapter(kind, folder):
    base = quantized(kind, folder)
    model = adapted(base)
    with model.disable_adapter():
        before = logits(model)
    bits = stored(model)
    tiny.train(model, 2)
    logits(model)
    tiny.train(model.train(), 3)
    assert model.phase() == "dash"
    assert same_bits(bits, stored(model))
    assert not torch.allclose(logits(model), before, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("kind", ["bnb-nf4", "bnb-fp4"])
def test_gradients_pass_a_4_bit_base_that_was_evaluated(kind, folder):
    base = quantized(kind, folder)
    expected = logits(base)  # on some CPUs the weights are laid out anew here
    model = adapted(base)
    weights = {name: layer.weight_matrix() for name, layer in layers_of(model).items()}
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)
    logits(model)
    tiny.language_loss(model.train(), 0).backward()
    for name, layer in layers_of(model).items():
        assert layer.lora_B["default"].weight.grad.abs().max() > 0
        assert torch.equal(layer.weight_matrix(), weights[name])


@pytest.mark.parametrize("kind", MERGEABLE)
def test_a_merge_holds_the_whole_change_of_every_adapter(kind, folder):
    model = adapted(quantized(kind, folder))
    tiny.train(model, 6)
    model.add_adapter("other", tiny.config("lora-dash", target_modules=TARGETS))
    model.set_adapter("other")
    tiny.train(model, 6)
    model.base_model.set_adapter(["default", "other"])
    layers = layers_of(model)
    before = {name: layer.weight_matrix().clone() for name, layer in layers.items()}
    for layer in layers.values():  # far beyond what rounding could hide
        for adapter in ("default", "other"):
            layer.lora_B[adapter].weight.data *= 5
    expected = logits(model)
    model.merge_adapter(["default", "other"])
    for name, layer in layers.items():
        change = sum(reference.effective_change(layer, adapter) for adapter in ("default", "other"))
        aim = before[name].double() + change
        assert (layer.weight_matrix() - aim).norm() < ROUNDING[kind] * aim.norm()
        assert change.norm() > 2 * ROUNDING[kind] * aim.norm()
        assert layer.get_base_layer().bias is not None
    assert (logits(model) - expected).norm() < 3 * ROUNDING[kind] * expected.norm()
    model.unmerge_adapter()
    for name, layer in layers.items():
        aim = before[name].norm() + ROUNDING[kind] * (layer.get_delta_weight("default")).norm()
        assert (layer.weight_matrix() - before[name]).norm() < 4 * ROUNDING[kind] * aim


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MERGEABLE])
def test_merges_that_peft_cannot_make_are_refused(kind, folder):
    model = adapted(quantized(kind, folder))
    tiny.train(model, 4)
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"^PEFT cannot merge into weights of this kind .*export_lora"):
            merge()
    assert torch.equal(logits(model), expected)


def test_a_bias_of_lora_is_trained_but_not_merged(folder):
    model = adapted(quantized("bnb-nf4", folder), lora_bias=True)
    tiny.train(model, 6)
    assert all(layer.lora_B["default"].bias.abs().max() > 0 for layer in layers_of(model).values())
    with pytest.raises(ValueError, match=r"lora_bias into a quantized layer without .*export_lora"):
        model.merge_adapter()


@pytest.mark.parametrize("kind", ["torchao-int8", "hqq-4bit"])
def test_what_peft_refuses_of_a_kind_is_refused_with_the_layers_name(kind, folder):
    base = quantized(kind, folder)
    with pytest.raises(ValueError, match=r"^model\S+q_proj cannot carry a lora-tsd adapter\. PEFT says: .*lora_bias"):
        adapted(base, lora_bias=True)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_load_onto_both_bases_and_exports_too(kind, folder, tmp_path):
    base = quantized(kind, folder)
    twin = dequantized_twin(base)
    model = adapted(base)
    tiny.train(model, 6)
    expected = logits(model)
    model.save_pretrained(tmp_path / "native")
    export_lora(model, tmp_path / "lora")
    again = PeftModel.from_pretrained(quantized(kind, folder), tmp_path / "native")
    assert all(isinstance(layer, QuantizedLayer) for layer in layers_of(again).values())
    assert torch.equal(logits(again), expected)
    plain = PeftModel.from_pretrained(quantized(kind, folder), tmp_path / "lora")
    keep_as_stored(plain)  # so that PEFT's LoRA too has the 4-bit weights that were trained on
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)
    onto_twin = PeftModel.from_pretrained(twin, tmp_path / "native")
    off = (logits(onto_twin) - expected).norm() / expected.norm()
    assert off < (1e-4 if kind in EXACT else 0.02)


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
    for name, found in model.directions().items():
        expected = twin.directions()[name]
        assert torch.equal(found.indices, expected.indices)
        torch.testing.assert_close(found.rates, expected.rates, rtol=1e-3, atol=0)


@pytest.mark.parametrize("kind", ["bnb-nf4", "hqq-4bit"])
def test_an_automatic_prelaunch(kind, folder):
    settings = {"prelaunch_steps": "auto", "prelaunch_min": 3, "prelaunch_max": 6, "settled_agreement": 0.6}
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base), **settings), adapted(base, **settings)
    for one in (model, twin):
        tiny.train(one, 7)
    assert model.directions().prelaunch_steps == twin.directions().prelaunch_steps
    for name, found in model.directions().items():
        assert torch.equal(found.indices, twin.directions()[name].indices)


@pytest.mark.parametrize("settings", [{"direction_budget": "global"}, {"dash_unit": "layer"}, {"dash_unit": "sigma"}])
def test_budgets_and_units(settings, folder):
    base = quantized("bnb-nf4", folder)
    twin, model = adapted(dequantized_twin(base), **settings), adapted(base, **settings)
    for one in (model, twin):
        tiny.train(one, 6)
    for layer, other in zip(layers_of(model).values(), layers_of(twin).values()):
        fixed, expected = layer.fixed("default"), other.fixed("default")
        assert torch.equal(fixed.indices, expected.indices)
        torch.testing.assert_close(fixed.u.abs(), expected.u.abs(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fixed.unit, expected.unit)


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


def test_layers_put_in_by_hand_are_known_by_themselves():
    bnb = pytest.importorskip("bitsandbytes")
    base = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu")
    model = get_peft_model(nn.Sequential(base), tiny.config(target_modules=["0"]))
    assert type(model.base_model.model[0]).__name__ == "TsdLinear4bit"
    tiny.train(model, 6, torch.randn(8, 64))
    expected = model.eval()(torch.eye(64))
    model.merge_adapter()
    assert (model(torch.eye(64)) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_layers_that_were_stored_transposed(bits, tmp_path):
    from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=1, n_head=4, n_positions=32)).save_pretrained(
        tmp_path
    )
    base = loaded(tmp_path, BitsAndBytesConfig(**{f"load_in_{bits}bit": True}))
    model = adapted(base, target_modules=["c_attn"])
    tiny.train(model, 6)
    (layer,) = layers_of(model).values()
    assert layer.weight_matrix().shape == layer.matrix_shape == (192, 64)
    assert torch.equal(layer.weight_matrix(), library_weight(layer.get_base_layer()))
    expected = logits(model)
    model.merge_adapter()
    assert (logits(model) - expected).norm() < 0.15 * expected.norm()


def test_float8_that_hooks_widen():
    from diffusers.hooks import apply_layerwise_casting

    twin, base = whole(), whole()
    for name, parameter in twin.named_parameters():
        if "proj" in name:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    apply_layerwise_casting(base, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=("norm", "embed", "head"))
    twin, model = adapted(twin), adapted(base)
    assert model.base_model.model.model.layers[0].mlp.down_proj.get_base_layer().weight.dtype == torch.float8_e4m3fn
    for layer, other in zip(layers_of(model).values(), layers_of(twin).values()):
        assert torch.equal(layer.weight_matrix(), other.weight_matrix())
        other.lora_A["default"].weight.data.copy_(layer.lora_A["default"].weight)  # which PEFT rounds to float8
    losses, expected = tiny.train(model, 6), tiny.train(twin, 6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"cannot merge into .* kind \(float8, or a tensor type of its own\)"):
        model.merge_adapter()


def stepped(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    optimizer.step()
    return optimizer


def test_an_offloaded_weight_is_refused_before_anything_is_written(folder):
    model = adapted(quantized("bnb-nf4", folder), prelaunch_steps=1)
    first = next(iter(layers_of(model).values()))
    first.get_base_layer().weight = nn.Parameter(torch.empty(8, 1, device="meta"), requires_grad=False)
    with pytest.raises(TransitionError, match=r"q_proj': its base weight is offloaded"):
        tiny.advance(model, stepped(model))


def test_a_sharded_weight_is_refused(folder):
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    model = adapted(quantized("bnb-fp4", folder), prelaunch_steps=1)
    base = next(iter(layers_of(model).values())).get_base_layer()
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        base.weight = nn.Parameter(DTensor.from_local(base.weight.data, mesh, [Shard(0)]), requires_grad=False)
        with pytest.raises(TransitionError, match=r"quantized weight \(Linear4bit\) is sharded .*; train with DDP"):
            tiny.advance(model, stepped(model))
    finally:
        destroy_process_group()


@pytest.mark.parametrize("kind", ["bnb-nf4", "torchao-int8", "hqq-4bit", "gptq"])
def test_directions_beside_other_methods_are_refused(kind, folder):
    base = quantized(kind, folder)
    with pytest.raises(ValueError, match=r"cannot be given directions: its weight is quantized .*use TsdConfig"):
        get_peft_model(base, DashConfig(peft=LoHaConfig(r=2, target_modules=TARGETS)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_recorder_reads_quantized_weights_and_leaves_them_working(kind, folder):
    from peft import LoraConfig

    model = get_peft_model(quantized(kind, folder), LoraConfig(r=2, target_modules=TARGETS))
    expected = logits(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    read = [frozen_weight(layer) for layer in layers]
    for layer, weight in zip(layers, read):
        assert torch.equal(weight, library_weight(layer.get_base_layer()))
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_a_weight_is_read_from_outputs(out_size, in_size, bias, dtype):
    layer = nn.Linear(in_size, out_size, bias=bias, dtype=dtype)
    before = layer.bias
    assert torch.equal(from_outputs(layer, in_size), layer.weight)
    assert layer.bias is before


def test_a_weight_is_read_in_blocks():
    layer = nn.Linear(2500, 3)
    torch.testing.assert_close(from_outputs(layer, 2500), layer.weight, rtol=0, atol=0)


def test_an_unreadable_weight_is_refused():
    class Opaque(nn.Module):
        in_features = out_features = 4

    with pytest.raises(ValueError, match=r"quantized weight \(Opaque\) cannot be read"):
        from_outputs(Opaque(), 4)


@pytest.mark.parametrize("package", ["not_a_package", "not_a_package.at_all"])
def test_skips_say_why(package):
    with pytest.raises(pytest.skip.Exception, match=f"{package} is not installed"):
        need(package)


@pytest.fixture
def place(tmp_path):
    """A folder with a tiny Llama and 20 rows of data."""
    text_models.llama_folder(tmp_path / "model")
    text_models.jsonl(tmp_path / "data.jsonl", text_models.rows(20))
    return tmp_path


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-8bit"])
def test_a_recipe_quantizes_its_model(quantization, place):
    recipe = load_recipe(str(text_models.write_recipe(place)), [f"model.quantization={quantization}"])
    result = training.train(recipe)
    layers = layers_of(result.model)
    assert len(layers) == 4
    assert all(isinstance(layer, QuantizedLayer) for layer in layers.values())
    metrics = result.folder.read_metrics()
    assert metrics["status"] == "finished"
    assert metrics["loss"][-1]["loss"] < metrics["loss"][0]["loss"]
    again = evaluate(str(result.folder.path))
    assert again["score"] == metrics["score"]["after"]
    unquantized = load_recipe(str(result.folder.recipe), ["model.quantization=null"])
    assert evaluate(str(result.folder.path), unquantized)["questions"] == again["questions"]
    stopped = load_recipe(str(text_models.write_recipe(place)), [f"model.quantization={quantization}"])
    stopped = stopped.model_copy(update={"output": str(place / "stopped")})
    shutil.copytree(result.folder.path, stopped.output)
    other = RunFolder(stopped.output)
    for path in (other.adapter, other.adapter_lora, other.checkpoints / "checkpoint-12"):
        shutil.rmtree(path)
    other.write_metrics({**metrics, "status": "running", "loss": metrics["loss"][:10]})
    continued = training.train(stopped.model_copy(update={"resume": True}))
    for name, tensor in load_file(result.folder.adapter / "adapter_model.safetensors").items():
        assert torch.equal(tensor, load_file(continued.folder.adapter / "adapter_model.safetensors")[name]), name


def test_a_model_that_was_saved_quantized_is_used_as_it_is(place):
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    loaded(place / "model", quantization).save_pretrained(place / "packed")
    for file in (place / "model").glob("tokenizer*"):
        shutil.copy(file, place / "packed")
    recipe = text_models.write_recipe(place)
    result = training.train(load_recipe(str(recipe), [f"model.name={place / 'packed'}"]))
    assert all(isinstance(layer, QuantizedLayer) for layer in layers_of(result.model).values())
    with pytest.raises(InputError, match=r"model.quantization=bnb-8bit is for full weights, .*quantized already"):
        training.train(
            load_recipe(
                str(recipe),
                [f"model.name={place / 'packed'}", "model.quantization=bnb-8bit", f"output={place / 'other'}"],
            )
        )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.quantization=bnb-2bit"], "model.quantization"),
        (["model.quantization=bnb-4bit", "method=full"], "is for the methods .*got method=full"),
        (["model.quantization=bnb-4bit", "method=loha-dash"], "is for the methods .*got method=loha-dash"),
        (
            ["model.quantization=bnb-4bit", "task.family=classify", "task.max_new_tokens=16"],
            "for models that write; got task.family=classify",
        ),
    ],
)
def test_recipes_that_cannot_be_quantized_are_refused(overrides, message, place):
    with pytest.raises(InputError, match=message):
        load_recipe(str(text_models.write_recipe(place)), overrides)


def test_a_gguf_file_is_not_quantized_again(place):
    (place / "model.gguf").write_bytes(b"GGUF")
    recipe = load_recipe(
        str(text_models.write_recipe(place)), [f"model.name={place / 'model.gguf'}", "model.quantization=bnb-4bit"]
    )
    with pytest.raises(InputError, match=r"quantization=bnb-4bit is for full weights, .*model.gguf' is a GGUF file"):
        training.train(recipe)


def test_a_missing_bitsandbytes_is_said(place, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    recipe = load_recipe(str(text_models.write_recipe(place)), ["model.quantization=bnb-8bit"])
    with pytest.raises(InputError, match="quantization=bnb-8bit needs the package bitsandbytes: pip install it"):
        training.train(recipe)
