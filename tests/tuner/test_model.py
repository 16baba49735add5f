"""Everything PEFT promises of a tuner, for a model with TSD adapters."""

import warnings
from itertools import chain

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch import nn

from peft_tsd import PrelaunchWarning, TsdConfig, TsdModel
from peft_tsd.tuner.phase import adapted_layers
from support import tiny


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny.tokens() if ids is None else ids).logits


def test_a_new_adapter_changes_nothing_and_trains_only_its_own(method):
    base = tiny.llama()
    expected = logits(base)
    model = get_peft_model(base, tiny.config(**method))
    assert isinstance(model.base_model, TsdModel)
    assert torch.equal(logits(model), expected)
    trainable = {
        name.split(".default")[0].rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad
    }
    assert trainable == {"lora_A", "lora_B"} | ({"lora_dash"} if method["method"] != "lora-init" else set())


def test_trainable_parameters_are_loras_plus_s_a_layer(capsys):
    lora = get_peft_model(tiny.llama(), LoraConfig(r=4, target_modules=tiny.LLAMA_TARGETS))
    for method, extra in (("lora-dash", 5), ("lora-tsd", 5), ("lora-init", 0)):
        model = get_peft_model(tiny.llama(), tiny.config(method))
        count = model.get_nb_trainable_parameters()[0]
        assert count == lora.get_nb_trainable_parameters()[0] + 6 * extra
        model.print_trainable_parameters()
        assert f"trainable params: {count:,}" in capsys.readouterr().out


def test_parameters_are_the_same_objects_before_and_after_the_transition(method):
    model = get_peft_model(tiny.llama(), tiny.config(**method))

    def held():
        return chain(model.named_parameters(), model.named_buffers())

    before = {name: (id(t), t.shape, t.requires_grad, t.dtype) for name, t in held()}
    tiny.train(model, 6)
    assert {name: (id(t), t.shape, t.requires_grad, t.dtype) for name, t in held()} == before


def test_the_base_weights_are_never_written_to(method):
    base = tiny.llama()
    frozen = {name: p.clone() for name, p in base.named_parameters()}
    model = get_peft_model(base, tiny.config(**method))
    tiny.train(model, 6)
    assert all(torch.equal(p, frozen[name]) for name, p in model.unload().named_parameters())


def test_disabling_gives_the_base_bit_for_bit(trained):
    expected = logits(tiny.llama())
    assert not torch.equal(logits(trained), expected)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), expected)
    trained.merge_adapter()
    assert not torch.equal(logits(trained), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_save_and_load(trained, tmp_path, low_cpu_mem_usage):
    trained.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(loaded), logits(trained))
    assert loaded.phase() == "dash"
    assert str(loaded.directions()) == str(trained.directions())
    assert not any(p.requires_grad for p in loaded.parameters())
    resumable = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    tiny.train(resumable, 1)
    steps = {int(layer.fixed("default").step) for layer in adapted_layers(resumable, "default").values()}
    assert steps == {7}


def test_auto_model(trained, tmp_path):
    tiny.llama().save_pretrained(tmp_path / "base")
    trained.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    trained.peft_config["default"].task_type = TaskType.CAUSAL_LM
    trained.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded), logits(trained))


def test_transformers_own_load_adapter(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    model = tiny.llama()
    model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), logits(trained))
    model.delete_adapter("default")
    torch.testing.assert_close(logits(model), logits(tiny.llama()))


def test_injected_into_a_model_without_a_tuner(trained, tmp_path):
    model = inject_adapter_in_model(tiny.config(), tiny.llama())
    tiny.train(model, 6)
    assert {layer.fixed("default").identified for layer in adapted_layers(model, "default").values()} == {True}
    assert any(key.endswith("lora_directions.u") for key in get_peft_model_state_dict(model))


