"""Unusual bases: tied weights, experts, tensor parallelism. The others are in test_layer and test_quantized."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from peft_tsd import export_lora
from support import reference, tiny


def tied() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def trained_head():
    model = get_peft_model(tied(), tiny.config(target_modules=["lm_head", "q_proj"]))
    tiny.train(model, 6)
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    return MixtralForCausalLM(config).eval()


def test_a_head_that_shares_the_embeddings_weight_is_trained_alone(trained_head):
    head = trained_head.base_model.model.lm_head
    assert head.get_base_layer().weight is trained_head.get_input_embeddings().weight
    assert head.get_delta_weight("default").abs().max() > 1e-2
    rates = reference.change_rates(head.weight_matrix(), reference.effective_change(head))
    assert len(rates) == 32


def test_a_merge_into_a_shared_weight_leaves_the_other_module_alone(trained_head, tmp_path):
    expected = logits(trained_head)
    embedding = trained_head.get_input_embeddings().weight.clone()
    merged = trained_head.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-4, atol=1e-5)


def test_unmerged_the_weight_is_shared_again(trained_head):
    embeddings, head = trained_head.get_input_embeddings(), trained_head.base_model.model.lm_head
    weight, expected = embeddings.weight.clone(), logits(trained_head)
    trained_head.merge_adapter()
    torch.testing.assert_close(logits(trained_head), expected, rtol=1e-4, atol=1e-5)
    assert head.get_base_layer().weight is not embeddings.weight
    trained_head.merge_adapter(["default"])  # once more: nothing is merged twice
    trained_head.unmerge_adapter()
    assert head.get_base_layer().weight is embeddings.weight
    assert torch.equal(embeddings.weight, weight)
    torch.testing.assert_close(logits(trained_head), expected, rtol=1e-5, atol=1e-6)


def test_disabling_a_merged_adapter_brings_the_shared_weight_back(trained_head):
    with trained_head.disable_adapter():
        before = logits(trained_head)
    trained_head.merge_adapter()
    with trained_head.disable_adapter():
        torch.testing.assert_close(logits(trained_head), before, rtol=1e-4, atol=1e-5)
    head = trained_head.base_model.model.lm_head
    assert head.get_base_layer().weight is trained_head.get_input_embeddings().weight


def test_a_weight_of_its_own_is_merged_into_in_place():
    model = get_peft_model(tiny.llama(), tiny.config())
    tiny.train(model, 6)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.get_base_layer().weight
    model.merge_adapter()
    assert layer.get_base_layer().weight is weight


def test_an_adapter_of_a_tied_head_is_saved_and_exported(trained_head, tmp_path):
    expected = logits(trained_head)
    trained_head.save_pretrained(tmp_path / "native")
    assert torch.equal(logits(PeftModel.from_pretrained(tied(), tmp_path / "native").eval()), expected)
    export_lora(trained_head, tmp_path / "lora")
    exported = PeftModel.from_pretrained(tied(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(exported), expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_tied_to_the_embeddings_is_refused():
    with pytest.raises(ValueError, match=r"embed_tokens cannot .*: ensure_weight_tying=True .* without it, lm_h"):
        get_peft_model(tied(), tiny.config(target_modules=["lm_head"], ensure_weight_tying=True))


def test_whole_tied_modules_beside_an_adapter_stay_tied():
    config = tiny.config(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = get_peft_model(tied(), config)
    tiny.train(model, 6)
    expected = logits(model.eval())
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.get_input_embeddings().weight
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


def test_experts_named_in_target_modules_are_refused_before_anything_is_changed():
    model = mixtral()
    with pytest.raises(ValueError, match=r"=\['w1', 'w3'\] name no module .*experts.gate_up_proj: .* each expert; "):
        get_peft_model(model, tiny.config(target_modules=["q_proj", "w3", "w1"]))
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_module_of_experts_is_refused_by_name():
    with pytest.raises(ValueError, match=r"mlp.experts cannot .*gate_up_proj and down_proj hold one matrix for each"):
        get_peft_model(mixtral(), tiny.config(target_modules=["experts"]))


def test_layers_beside_experts_are_adapted():
    model = get_peft_model(mixtral(), tiny.config(target_modules=["q_proj", "v_proj"]))
    tiny.train(model, 6)
    assert sorted(model.directions()) == [f"model.layers.0.self_attn.{name}_proj" for name in "qv"]


def test_names_that_no_module_has_are_no_error_without_experts():
    get_peft_model(tiny.llama(), tiny.config(target_modules=["q_proj", "w1"]))


@pytest.fixture
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


REFUSED = (
    r"layer cannot carry .* split over processes by tensor parallelism.* without tp_plan, and train with DDP or FSDP"
)


def test_a_weight_of_tensor_parallelism_is_refused(one_process):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp",))
    base = nn.Sequential()
    base.layer = nn.Linear(8, 6)
    base.layer.weight = nn.Parameter(distribute_tensor(base.layer.weight.data, mesh, [Shard(0)]))
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(base, tiny.config(target_modules=["layer"]))


def test_a_layer_in_a_plan_of_tensor_parallelism_is_refused():
    base = nn.Sequential()
    base.layer = nn.Linear(8, 6)
    base.layer._hf_tp_plan = "colwise"
    with pytest.raises(ValueError, match=REFUSED):
        get_peft_model(base, tiny.config(target_modules=["layer"]))
