import itertools
import json
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft import LoHaConfig, LoraConfig, PeftConfig

from peft_tsd import DashConfig, TsdConfig


def test_without_a_prelaunch_the_directions_are_the_gradients_and_with_one_the_papers():
    config = TsdConfig()
    assert (config.method, config.direction_source, config.prelaunch_steps) == ("lora-tsd", "gradient", 0)
    for asked in (100, "auto", 0):
        assert TsdConfig(prelaunch_steps=asked).direction_source == "weight"
    assert TsdConfig(prelaunch_steps=5, direction_source="gradient").direction_source == "gradient"
    for source, steps in ((None, 0), ("weight", None)):
        assert DashConfig(peft=LoHaConfig(), direction_source=source).prelaunch_steps == steps
    assert DashConfig(peft=LoHaConfig(), prelaunch_steps=7).direction_source == "weight"


def test_what_was_saved_before_there_was_a_choice_is_of_the_weight(tmp_path):
    for config in (TsdConfig(), DashConfig(peft=LoHaConfig(target_modules=["q_proj"]))):
        config.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(str(tmp_path)).direction_source == "gradient"
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"direction_source": None, "prelaunch_steps": None}))
        assert PeftConfig.from_pretrained(str(tmp_path)).direction_source == "weight"
        content = json.loads(path.read_text())
        del content["direction_source"]
        path.write_text(json.dumps(content))
        assert PeftConfig.from_pretrained(str(tmp_path)).direction_source == "weight"


def test_with_directions_of_the_weight_defaults_are_the_papers():
    config = TsdConfig(direction_source="weight")
    assert (config.method, config.longest_prelaunch, config.num_directions) == ("lora-tsd", 100, 8)
    assert (config.direction_budget, config.direction_slots, config.check_steps) == ("layer", 8, ())
    assert (config.init_reading, config.dash_lr_ratio, config.eps) == ("svd", 1.0, 1e-6)
    assert isinstance(config, LoraConfig)
    assert config.peft_type == "TSD"


def test_it_survives_saving(tmp_path):
    config = TsdConfig(
        method="lora-dash", r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2}, dash_lr_ratio=50.0, eps=1e-5
    )
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert isinstance(loaded, TsdConfig)
    assert loaded.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"method": "lora-dahs"},
            "method must be one of lora-dash, lora-init, lora-tsd; got 'lora-dahs'. Did you mean",
        ),
        ({"method": None}, "got None"),
        ({"keep_prelaunch": 1}, "keep_prelaunch must be True or False; got 1"),
        ({"init_reading": "SVD"}, "init_reading must be one of svd, orthonormal; got 'SVD'"),
        ({"prelaunch_steps": -1}, "prelaunch_steps must be the number of .*, 0 for none, 'auto', or None .*; got -1"),
        ({"prelaunch_steps": 1.5}, "got 1.5"),
        ({"prelaunch_steps": True}, "got True"),
        ({"prelaunch_steps": "Auto"}, "got 'Auto'"),
        ({"prelaunch_min": 0}, "prelaunch_min must be a positive integer.*got 0"),
        ({"prelaunch_max": 20}, "prelaunch_max=20 is less than prelaunch_min=25"),
        ({"settled_agreement": 0}, "settled_agreement must be a positive, finite number; got 0"),
        ({"settled_agreement": 1.1}, "settled_agreement is a part, at most 1; got 1.1"),
        ({"direction_budget": "model"}, "direction_budget must be one of layer, global; got 'model'"),
        ({"direction_budget": "global", "selection": "top"}, "goes by change rates, and selection='top' does not"),
        ({"max_directions": 16}, "max_directions=16 is for direction_budget='global'.*got direction_budget='layer'"),
        ({"max_directions": 4, "direction_budget": "global"}, "not less than num_directions.*num_directions=8"),
        ({"max_directions": 0, "direction_budget": "global"}, "max_directions must be a positive integer.*got 0"),
        ({"num_directions": -8}, "num_directions must be a positive integer.*got -8"),
        ({"num_directions": True}, "got True"),
        ({"dash_lr_ratio": 0}, "dash_lr_ratio must be a positive, finite number; got 0"),
        ({"dash_lr_ratio": float("nan")}, "got nan"),
        ({"dash_lr_ratio": 10**400}, "dash_lr_ratio must be a positive, finite number; got 1000"),
        ({"dash_unit": "sigmas"}, "dash_unit must be one of one, sigma, layer; got .sigmas.. Did you mean .sigma.?"),
        ({"selection": "last"}, "selection must be one of tsd, top"),
        ({"eps": float("inf")}, "eps must be a positive, finite number; got inf"),
        ({"eps": "1e-6"}, "got '1e-6'"),
        ({"use_dora": True}, r"use_dora=True cannot .*beside DoRA are DashConfig\(peft=LoraConfig\(use_dora=True"),
        ({"alora_invocation_tokens": [1], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens.*no single change"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "target_parameters.*a matrix for each expert; name layers"),
        ({"layer_replication": [(0, 2)]}, "layer_replication.*replicated layers share one weight"),
        ({"use_qalora": True}, "use_qalora.*pools the input"),
        ({"megatron_config": {"a": 1}}, "megatron_config.*only a part of each weight"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' cannot be .*start anew .* use method='lora-dash'"),
        ({"init_lora_weights": "eva", "method": "lora-init"}, "start anew from the .* use method='lora-dash'"),
        ({"init_lora_weights": "mica"}, r"DashConfig\(peft=LoraConfig\(init_lora_weights='mica', ...\)\)"),
        (
            {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}},
            "LoftQ writes a rounded copy",
        ),
        ({"init_lora_weights": "pisa", "method": "lora-dash"}, "cannot be combined with lora-dash: use one of"),
        ({"init_lora_weights": "olora", "method": "lora-dash", "lora_alpha": 0}, "lora_alpha=0 cannot .*='olora'"),
        ({"lora_alpha": 0}, "lora_alpha=0 cannot be combined with lora-tsd and first_step=True"),
        ({"lora_alpha": 0, "prelaunch_steps": 9}, "lora_alpha=0 cannot .* lora-tsd and init_reading='svd'"),
        ({"alpha_pattern": {"q": -1}, "method": "lora-init"}, "lora_alpha=-1 cannot be combined with lora-init"),
    ],
)
def test_what_does_not_make_sense_is_refused_when_it_is_built(changes, message):
    with pytest.raises(ValueError, match=message):
        TsdConfig(**changes)