def test_several_adapters_are_independent(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config("lora-tsd"), adapter_name="one")
    model.add_adapter("two", tiny.config("lora-dash", r=2, target_modules=["q_proj", "up_proj"]))
    tiny.train(model, 6)
    one = logits(model)
    model.set_adapter("two")
    assert model.phase("one") == "dash"
    assert model.phase("two") == "pre-launch"
    assert torch.equal(logits(model), logits(tiny.llama()))
    tiny.train(model, 6)
    two = logits(model)
    assert model.phase() == "dash"
    assert set(model.directions("one")) != set(model.directions("two"))
    model.set_adapter("one")
    assert torch.equal(logits(model), one)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert not torch.allclose(both, one)
    merged = model.merge_and_unload(adapter_names=["one", "two"])
    torch.testing.assert_close(logits(merged), both, rtol=1e-4, atol=1e-5)

    model = PeftModel(tiny.llama(), tiny.config(), adapter_name="one")
    model.add_adapter("two", tiny.config())
    model.delete_adapter("one")
    assert list(model.peft_config) == ["two"]
    layer = next(m for m in model.modules() if hasattr(m, "lora_dash"))
    assert set(layer.lora_dash) == set(layer.lora_directions) == set(layer.tsd_config) == {"two"}
    assert not torch.equal(one, two)


def test_rows_of_one_batch_may_use_different_adapters():
    model = get_peft_model(tiny.llama(), tiny.config("lora-tsd"), adapter_name="one")
    tiny.train(model, 6)
    model.add_adapter("two", tiny.config("lora-dash"))
    model.set_adapter("two")
    tiny.train(model, 6)
    model.eval()
    ids = tiny.tokens(4)
    expected = []
    for adapter in ("one", "two"):
        model.set_adapter(adapter)
        expected.append(logits(model, ids))
    with model.disable_adapter():
        expected.append(logits(model, ids))
    with torch.no_grad():
        mixed = model(ids, adapter_names=["one", "two", "__base__", "one"]).logits
    torch.testing.assert_close(
        mixed, torch.stack([expected[0][0], expected[1][1], expected[2][2], expected[0][3]]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(method, reentrant):
    losses = []
    for checkpointing in (False, True):
        model = get_peft_model(tiny.llama(), tiny.config(**method))
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.train()
        losses.append(tiny.train(model, 6))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["down_proj"]},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.0.*q_proj"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal"},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
    ids=str,
)
def test_what_lora_config_offers_works_and_is_saved(changes, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(**changes))
    tiny.train(model, 6)
    model.eval()
    assert model.phase() == "dash"
    lora = get_peft_model(tiny.llama(), LoraConfig(r=4, **{"target_modules": tiny.LLAMA_TARGETS, **changes}))
    layers = adapted_layers(model, "default")
    assert {n.removeprefix("base_model.model.") for n, m in lora.named_modules() if hasattr(m, "lora_A")} == set(
        layers
    )
    assert model.get_nb_trainable_parameters()[0] == lora.get_nb_trainable_parameters()[0] + 5 * len(layers)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), logits(model))


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_gpt2_whatever_fan_in_fan_out_says(fan_in_fan_out, tmp_path):
    changes = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": fan_in_fan_out}
    model = get_peft_model(tiny.gpt2(), tiny.config(**changes))
    tiny.train(model, 6)
    model.save_pretrained(tmp_path)
    model.eval()
    expected = logits(model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.gpt2(), tmp_path)), expected)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_sequence_classification_saves_its_head(tmp_path):
    config = tiny.config(task_type="SEQ_CLS", target_modules=["query", "value"])
    model = get_peft_model(tiny.bert(), config)
    ids, labels = tiny.tokens(6), torch.tensor([0, 1, 2, 0, 1, 2])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    from peft_tsd import advance

    for _ in range(6):
        model(ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, optimizer)
    model.eval()
    model.save_pretrained(tmp_path)
    other = tiny.bert()
    nn.init.normal_(other.classifier.weight)
    assert torch.equal(logits(PeftModel.from_pretrained(other, tmp_path), ids), logits(model, ids))


