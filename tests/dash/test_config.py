"""`DashConfig`: the configurations of both, in one."""

import copy
import json

import pytest
from peft import (
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import nn

from peft_tsd import DashConfig, TsdConfig
from support import tiny
from support.dash import config
from support.layers import One


def test_the_saved_file_holds_both_configurations(tmp_path):
    inner = LoHaConfig(r=3, target_modules={"v_proj", "q_proj"}, task_type="CAUSAL_LM")
    config(inner, eps=1e-5).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "DASH_LOHA"
    assert written["task_type"] == "CAUSAL_LM"
    assert written["num_directions"] == 5
    assert written["peft"]["peft_type"] == "LOHA"
    assert written["peft"]["target_modules"] == ["q_proj", "v_proj"]
    read = PeftConfig.from_pretrained(str(tmp_path))
    assert type(read) is DashConfig
    assert type(read.peft) is LoHaConfig
    assert (read.eps, read.r, read.target_modules) == (1e-5, 3, {"v_proj", "q_proj"})


def test_fields_of_the_method_are_read_and_set_through_it():
    mine = config()
    assert mine.r == 3
    mine.target_modules = {"q_proj"}
    mine.inference_mode = True
    assert mine.peft.target_modules == {"q_proj"}
    assert mine.peft.inference_mode
    assert copy.deepcopy(mine) == mine
    with pytest.raises(AttributeError, match="nonsense"):
        mine.nonsense  # noqa: B018
    # OFT has an eps of its own.
    oft = get_peft_model(
        tiny.llama(), config(OFTConfig(oft_block_size=8, coft=True, eps=0.25, target_modules=["q_proj"]))
    )
    assert next(m for n, m in oft.named_modules() if n.endswith("oft_R.default")).eps == 0.25
    assert oft.peft_config["default"].eps == 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft": None}, r"peft must be the configuration of a PEFT method, such as LoHaConfig\(...\); got None"),
        (
            {"peft": PromptTuningConfig()},
            "PromptTuningConfig cannot be given directions: it changes what",
        ),
        ({"peft": TsdConfig()}, "TsdConfig cannot be given directions: it is not one of PEFT's own methods"),
        ({"peft": LoraConfig(init_lora_weights="pissa")}, r"TsdConfig\(method='lora-dash', init_lora_weights=...\)"),
        ({"peft": LoraConfig(alora_invocation_tokens=[1])}, r"with alora_invocation_tokens=\[1\], an activated LoRA"),
        ({"prelaunch_steps": -1}, "prelaunch_steps must be the number"),
        (
            {"num_directions": 2.5},
            "num_directions must be a positive integer, the .*; got 2.5",
        ),
        ({"dash_lr_ratio": -1}, "dash_lr_ratio must be a positive, finite number"),
        ({"eps": 0}, "eps must be a positive, finite number"),
        ({"selection": "tds"}, "Did you mean 'tsd'"),
        ({"dash_unit": "x"}, "dash_unit must be one of one, sigma, layer"),
    ],
)
def test_what_is_refused(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        DashConfig(**{"peft": LoHaConfig(), **changes})
    assert "\n" not in str(raised.value)


def test_layers_without_directions_are_refused():
    inner = LoHaConfig(target_modules=["layer"])
    for layer, kind in ((nn.Conv1d(4, 4, 1), "of type Conv1d"), (nn.Conv2d(4, 4, 3, groups=2), "in 2 groups")):
        with pytest.raises(ValueError, match=f"layer cannot be given directions: it is .*{kind}.*exclude_modules"):
            get_peft_model(One(layer), config(inner))
