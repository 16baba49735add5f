"""Quantized base weights: the same directions and the same function as on the de-quantized model, in every kind."""

import pytest
import torch
from peft import LoHaConfig, PeftModel, get_peft_model
from torch import nn

from peft_tsd import DashConfig, TransitionError, export_lora
from peft_tsd.explore.recorder import frozen_weight
from peft_tsd.models.packed import keep_as_stored
from peft_tsd.tuner.quantized import QuantizedLayer
from support import directions, reference, tiny
from support.quantized_models import (
    EXACT,
    KINDS,
    MERGEABLE,
    TARGETS,
    adapted,
    dequantized_twin,
    each,
    layers_of,
    library_weight,
    loaded,
    logits,
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


@pytest.mark.parametrize("kind", each(KINDS))
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
        highest = directions.Found(found.indices.tolist(), found.rates.tolist())
        directions.assert_highest(highest, rates, len(found.indices), rtol=1e-4)


@pytest.mark.parametrize("kind", each(EXACT))
def test_training_over_the_transition_is_that_of_the_dequantized_model(kind, folder):
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base)), adapted(base)
    losses, expected = tiny.train(model, 6), tiny.train(twin, 6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=0)
    directions.assert_same(directions.of(model), directions.of(twin), rtol=1e-2)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["bnb-8bit", "gptq", "awq"])
def test_training_where_activations_are_rounded_too(kind, folder):
    base = quantized(kind, folder)
    twin, model = adapted(dequantized_twin(base)), adapted(base)
    losses, expected = tiny.train(model, 6), tiny.train(twin, 6)
    assert model.phase() == "dash"
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", each(KINDS))
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


@pytest.mark.parametrize("kind", each(MERGEABLE))
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


@pytest.mark.parametrize("kind", each(KINDS))
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


@pytest.mark.parametrize("kind", each(KINDS))
def test_the_recorder_reads_quantized_weights_and_leaves_them_working(kind, folder):
    from peft import LoraConfig

    model = get_peft_model(quantized(kind, folder), LoraConfig(r=2, target_modules=TARGETS))
    expected = logits(model)
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    read = [frozen_weight(layer) for layer in layers]
    for layer, weight in zip(layers, read):
        assert torch.equal(weight, library_weight(layer.get_base_layer()))
    torch.testing.assert_close(logits(model), expected, rtol=0.02, atol=0.02)