@pytest.mark.parametrize(
    "method",
    [
        {"method": "lora-tsd", "init_reading": "svd"},
        pytest.param({"method": "lora-tsd", "init_reading": "orthonormal"}, marks=pytest.mark.long),
        pytest.param({"method": "lora-init", "init_reading": "svd"}, marks=pytest.mark.long),
        pytest.param({"method": "lora-init", "init_reading": "orthonormal"}, marks=pytest.mark.long),
        pytest.param({"method": "lora-dash"}, marks=pytest.mark.long),
    ],
    indirect=True,
)
def test_compiled_with_one_graph_over_the_transition(method):
    """One graph, compiled once: the transition changes values, never the program."""
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = get_peft_model(tiny.llama(), tiny.config(**method))
        wrapped = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch._dynamo.config.patch(error_on_recompile=True):
            losses.append(tiny.train(wrapped, 6))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)


def test_directions_are_readable_by_people_and_programs(trained):
    found = trained.directions()
    assert list(found) == list(adapted_layers(trained.base_model.model, "default"))
    name = "model.layers.0.self_attn.v_proj"
    layer = found[name]
    dash = 0 if trained.peft_config["default"].method == "lora-init" else 5
    assert len(layer.indices) == len(layer.rates) == len(layer.sigma) == max(dash, 4 if dash == 0 else 5)
    assert layer.rank_bound == 16
    assert layer.u.shape == (16, dash)
    assert layer.v.shape == (32, dash)
    assert layer.delta_sigma.shape == (dash,)
    assert (layer.rates[:-1] >= layer.rates[1:]).all()
    table = str(found).splitlines()
    assert table[0].split() == ["layer", "of", "directions,", "highest", "change", "rate", "first", "rate", "σ", "Δσ"]
    assert len(table) == len(found) + 2
    row = next(line for line in table if line.startswith(name))
    assert " ".join(map(str, layer.indices[:8].tolist())) in row
    layer.u.zero_()  # a copy: the model keeps its own
    assert trained.directions()[name].u.any() or dash == 0


def test_saving_in_pre_launch_says_so_once(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config())
    with pytest.warns(
        PrelaunchWarning, match=r"'default' \(lora-tsd\) is saved while still in pre-launch.*TsdCallback"
    ):
        model.save_pretrained(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error", PrelaunchWarning)
        model.save_pretrained(tmp_path / "b")
    begun = get_peft_model(tiny.llama(), tiny.config())
    tiny.train(begun, 2)
    with pytest.warns(PrelaunchWarning, match="counted 2 of its 3 pre-launch steps: train longer, or lower"):
        begun.save_pretrained(tmp_path / "c")


def test_questions_without_an_answer():
    model = get_peft_model(tiny.llama(), tiny.config())
    with pytest.raises(ValueError, match="'default' has no directions yet: it has taken 0 of its 3"):
        model.directions()
    with pytest.raises(ValueError, match=r"no adapter 'other'; the model has \['default'\]"):
        model.phase("other")


def test_what_would_lose_what_was_learned_is_refused(trained, tmp_path):
    with pytest.raises(NotImplementedError, match=r"Cannot combine the TSD adapters \['default'\].*export_lora"):
        trained.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion is not for TSD"):
        trained.save_pretrained(tmp_path / "a", path_initial_model_for_weight_conversion=str(tmp_path / "b"))
    with pytest.raises(ValueError, match="peft types"):
        trained.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


def test_a_lora_already_in_the_model_is_not_built_upon():
    model = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny.llama())
    with pytest.raises(ValueError, match="already carries adapters of type peft.tuners.lora.layer.Linear"):
        inject_adapter_in_model(tiny.config(target_modules=["q_proj"]), model, adapter_name="tsd")


def test_peft_finds_the_method_by_its_name(tmp_path):
    config = TsdConfig(target_modules=["q_proj"])
    config.save_pretrained(tmp_path)
    assert '"peft_type": "TSD"' in (tmp_path / "adapter_config.json").read_text()
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is TsdConfig
