"""One way to open an adapter: nothing of a damaged or hostile one is built, and what was there stays as it was."""

import json
import warnings
from dataclasses import fields

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from harness import hostile
from harness.drawn import Drawn
from peft_tsd import AdapterError, TsdConfig, check_adapter
from peft_tsd.tuner.opening import load_adapter, read_adapter
from support import tiny

CONFIGS = {
    "TSD": lambda: tiny.config(target_modules=["q_proj"], rank_pattern={"layers.0.*": 2}),
    "LORA": lambda: LoraConfig(r=3, target_modules=["q_proj"]),
    "LOHA": lambda: LoHaConfig(r=3, target_modules=["q_proj"]),
}


def saved(kind, folder):
    model = get_peft_model(tiny.llama(), CONFIGS[kind]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ("lora" in name or "hada" in name):
                parameter.normal_(std=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)
    return model.eval()


def output(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_whole_one_is_loaded(kind, tmp_path):
    model = saved(kind, tmp_path)
    torch.testing.assert_close(output(load_adapter(tiny.llama(), tmp_path, "base")), output(model))
    config, state = read_adapter(tmp_path)
    assert config == check_adapter(tmp_path)
    assert state.keys() == load_file(tmp_path / "adapter_model.safetensors").keys()
    assert (
        load_adapter(tiny.llama(), tmp_path, "base", is_trainable=True).peft_config["default"].inference_mode is False
    )


@pytest.mark.parametrize("kind", ["TSD", "LORA"])
def test_what_does_not_fit_changes_nothing(kind, tmp_path):
    saved(kind, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    whole = load_file(path)
    key = next(key for key in whole if "layers.1" in key and key.endswith("q_proj.lora_B.weight"))
    base = tiny.llama()
    names = [name for name, _ in base.named_modules()]

    def refused(state, message):
        save_file(state, path)
        with pytest.raises(AdapterError, match=message):
            load_adapter(base, tmp_path, "my base")
        assert [name for name, _ in base.named_modules()] == names

    refused(whole | {key: torch.full_like(whole[key], torch.nan)}, "holds NaN")
    layer = key.removesuffix("lora_B.weight")
    refused({name: x for name, x in whole.items() if not name.startswith(layer)}, "it lacks")
    renamed = {name.replace("layers.1", "layers.7"): x for name, x in whole.items()}
    refused(renamed, "it lacks|has no place")
    if kind == "LORA":
        refused(whole | {key: whole[key][:-1].clone()}, r"is of shape \(31, 3\), and should be \(32, 3\)")
    path.write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="is damaged or not an adapter"):
        read_adapter(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    found = []
    for kind in ("TSD", "LORA"):
        folder = tmp_path_factory.mktemp(kind)
        saved(kind, folder)
        content = json.loads((folder / "adapter_config.json").read_text())
        found.append((content, (folder / "adapter_model.safetensors").read_bytes()))
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("changed")


@pytest.mark.long
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_hostile_files(data, whole, place):
    choices = Drawn(data)
    hostile.change_adapter(choices, place, *hostile.pick(choices, whole), [field.name for field in fields(TsdConfig)])
    base: nn.Module = tiny.llama()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load_adapter(base, place, "base")
    except AdapterError as error:
        hostile.assert_one_line(error)
        assert not any(hasattr(module, "lora_A") for module in base.modules())
    else:
        assert isinstance(loaded, PeftModel)
