"""Adapters of many kinds against the dense difference of a model merged by PEFT and its base."""

import warnings

import numpy as np
import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdamssConfig,
    BOFTConfig,
    C3AConfig,
    DeftConfig,
    DeloraConfig,
    FourierFTConfig,
    FrodConfig,
    GraloraConfig,
    HiraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    OSFConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PsoftConfig,
    PveraConfig,
    RandLoraConfig,
    ShiraConfig,
    TinyLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from peft_tsd import DashConfig
from peft_tsd.explore import ExploreError, explore
from peft_tsd.explore.weights import Checkpoint
from support import reference, text_models, tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]
LORA = {"r": 3, "lora_alpha": 5, "target_modules": TARGETS}

KINDS = {
    "lora": LoraConfig(**LORA),
    "lora-patterns": LoraConfig(
        **LORA, rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"v_proj": 7}, use_rslora=True
    ),
    "lora-modules-to-save": LoraConfig(**LORA, modules_to_save=["o_proj"]),
    "lora-eva": LoraConfig(**LORA, init_lora_weights="gaussian"),
    "dora": LoraConfig(**LORA, use_dora=True),
    "adalora": AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=TARGETS, total_step=10),
    "loha": LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "lokr": LoKrConfig(r=3, alpha=5, target_modules=TARGETS),
    "oft": OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "boft": BOFTConfig(boft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "vera": VeraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]),
    "vera-unsaved": VeraConfig(r=4, target_modules=["q_proj", "v_proj"], save_projection=False),
    "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "hra": HRAConfig(r=4, target_modules=TARGETS),
    "fourierft": FourierFTConfig(n_frequency=20, target_modules=["q_proj", "v_proj"]),
    "c3a": C3AConfig(block_size=8, target_modules=["q_proj"]),
    "miss": MissConfig(r=4, target_modules=TARGETS),
    "shira": ShiraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "vblora": VBLoRAConfig(r=2, num_vectors=12, vector_length=8, topk=2, target_modules=["q_proj", "v_proj"]),
    "deft": DeftConfig(r=4, target_modules=["q_proj"]),
    "delora": DeloraConfig(r=4, target_modules=["q_proj"]),
    "gralora": GraloraConfig(r=4, target_modules=["q_proj"]),
    "hira": HiraConfig(r=4, target_modules=["q_proj"]),
    "pvera": PveraConfig(r=4, target_modules=["q_proj"]),
    "tinylora": TinyLoraConfig(target_modules=["q_proj"]),
    "tuned-copies": LNTuningConfig(target_modules=["q_proj"]),
    "randlora": RandLoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_models.llama_folder(tmp_path_factory.mktemp("base") / "model")


def saved(base, config, folder, model_class=AutoModelForCausalLM):
    """An adapter with random weights in a folder."""
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model_class.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def merged_change(base, adapter, name: str, model_class=AutoModelForCausalLM) -> tuple[torch.Tensor, torch.Tensor]:
    """The base weight and its change as (out, in), by merging the whole model in float64."""
    model = model_class.from_pretrained(base, dtype=torch.float64)
    weight = model.get_submodule(name).weight.detach().clone()
    merged = PeftModel.from_pretrained(model, adapter).to(torch.float64).merge_and_unload()
    return weight, merged.get_submodule(name).weight.detach() - weight