@pytest.mark.parametrize("name", ["velora_config", "monteclora_config", "use_bdlora", "arrow_config", "kasa_config"])
def test_the_other_lora_variants_are_refused(name):
    from peft.tuners.lora import config as lora_config

    kind = {"velora_config": "Velora", "monteclora_config": "Monteclora", "use_bdlora": "BdLora"}
    kind |= {"arrow_config": "Arrow", "kasa_config": "Kasa"}
    with pytest.raises(ValueError, match=f"{name}=.*cannot be combined with lora-tsd"):
        TsdConfig(**{name: getattr(lora_config, kind[name] + "Config")()})


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal"},
        {"lora_alpha": 0, "init_reading": "orthonormal", "prelaunch_steps": 9},
        {"lora_alpha": 0, "first_step": False},
        {"lora_alpha": 0, "method": "lora-dash"},
        {"lora_bias": True},
        {"target_modules": "all-linear"},
        {"trainable_token_indices": [1]},
    ],
)
def test_what_makes_sense_is_kept(changes):
    config = TsdConfig(**changes)
    for name, value in changes.items():
        assert getattr(config, name) == value


def test_what_was_saved_before_there_was_a_choice_dropped_what_pre_launch_learned(tmp_path):
    TsdConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(str(tmp_path)).keep_prelaunch is True
    path = tmp_path / "adapter_config.json"
    content = json.loads(path.read_text())
    del content["keep_prelaunch"]
    path.write_text(json.dumps(content))
    for kind in (PeftConfig, TsdConfig):
        assert kind.from_pretrained(str(tmp_path)).keep_prelaunch is False


def test_each_method_says_what_it_does():
    told = {m: TsdConfig(method=m) for m in ("lora-dash", "lora-init", "lora-tsd")}
    assert [c.learns_along_directions for c in told.values()] == [True, False, True]
    assert [c.starts_from_directions for c in told.values()] == [False, True, True]
    assert not any(c.keeps_prelaunch for c in told.values())
    told = {m: TsdConfig(method=m, prelaunch_steps=9) for m in told}
    assert [c.keeps_prelaunch for c in told.values()] == [False, True, True]
    assert not TsdConfig(prelaunch_steps=0).keeps_prelaunch


@given(st.integers(1, 300), st.integers(0, 1000))
def test_checks_of_an_automatic_prelaunch(shortest, more):
    """One before the earliest end, one at it, then each a quarter further on; none at the end."""
    config = TsdConfig(prelaunch_steps="auto", prelaunch_min=shortest, prelaunch_max=shortest + more)
    steps = config.check_steps
    assert config.longest_prelaunch == shortest + more
    assert list(steps) == sorted(set(steps))
    assert all(1 <= step < shortest + more for step in steps)
    assert (shortest in steps) == (more > 0)
    for before, after in itertools.pairwise(steps):
        assert after >= 1.25 * before or after == shortest
        assert after <= 1.25 * before + 1.25


def test_slots_of_a_budget():
    config = partial(TsdConfig, direction_source="weight", direction_budget="global", num_directions=3)
    assert config().direction_slots == 12
    assert config(max_directions=5).direction_slots == 5
