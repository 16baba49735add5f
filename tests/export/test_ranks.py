"""Every layer of an export has one rank and scaling 1, so that each kind of server computes what PEFT computes."""

import json

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from peft_tsd import AdapterError, DashConfig, TsdConfig, check_adapter, export_lora
from peft_tsd.export.ranks import served_rank
from peft_tsd.tuner.phase import adapted_layers
from support import tiny


class Flux(nn.Module):
    """As in Flux, one layer's name is the end of others'."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.single_blocks = nn.ModuleList(nn.ModuleDict({"proj_out": nn.Linear(24, 24)}) for _ in range(2))
        self.proj_out = nn.Linear(24, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.single_blocks:
            x = block["proj_out"](x).tanh()
        return self.proj_out(x)


def unequal(changes):
    model = get_peft_model(tiny.llama(), tiny.config(**changes))
    tiny.train(model, 6)
    return model.eval()


UNEQUAL = {
    "rank_pattern": {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}},
    "alpha_pattern": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 7}},
    "rslora": {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "budget": {"method": "lora-dash", "direction_budget": "global", "num_directions": 3, "max_directions": 9},
}


@pytest.mark.parametrize("rank", [None, 5], ids=["exact", "compressed"])
@pytest.mark.parametrize("changes", UNEQUAL.values(), ids=UNEQUAL)
def test_one_rank_scaling_one_and_no_patterns(changes, rank, tmp_path):
    model = unequal(changes)
    report = export_lora(model, tmp_path / "out", rank=rank)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a = {key.removesuffix(".lora_A.weight"): x for key, x in state.items() if key.endswith(".lora_A.weight")}
    b = {key.removesuffix(".lora_B.weight"): x for key, x in state.items() if key.endswith(".lora_B.weight")}
    assert {x.shape[0] for x in a.values()} == {x.shape[1] for x in b.values()} == {report.rank}
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (report.rank, report.rank, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert report.rank == served_rank(max(report.ranks.values()))
    if rank is None:
        assert len(set(report.ranks.values())) > 1
        assert f"it needs {min(report.ranks.values())} to {max(report.ranks.values())}, by layer" in str(report)
        for name, layer in adapted_layers(model, "default").items():
            # What llama.cpp computes: lora_alpha over the tensor's own rank, and no pattern.
            key = f"base_model.model.{name}"
            served = config["lora_alpha"] / a[key].shape[0] * b[key] @ a[key]
            torch.testing.assert_close(served, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    check_adapter(tmp_path / "out")


def test_ranks_that_servers_take():
    assert [served_rank(rank) for rank in (1, 4, 8, 9, 12, 16, 17, 24, 32, 33, 40, 64)] == [
        8, 8, 8, 16, 16, 16, 32, 32, 32, 48, 48, 64,
    ]  # fmt: skip


def test_a_rank_that_is_asked_for_is_had(tmp_path):
    """For servers that want 16 where 8 would do."""
    model = unequal({"method": "lora-init", "init_reading": "orthonormal", "keep_prelaunch": False})
    assert export_lora(model, tmp_path / "8").rank == 8
    report = export_lora(model, tmp_path / "16", rank=16)
    assert (report.rank, set(report.ranks.values())) == (16, {4})
    assert max(report.errors.values()) < 1e-6


@pytest.mark.parametrize("kind", ["tsd", "dash"])
def test_a_layer_whose_name_ends_that_of_others(kind, tmp_path):
    if kind == "tsd":
        config = TsdConfig(
            r=4, num_directions=4, prelaunch_steps=2, target_modules=["proj_out"], rank_pattern={"^proj_out": 2}
        )
    else:
        inner = LoHaConfig(r=2, target_modules=["proj_out"], rank_pattern={"^proj_out": 1})
        config = DashConfig(peft=inner, num_directions=4, prelaunch_steps=2)
    model = get_peft_model(Flux(), config)
    x = torch.randn(9, 24)
    tiny.train(model, 5, inputs=x)
    model.eval().save_pretrained(tmp_path / "native")
    report = export_lora(model, tmp_path / "out")
    check_adapter(tmp_path / "native")
    check_adapter(tmp_path / "out")
    assert len(set(report.ranks.values())) == 2
    loaded = PeftModel.from_pretrained(Flux(), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-6)


def test_exports_made_before_still_load(tmp_path):
    """Layers of unequal rank, said in patterns."""
    model = get_peft_model(
        tiny.llama(), LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj"], rank_pattern={"layers.0.*": 2})
    )
    model.save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "adapter_config.json").read_text())
    config["alpha_pattern"] = config["rank_pattern"]
    (tmp_path / "old" / "adapter_config.json").write_text(json.dumps(config))
    check_adapter(tmp_path / "old")
    PeftModel.from_pretrained(tiny.llama(), tmp_path / "old")


def test_a_pattern_that_takes_more_than_its_layer_is_named(tmp_path):
    """As exports made before wrote them: PEFT takes the name for the end of others, and cannot load the file."""
    config = LoraConfig(r=4, target_modules=["proj_out"], rank_pattern={"^proj_out": 2})
    get_peft_model(Flux(), config).save_pretrained(tmp_path / "old")
    path = tmp_path / "old" / "adapter_config.json"
    path.write_text(path.read_text().replace('"^proj_out"', '"proj_out"'))
    with pytest.raises(AdapterError, match=r"rank_pattern gives 'single_blocks.0.proj_out' .* '\^proj_out'"):
        check_adapter(tmp_path / "old")
    # The tensors are whole: the remedy that the message names.
    path.write_text(path.read_text().replace('"proj_out": 2', '"^proj_out": 2'))
    check_adapter(tmp_path / "old")
    state = load_file(tmp_path / "old" / "adapter_model.safetensors")
    key = next(key for key in state if key.endswith("0.proj_out.lora_A.weight"))
    save_file(state | {key: state[key][:3].clone()}, tmp_path / "old" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="is of shape .* and its configuration says r=4"):
        check_adapter(tmp_path / "old")