def check(found, base, adapter, model_class=AutoModelForCausalLM, transposed=False):
    for change in found.weights:
        weight, delta = merged_change(base, adapter, change.name, model_class)
        if transposed:
            weight, delta = weight.T, delta.T
        rates = reference.change_rates(weight, delta)
        np.testing.assert_allclose(change.rates, rates, rtol=1e-4, atol=1e-6 * max(1, rates.max()))
        assert change.change_norm == pytest.approx(float(delta.norm()), rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_change_is_merged_less_base(base, kind, tmp_path):
    adapter = saved(base, KINDS[kind], tmp_path / "adapter")
    [found] = explore(str(base), str(adapter))
    targets = set(KINDS[kind].target_modules) | set(KINDS[kind].modules_to_save or ())
    assert {weight.name.rpartition(".")[2] for weight in found.weights} == targets
    assert len(found.weights) == 2 * len(targets)
    assert found.kind == KINDS[kind].peft_type.value
    assert found.left_out["lm_head"] == "the output head"
    assert found.left_out["model.layers.0.mlp.up_proj"] == f"not adapted by {adapter}"
    check(found, base, adapter)


@pytest.mark.parametrize(
    "config", [LoraConfig(r=3, target_modules=["c_attn"]), LoraConfig(r=3, target_modules=["c_fc"], use_dora=True)]
)
@pytest.mark.filterwarnings("ignore")
def test_weights_stored_transposed(config, tmp_path):
    base = text_models.gpt2_folder(tmp_path / "model")
    adapter = saved(base, config, tmp_path / "adapter")
    [found] = explore(str(base), str(adapter))
    assert len(found.weights) == 2
    check(found, base, adapter, transposed=True)


def test_tsd_adapters(trained, tmp_path):
    trained.save_pretrained(tmp_path / "adapter")
    tiny.llama().save_pretrained(tmp_path / "model")
    [found] = explore(str(tmp_path / "model"), str(tmp_path / "adapter"))
    assert found.kind == "TSD"
    assert len(found.weights) == 6
    for change in found.weights:
        layer = trained.base_model.model.get_submodule(change.name)
        expected = reference.change_rates(layer.weight_matrix(), reference.effective_change(layer))
        np.testing.assert_allclose(change.rates, expected, rtol=1e-4, atol=1e-7)


def test_directions_beside_another_method(tmp_path):
    config = DashConfig(peft=LoHaConfig(r=2, target_modules=TARGETS), prelaunch_steps=3, dash_lr_ratio=20.0)
    model = get_peft_model(tiny.llama(), config)
    tiny.train(model, 6)
    model.save_pretrained(tmp_path / "adapter")
    tiny.llama().save_pretrained(tmp_path / "model")
    [found] = explore(str(tmp_path / "model"), str(tmp_path / "adapter"))
    assert found.kind == "DASH_LOHA"
    assert len(found.weights) == 6
    for change in found.weights:
        layer = model.base_model.model.get_submodule(change.name)
        delta = layer.learned_change("default") + layer.dash_weight("default")
        expected = reference.change_rates(layer.weight_matrix(), delta)
        np.testing.assert_allclose(change.rates, expected, rtol=1e-3, atol=1e-6)


def refusal(*arguments, **options) -> str:
    with pytest.raises(ExploreError) as raised:
        explore(*arguments, **options)
    [line] = str(raised.value).splitlines()
    return line


@pytest.mark.filterwarnings("ignore")
def test_adapters_without_a_change_of_weights_are_refused(base, tmp_path):
    for config in (
        PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    ):
        adapter = saved(base, config, tmp_path / config.peft_type.value)
        assert "changes what the model is given and not its weights" in refusal(str(base), str(adapter))
    adapter = saved(base, LNTuningConfig(target_modules=["input_layernorm"]), tmp_path / "norms")
    assert "has no change of any of model.layers.0.self_attn.q_proj" in refusal(str(base), str(adapter))


# What these start from is made of the base weight, or drawn at random, and not saved.
UNTOLD = [
    AdamssConfig(target_modules=["q_proj"]),
    FrodConfig(target_modules=["q_proj"]),
    OSFConfig(target_modules=["q_proj"]),
    PsoftConfig(r=4, target_modules=["q_proj"]),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", UNTOLD, ids=lambda config: config.peft_type.value)
def test_adapters_whose_files_do_not_hold_their_start_are_refused(base, config, tmp_path):
    adapter = saved(base, config, tmp_path / "adapter")
    assert "do not hold" in refusal(str(base), str(adapter))


@pytest.mark.filterwarnings("ignore")
def test_loras_that_take_a_part_out_of_the_base_are_refused(base, tmp_path):
    adapter = saved(base, LoraConfig(**LORA, init_lora_weights="olora"), tmp_path / "olora")
    assert "init_lora_weights='olora', which takes a part out of the base weight" in refusal(str(base), str(adapter))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", [LoraConfig(**LORA), LoHaConfig(r=2, target_modules=TARGETS)])
def test_adapters_for_another_base_are_refused(base, config, tmp_path):
    adapter = saved(base, config, tmp_path / "adapter")
    gpt2 = text_models.gpt2_folder(tmp_path / "gpt2")
    assert "another" in refusal(str(gpt2), str(adapter))
    wider = tiny.llama()
    wider.config.intermediate_size = 56
    type(wider)(wider.config).save_pretrained(tmp_path / "wider")
    line = refusal(str(tmp_path / "wider"), str(adapter))
    assert "another" in line
    assert "down_proj" in line


def test_damaged_adapters_are_refused(base, tmp_path):
    adapter = saved(base, LoraConfig(**LORA), tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert f"'{file}' is damaged or not an adapter" in refusal(str(base), str(adapter))
    file.write_bytes(whole)
    state = load_file(file)
    key = next(key for key in state if "lora_A" in key)
    state[key][0, 0] = torch.inf
    save_file(state, file)
    assert f"its {key} holds NaN or Inf" in refusal(str(base), str(adapter))
    file.unlink()
    assert "has no adapter_model.safetensors" in refusal(str(base), str(adapter))
    (adapter / "adapter_model.bin").write_bytes(b"")
    assert "adapter_model.bin is pickled and not read" in refusal(str(base), str(adapter))
    (adapter / "adapter_config.json").write_text("{}")
    assert "adapter_config.json' cannot be used: its peft_type is None" in refusal(str(base), str(adapter))


def test_an_adapter_of_the_model_without_its_head(base, tmp_path):
    adapter = saved(base, LoraConfig(**LORA), tmp_path / "adapter", AutoModel)
    assert "is an adapter for another base: it adapts 'layers.0" in refusal(str(base), str(adapter))


@pytest.mark.filterwarnings("ignore")
def test_convolutions(tmp_path):
    from transformers import ConvNextConfig, ConvNextModel

    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "num_channels": 3}
    base = tmp_path / "model"
    ConvNextModel(ConvNextConfig(**sizes)).save_pretrained(base)
    config = LoraConfig(r=3, target_modules=["patch_embeddings", "downsampling_layer.1"])
    adapter = saved(base, config, tmp_path / "adapter", AutoModel)
    [found] = explore(str(base), str(adapter))
    assert [change.shape for change in found.weights] == [(8, 48), (8, 32)]
    for change in found.weights:
        weight, delta = merged_change(base, adapter, change.name, AutoModel)
        rates = reference.change_rates(weight.flatten(1), delta.flatten(1))
        np.testing.assert_allclose(change.rates, rates, rtol=1e-4, atol=1e-6)
    grouped = saved(base, LoraConfig(r=8, target_modules=["dwconv"]), tmp_path / "grouped", AutoModel)
    assert "Merging is not supported for _ConvNd layers with group" in refusal(str(base), str(grouped))


UNMERGEABLE = [
    LoraConfig(**LORA, alora_invocation_tokens=[1, 2]),
    LilyConfig(r=2, target_modules=TARGETS),
    PolyConfig(r=2, target_modules=TARGETS),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", UNMERGEABLE, ids=lambda config: config.peft_type.value)
def test_methods_that_peft_cannot_merge_are_refused_before_any_work(base, config, tmp_path, monkeypatch):
    adapter = saved(base, config, tmp_path / "adapter")
    monkeypatch.setattr(Checkpoint, "read", lambda *_: pytest.fail("a weight was read"))
    kind = config.peft_type.value
    line = refusal(str(base), str(adapter))
    assert f"PEFT cannot merge a {kind} adapter into model.layers.0.self_attn.q_proj" in line
