"""Adapters whose files are damaged, or made to do harm: refused in one line, before anything is built from them."""

import json
import os
import pickle
import shutil
import struct
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from harness import hostile
from harness.drawn import Drawn
from peft_tsd import TsdConfig, export_lora
from peft_tsd.errors import AdapterError
from peft_tsd.files.adapters import find_adapter
from peft_tsd.tuner.checking import check_adapter, check_fits, check_onto
from peft_tsd.tuner.directed import DirectedLayer
from support import tiny

LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an adapter past its transition."""
    model = get_peft_model(tiny.llama(), tiny.config("lora-tsd", target_modules=["q_proj"]))
    tiny.train(model, 4)
    path = tmp_path_factory.mktemp("adapter") / "whole"
    model.save_pretrained(path)
    return path


@pytest.fixture
def adapter(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "adapter")


def refusal(adapter: Path) -> str:
    with pytest.raises(AdapterError) as caught:
        check_adapter(adapter)
    hostile.assert_one_line(caught.value)
    out = adapter.parent / "out"
    with pytest.raises(ValueError, match="."):
        export_lora(adapter, out)
    assert not out.exists()
    config = adapter / "adapter_config.json"
    if config.is_file() and b'"peft_type": "TSD"' in config.read_bytes():
        base = tiny.llama()
        with pytest.raises(AdapterError) as loading:
            PeftModel.from_pretrained(base, adapter)
        assert str(loading.value) == str(caught.value)
        assert not any(isinstance(module, DirectedLayer) for module in base.modules())
    return str(caught.value)


def set_config(adapter: Path, **values) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def set_tensors(adapter: Path, **tensors) -> None:
    path = adapter / "adapter_model.safetensors"
    state = {**load_file(path), **{f"{LAYER}.{key}": tensor for key, tensor in tensors.items()}}
    save_file({key: tensor for key, tensor in state.items() if tensor is not None}, path)


def test_every_adapter_that_was_saved_passes(trained, tmp_path):
    trained.save_pretrained(tmp_path)
    assert check_adapter(tmp_path).to_dict() == PeftConfig.from_pretrained(tmp_path).to_dict()
    check_fits(tmp_path, trained, "default")
    with torch.device("meta"):
        check_onto(tmp_path, trained.peft_config["default"], tiny.llama(), "base")


@pytest.mark.parametrize("layers", [["first", "second", "head"], ["second"]])
def test_convolutions_pass(layers, tmp_path):
    model = get_peft_model(
        tiny.ConvNet(), tiny.config(r=2, target_modules=layers, modules_to_save=["head"][len(layers) > 1 :])
    )
    tiny.train(model, 4, inputs=torch.randn(2, 3, 8, 8))
    model.save_pretrained(tmp_path)
    check_adapter(tmp_path)
    check_fits(tmp_path, model, "default")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 10**9}, "says r=1000000000"),
        ({"r": 3}, "says r=3"),
        ({"r": "4"}, "its r is '4'"),
        ({"r": True}, "its r is True"),
        ({"rank_pattern": {"q_proj": 10**9}}, "says r=1000000000"),
        ({"rank_pattern": {"(": 4}}, "no regular expression"),
        ({"lora_alpha": 10**400}, "cannot be used"),
        ({"lora_dropout": 2}, "its lora_dropout is 2"),
        ({"target_modules": ["q_proj", 3]}, "its target_modules is"),
        ({"method": "lora-tds"}, "lora-tds"),
        ({"num_directions": 10**9}, "not of shape \\(1000000000,\\)"),
        ({"num_directions": "many"}, "num_directions must be"),
        ({"peft_type": "TDS"}, "its peft_type is 'TDS'"),
        ({"peft_type": ["TSD"]}, "its peft_type is"),
        ({"eps": float("nan")}, "it holds NaN"),
        ({"use_dora": True}, "use_dora"),
    ],
)
def test_a_configuration_that_says_something_else_is_refused(adapter, values, message):
    set_config(adapter, **values)
    with pytest.raises(AdapterError, match=message):
        check_adapter(adapter)
    refusal(adapter)


@pytest.mark.parametrize("text", [b"", b"[]", b"[" * 100_000, b"{", b"\xff\xfe", b'{"peft_type": "TSD", "r": 1e999}'])
def test_a_configuration_that_is_none_is_refused(adapter, text):
    (adapter / "adapter_config.json").write_bytes(text)
    assert "cannot be used" in refusal(adapter)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_A.weight": torch.full((4, 32), torch.nan)}, "lora_A.weight holds NaN or Inf"),
        ({"lora_directions.u": torch.full((32, 5), torch.inf)}, "lora_directions.u holds NaN or Inf"),
        ({"lora_B.weight": torch.ones(32, 5)}, "'lora_B.weight' of layer"),
        ({"lora_A.weight": torch.ones(4)}, "lora_A.weight is of shape (4,)"),
        ({"lora_A.weight": torch.ones(4, 32, dtype=torch.int64)}, "lora_A.weight is torch.int64"),
        ({"lora_directions.indices": torch.zeros(5)}, "'lora_directions.indices' of layer"),
        ({"lora_directions.indices": torch.tensor([3, 3, 1, 0, 2])}, "lora_directions.indices holds [3, 3, 1, 0, 2]"),
        ({"lora_directions.indices": torch.tensor([3, 32, 1, 0, 2])}, "indices holds"),
        ({"lora_directions.indices": torch.tensor([3, -1, 1, 0, 2])}, "indices holds"),
        ({"lora_directions.indices": torch.full((5,), -1)}, "indices holds [-1, -1, -1, -1, -1]"),
        ({"lora_directions.identified_at": torch.tensor([-1])}, "differ in their phase"),
        ({"lora_directions.step": torch.tensor([-4])}, "step holds [-4]"),
        ({"lora_directions.step": torch.tensor([3])}, "differ in their step"),
        ({"lora_dash.weight": None}, "lacks 'lora_dash.weight'"),
        ({"lora_A.weight": None}, "lacks 'lora_A.weight'"),
        ({"lora_magnitude": torch.ones(3)}, "has 'lora_magnitude', which has no place"),
        ({"../../x": torch.ones(3)}, "a tensor with the name"),
        ({"__class__": torch.ones(3)}, "a tensor with the name"),
    ],
)
def test_tensors_that_no_training_leaves_are_refused(adapter, tensors, message):
    set_tensors(adapter, **tensors)
    assert message in refusal(adapter)


def test_a_damaged_file_is_refused(adapter):
    path = adapter / "adapter_model.safetensors"
    content = path.read_bytes()
    huge = struct.pack("<Q", 2**60) + content[8:]
    for damaged in (b"", content[:7], content[:500], content[:-1], content + b"x", huge, pickle.dumps(print)):
        path.write_bytes(damaged)
        assert "is damaged or not an adapter" in refusal(adapter)


def test_pickles_links_and_folders_are_refused(adapter, tmp_path):
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    elsewhere = tmp_path / "elsewhere"
    for path in (weights, config):
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        assert "is a link out of its folder" in refusal(adapter)
        path.unlink()
        path.symlink_to("../elsewhere")
        assert "is a link out of its folder" in refusal(adapter)
        path.unlink()
        path.mkdir()
        assert f"has no {path.name}" in refusal(adapter)
        path.rmdir()
        os.rename(elsewhere, path)
    weights.rename(adapter / "adapter_model.bin")
    assert "adapter_model.bin, which is pickled and not read" in refusal(adapter)
    with pytest.raises(AdapterError, match="cannot be fetched"):
        find_adapter("nobody/has-this")


def test_the_links_of_the_hubs_cache_are_followed(whole, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(whole / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert isinstance(check_adapter(snapshot), TsdConfig)


def test_an_adapter_of_another_base_is_refused(adapter):
    config = check_adapter(adapter)
    base = tiny.llama().config
    for change, message in (
        ({"hidden_size": 64}, r"q_proj.lora_A.weight is of shape \(4, 32\), and should be \(4, 64\)"),
        ({"num_hidden_layers": 3}, "it lacks model.layers.2.self_attn.q_proj"),
        ({"num_hidden_layers": 1}, "the model has no place for its model.layers.1.self_attn.q_proj"),
    ):
        with torch.device("meta"):
            other = type(tiny.llama())(type(base)(**{**base.to_dict(), **change}))
        with pytest.raises(AdapterError, match=message):
            check_onto(adapter, config, other, "other")


def test_a_rank_of_a_layer_that_is_not_in_the_file_takes_no_memory(adapter):
    """On the base, a target that the file has no tensor of would be built as the configuration says."""
    set_config(adapter, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 10**9}, method="lora-dash")
    set_config(adapter, init_lora_weights=True)
    path = adapter / "adapter_model.safetensors"
    save_file(
        {k: t for k, t in load_file(path).items() if not k.endswith(("to_unit", "taken", "kept_a", "kept_b"))}, path
    )
    config = check_adapter(adapter)
    with torch.device("meta"):
        base = tiny.llama()
    with pytest.raises(AdapterError, match="it lacks model.layers.0.self_attn.v_proj"):
        check_onto(adapter, config, base, "base")


@pytest.mark.long
@settings(max_examples=100)
@given(st.data())
def test_whatever_an_adapter_holds_it_is_used_or_refused_in_one_line(tmp_path_factory, whole, data):
    folder = tmp_path_factory.mktemp("hostile")
    config = json.loads((whole / "adapter_config.json").read_text())
    weights = (whole / "adapter_model.safetensors").read_bytes()
    known = [field.name for field in fields(TsdConfig)]
    hostile.change_adapter(Drawn(data), folder, config, weights, known)
    try:
        found = check_adapter(folder)
        with torch.device("meta"):
            base = tiny.llama()
        check_onto(folder, found, base, "base")
        if isinstance(found, TsdConfig):
            export_lora(folder, folder / "out")
    except ValueError as error:
        hostile.assert_one_line(error)


def test_a_plain_lora_passes_too(tmp_path):
    model = get_peft_model(tiny.llama(), LoraConfig(r=3, target_modules=["q_proj"], rank_pattern={"layers.0.*": 2}))
    model.save_pretrained(tmp_path)
    check_fits(tmp_path, model, "default")
    assert check_adapter(tmp_path).r == 3
