"""Whole checkpoints, as they come: sharded, tied, with and without a head, in other dtypes, as GGUF; and broken."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from peft_tsd.explore import ExploreError, explore
from peft_tsd.explore.skeleton import build, select
from support import reference, text_models


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return text_models.llama_folder(tmp_path_factory.mktemp("base") / "model")


def tuned(base, folder, model_class=AutoModelForCausalLM, only=None, **options):
    """The base with every matrix changed at random (or those whose name has `only` in it), in a folder."""
    model = model_class.from_pretrained(base, dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and (only is None or only in name):
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    dtype = options.pop("dtype", None)
    (model if dtype is None else model.to(dtype)).save_pretrained(folder, **options)
    return folder


def refusal(*arguments, **options) -> str:
    with pytest.raises(ExploreError) as raised:
        explore(*map(str, arguments), **options)
    [line] = str(raised.value).splitlines()
    return line


def check(found, base, folder, tied=False):
    before, after = (load_all(place) for place in (base, folder))
    for change in found.weights:
        weight = before[f"{change.name}.weight"]
        delta = after[f"{change.name}.weight"].double() - weight.double()
        if "c_" in change.name:
            weight, delta = weight.T, delta.T
        np.testing.assert_allclose(change.rates, reference.change_rates(weight, delta), rtol=1e-4, atol=1e-6)


def load_all(folder) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("make", [text_models.llama_folder, text_models.gpt2_folder, text_models.bert_folder])
def test_every_linear_weight_but_the_head(make, tmp_path):
    base = make(tmp_path / "base")
    [found] = explore(
        str(base),
        str(
            tuned(
                base,
                tmp_path / "tuned",
                AutoModelForSequenceClassification if make is text_models.bert_folder else AutoModelForCausalLM,
            )
        ),
    )
    assert found.kind == "checkpoint"
    before = load_all(base)
    linear = {
        key.removesuffix(".weight")
        for key, value in before.items()
        if value.ndim == 2 and not any(part in key for part in ("embed", "wte", "wpe", "lm_head", "classifier"))
    }
    # transformers saves GPT-2 and BERT under the prefix of the base model, as the model names them.
    assert {weight.name for weight in found.weights} == linear
    assert set(found.left_out) <= {"lm_head", "classifier"}
    check(found, base, tmp_path / "tuned")


def test_shards_and_one_file_are_the_same(base, tmp_path):
    [whole] = explore(str(base), str(tuned(base, tmp_path / "whole")))
    sharded = tuned(base, tmp_path / "sharded", max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    [parts] = explore(str(base), str(sharded))
    for one, other in zip(whole.weights, parts.weights):
        np.testing.assert_array_equal(one.rates, other.rates)


@pytest.mark.parametrize("swap", [False, True])
def test_with_and_without_the_head(base, tmp_path, swap):
    """A checkpoint of LlamaModel lacks the prefix that LlamaForCausalLM puts before its names."""
    bare = tuned(base, tmp_path / "bare", AutoModel)
    pair = (bare, base) if swap else (base, bare)
    [found] = explore(*map(str, pair))
    assert len(found.weights) == 14
    assert {weight.name.startswith("model.") for weight in found.weights} == {not swap}


def test_a_classifier_on_the_base_has_its_weights_compared(base, tmp_path):
    folder = tuned(base, tmp_path / "classifier", AutoModelForSequenceClassification)
    [found] = explore(str(base), str(folder))
    assert len(found.weights) == 14


def test_dtypes_may_differ(base, tmp_path):
    folder = tuned(base, tmp_path / "tuned", dtype=torch.bfloat16)
    [found] = explore(str(base), str(folder))
    check(found, base, folder)


def test_unchanged_weights_are_left_out(base, tmp_path):
    [found] = explore(str(base), str(tuned(base, tmp_path / "tuned", only="v_proj")))
    assert {weight.name.rpartition(".")[2] for weight in found.weights} == {"v_proj"}
    assert found.left_out["model.layers.1.self_attn.q_proj"] == "unchanged"
    [nothing] = explore(str(base), str(base))
    assert nothing.weights == ()


def test_modules_narrow_the_weights(base, tmp_path):
    folder = tuned(base, tmp_path / "tuned")
    [found] = explore(str(base), str(folder), modules=["k_proj", "model.layers.1.mlp.up_proj", "lm_head"])
    assert [weight.name for weight in found.weights] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
        "lm_head",
    ]
    assert "'kproj'; did you mean 'k_proj'?" in refusal(base, folder, modules=["kproj"])
    assert "embed_tokens" in refusal(base, folder, modules=["embed_tokens"])


def test_tied_weights_are_read_under_the_name_they_were_saved_by(tmp_path):
    base = text_models.gpt2_folder(tmp_path / "base")
    with safe_open(base / "model.safetensors", framework="pt") as file:
        assert not any("lm_head" in key for key in file.keys())  # noqa: SIM118
    [found] = explore(str(base), str(tuned(base, tmp_path / "tuned")), modules=["lm_head"])
    assert [weight.name for weight in found.weights] == ["lm_head"]


def test_a_weight_tied_to_another_is_measured_once(base):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    weights, _ = select(model, ["up_proj"])
    [weight] = weights
    assert weight.name == "model.layers.0.mlp.up_proj"
    assert weight.parameters == ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight")


def test_several_models_share_a_factorization(base, tmp_path, monkeypatch):
    from peft_tsd.explore import exploring

    made = []

    class Counting(exploring.Spectrum):
        def __init__(self, weight):
            made.append(weight)
            super().__init__(weight)

    monkeypatch.setattr(exploring, "Spectrum", Counting)
    one, two = tuned(base, tmp_path / "one"), tuned(base, tmp_path / "two", only="q_proj")
    found = explore(str(base), [str(one), str(two)])
    assert [len(model.weights) for model in found] == [14, 2]
    assert len(made) == 14


def test_weights_of_other_shapes_or_missing_are_left_out_by_name(base, tmp_path):
    folder = tuned(base, tmp_path / "tuned")
    state = load_file(folder / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    state["model.layers.1.mlp.up_proj.weight"] = torch.ones(48, 30)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    [found] = explore(str(base), str(folder))
    assert len(found.weights) == 12
    assert found.left_out["model.layers.0.mlp.up_proj"] == f"not in {folder}"
    assert found.left_out["model.layers.1.mlp.up_proj"] == f"of shape (48, 30) in {folder}, and (48, 32) in the base"


def test_models_that_are_not_of_one_base_are_refused(base, tmp_path):
    gpt2 = text_models.gpt2_folder(tmp_path / "gpt2")
    assert "is a gpt2 model and the base a llama one" in refusal(base, gpt2)
    wide = shutil.copytree(base, tmp_path / "wide")
    state = {
        key: torch.ones(*(2 * n for n in value.shape)) for key, value in load_file(wide / "model.safetensors").items()
    }
    save_file(state, wide / "model.safetensors", metadata={"format": "pt"})
    line = refusal(base, wide)
    assert "has no change of any of model.layers.0.self_attn.q_proj" in line
    assert "of shape (64, 64)" in line
    assert "and 12 more" in line


def test_broken_checkpoints_are_refused_in_one_line(base, tmp_path):
    folder = tuned(base, tmp_path / "tuned")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content in (whole[:-100], whole[:5], b"", b"\x80\x04 pickled"):
        file.write_bytes(content)
        assert f"{file} is not a whole safetensors file" in refusal(base, folder)
    file.unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refusal(base, folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "has pytorch_model.bin, which is pickled and not read" in refusal(base, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    assert "lists 'gone.safetensors', which is not there" in refusal(base, folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../base/x.safetensors"}}))
    assert "which is not there" in refusal(base, folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    assert "model.safetensors.index.json cannot be read" in refusal(base, folder)
    (folder / "config.json").write_text("no json")
    assert "cannot load the model" in refusal(base, folder)


def test_what_is_not_a_number_is_named(base, tmp_path):
    folder = tuned(base, tmp_path / "tuned")
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    line = refusal(base, folder)
    assert f"{folder}: the change of model.layers.1.mlp.up_proj" in line
    assert "holds 1 NaN or Inf" in line


def test_quantized_checkpoints_are_refused(base, tmp_path):
    folder = shutil.copytree(base, tmp_path / "quantized")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "is stored quantized" in refusal(base, folder)


def test_names_that_lead_nowhere(base, tmp_path):
    assert "TUNED='./nothing': no such file or folder" in refusal(base, "./nothing")
    assert "BASE='package://absent/x': the package absent is not installed" in refusal("package://absent/x", base)
    assert "cannot load the model 'nobody/nothing'" in refusal(base, "nobody/nothing")
    with pytest.raises(ExploreError, match="tuned is empty"):
        explore(str(base), [])
    assert "num_directions must be a positive integer; got 0" in refusal(base, base, num_directions=0)
    assert "eps must be positive" in refusal(base, base, eps=0.0)
    assert "device" in refusal(base, base, device="abacus")


MEMORY = """
import resource, sys, time, torch
from peft_tsd.explore import explore
torch.set_num_threads(1)
explore(sys.argv[1], sys.argv[2], modules=["q_proj"])  # what the libraries need, and one weight of each kind
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found, = explore(sys.argv[1], sys.argv[2])
print(len(found.weights), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.long
def test_memory_does_not_grow_with_the_model(tmp_path):
    """120 MB of weights in shards, on either side; a layer and its factors take a few MB."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=512, num_hidden_layers=48, num_attention_heads=4
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base", max_shard_size="20MB")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned", max_shard_size="20MB")
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    assert size > 120e6
    printed = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "base"), str(tmp_path / "tuned")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    weights, grown = map(int, printed.split())
    assert weights == 48 * 7
    assert grown < 40


def test_the_skeleton_has_no_weights(base):
    from transformers import AutoConfig

    model = build(AutoConfig.from_pretrained(base), "base")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_hub_names(base, tmp_path, monkeypatch):
    """Whatever is in the hub's cache is found by its hub name, also without a network."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "adapter")
    sharded = tuned(base, tmp_path / "sharded", max_shard_size="20KB")
    for name, folder in {"base": base, "sharded": sharded, "adapter": tmp_path / "adapter"}.items():
        repository = tmp_path / "hub" / f"models--someone--{name}"
        shutil.copytree(folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    found = explore("someone/base", ["someone/sharded", "someone/adapter"])
    assert [(one.kind, len(one.weights)) for one in found] == [("checkpoint", 14), ("LORA", 2)]
    (tmp_path / "hub" / "models--someone--base" / "snapshots" / ("0" * 40) / "model.safetensors").unlink()
    assert "someone/base has neither model.safetensors nor" in refusal("someone/base", "someone/adapter")
