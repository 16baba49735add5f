import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_tsd import export_lora
from peft_tsd.export.factors import truncate
from peft_tsd.export.ranks import served_rank
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny
from support.versions import needs_add_adapter


def outputs(model, inputs=None):
    with torch.no_grad():
        out = model(tiny.tokens() if inputs is None else inputs)
    return getattr(out, "logits", out)


def assert_same(a, b):
    assert ((a - b).norm() / b.norm()).item() <= 1e-5


def rank_of(path):
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    return config["r"], config["lora_alpha"]


EXACT_RANK = {
    "lora-dash": {"svd": 4 + 5, "orthonormal": 4 + 5},
    "lora-init": {"svd": 4 + 4, "orthonormal": 4},
    "lora-tsd": {"svd": 4 + max(4, 5), "orthonormal": 4 + 5},
}


def test_the_export_is_exact_from_the_model_and_from_the_folder(trained, tmp_path):
    trained.save_pretrained(tmp_path / "native")
    reports = [export_lora(trained, tmp_path / "a"), export_lora(tmp_path / "native", tmp_path / "b")]
    config = trained.peft_config["default"]
    needed = EXACT_RANK[config.method][config.init_reading] + 4 * config.keeps_prelaunch
    rank = served_rank(needed)
    filled = f" (of which it needs {needed}; filled up with zeros)" if needed < rank else ""
    for report in reports:
        assert report.rank == rank
        assert set(report.ranks.values()) == {needed}
        assert report.errors == {}
        assert str(report) == f"plain LoRA of rank {rank}{filled}, exact: {report.path}"
        assert rank_of(report.path) == (rank, rank)
        assert_same(outputs(PeftModel.from_pretrained(tiny.llama(), report.path)), outputs(trained))
    a, b = (load_file(report.path / "adapter_model.safetensors") for report in reports)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("unit", ["sigma", "layer"])
def test_what_the_changes_are_measured_in_is_exported_with_them(unit, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(dash_unit=unit, dash_lr_ratio=2.0))
    tiny.train(model, 8)
    for name, layer in adapted_layers(model, "default").items():
        torch.testing.assert_close(
            layer.get_delta_weight("default").double(), reference.effective_change(layer), rtol=1e-4, atol=1e-6
        )
        assert layer.delta_sigma("default").abs().min() > 0, name
    model.save_pretrained(tmp_path / "native")
    again = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native")
    assert torch.equal(outputs(again), outputs(model))
    for source in (model, tmp_path / "native"):
        report = export_lora(source, tmp_path / f"out-{source is model}")
        assert_same(outputs(PeftModel.from_pretrained(tiny.llama(), report.path)), outputs(model))


@pytest.mark.long
def test_it_loads_where_this_package_is_not_installed(tmp_path):
    trained = get_peft_model(tiny.llama(), tiny.config())
    tiny.train(trained, 6)
    tiny.llama().save_pretrained(tmp_path / "base")
    export_lora(trained, tmp_path / "lora")
    code = f"""
import sys
sys.modules["peft_tsd"] = None  # any import of it fails
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained({str(tmp_path / "base")!r})
model = PeftModel.from_pretrained(base, {str(tmp_path / "lora")!r}).eval()
ids = torch.tensor({tiny.tokens().tolist()})
torch.save(model(ids).logits.detach(), {str(tmp_path / "out.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), outputs(trained.eval()))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"v_proj": 2, "layers.1.mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 3}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "lora_only"},
        {"target_modules": "all-linear"},
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
    ],
    ids=str,
)
def test_what_lora_config_offers_is_exported_too(changes, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(**changes))
    tiny.train(model, 6)
    model.eval()
    export_lora(model, tmp_path / "out")
    assert_same(outputs(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")), outputs(model))


def test_conv1d_convolutions_and_their_bias(tmp_path):
    model = get_peft_model(tiny.gpt2(), tiny.config(target_modules=["c_attn", "c_fc"]))
    tiny.train(model, 6)
    export_lora(model.eval(), tmp_path / "gpt2")
    assert_same(outputs(PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "gpt2")), outputs(model))

    images = torch.randn(3, 3, 9, 8)
    model = get_peft_model(
        tiny.ConvNet(),
        tiny.config(target_modules=["first", "second", "head"], rank_pattern={"head": 3}, lora_bias=True),
    )
    tiny.train(model, 6, inputs=images)
    export_lora(model.eval(), tmp_path / "conv")
    assert_same(outputs(PeftModel.from_pretrained(tiny.ConvNet(), tmp_path / "conv"), images), outputs(model, images))


def test_in_pre_launch_it_is_the_lora_it_is(method, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(**method))
    tiny.train(model, 2)
    report = export_lora(model.eval(), tmp_path / "out")
    assert (report.rank, set(report.ranks.values())) == (8, {4})
    assert_same(outputs(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")), outputs(model))


@needs_add_adapter
def test_an_adapter_injected_without_a_peft_model(tmp_path):
    model = tiny.llama()
    model.add_adapter(tiny.config())
    tiny.train(model, 6)
    model.eval()
    export_lora(model, tmp_path / "out")
    assert_same(outputs(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")), outputs(model))


def test_one_of_several_adapters(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(), adapter_name="one")
    tiny.train(model, 6)
    model.add_adapter("two", tiny.config("lora-dash"))
    expected = outputs(model.eval())
    model.set_adapter("two")
    export_lora(model, tmp_path / "out", adapter_name="one")
    assert_same(outputs(PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")), expected)


@given(st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(1, 12), st.integers(0, 10**6))
def test_compression_is_the_truncated_svd_of_the_dense_change(inner, out, into, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(inner, into, generator=generator), torch.randn(out, inner, generator=generator)
    new_a, new_b, error = truncate(a, b, rank)
    dense = b.double() @ a.double()
    u, sigma, v = reference.svd(dense)
    best = torch.from_numpy((u[:, :rank] * sigma[:rank]) @ v[:, :rank].T)
    torch.testing.assert_close(new_b.double() @ new_a.double(), best, rtol=1e-5, atol=1e-5)
    expected = ((dense - best).norm() / dense.norm()).item()
    assert error == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert new_a.shape[0] == min(rank, inner, out, into)


def test_compression_reports_the_error_of_each_layer(trained, tmp_path):
    report = export_lora(trained, tmp_path / "out", rank=3)
    assert (report.rank, set(report.ranks.values())) == (8, {3})
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    layers = {n.removeprefix("base_model.model."): m for n, m in trained.named_modules() if hasattr(m, "lora_dash")}
    small = {n.removeprefix("base_model.model."): m for n, m in loaded.named_modules() if hasattr(m, "lora_A")}
    assert report.errors.keys() == layers.keys()
    for name, error in report.errors.items():
        exact = reference.effective_change(layers[name])
        got = small[name].get_delta_weight("default").double()
        assert error == pytest.approx(((exact - got).norm() / exact.norm()).item(), rel=1e-3, abs=1e-6)
    assert "relative error of the change: mean" in str(report)
    wide = export_lora(trained, tmp_path / "wide", rank=64)
    assert max(wide.errors.values()) < 1e-6


def test_compressing_an_untrained_adapter_has_no_error(tmp_path):
    report = export_lora(get_peft_model(tiny.llama(), tiny.config()), tmp_path / "out", rank=2)
    assert set(report.errors.values()) == {0.0}


def test_nothing_is_overwritten(trained, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="out exists and is not overwritten"):
        export_lora(trained, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


def test_a_failed_write_leaves_nothing(trained, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("peft_tsd.export.lora.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        export_lora(trained, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank", [0, -1, 2.0, True])
def test_a_bad_rank(trained, tmp_path, rank):
    with pytest.raises(
        ValueError, match=f"rank must be a positive integer, or None for an exact export; got {rank!r}"
    ):
        export_lora(trained, tmp_path / "out", rank=rank)


def test_what_is_not_a_tsd_adapter(tmp_path):
    lora = get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Adapter 'default' is an adapter of type LORA, not of type TSD"):
        export_lora(lora, tmp_path / "out")
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="lora is an adapter of type LORA"):
        export_lora(tmp_path / "lora", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no adapter 'other'; it has \['default'\]"):
        export_lora(lora, tmp_path / "out", adapter_name="other")


def test_a_damaged_adapter(trained, tmp_path):
    trained.save_pretrained(tmp_path / "native")
    file = tmp_path / "native" / "adapter_model.safetensors"
    whole = {key: value.clone() for key, value in load_file(file).items()}  # some releases map the file
    layer = "base_model.model.model.layers.0.self_attn.q_proj"

    def refuse(message, **changes):
        state = {**whole, **{f"{layer}.{key}": value for key, value in changes.items()}}
        save_file({key: value for key, value in state.items() if value is not None}, file)
        with pytest.raises(ValueError, match=message):
            export_lora(tmp_path / "native", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refuse("layer '.*layers.0.*q_proj' lacks 'lora_directions.indices'", **{"lora_directions.indices": None})
    refuse(
        "layers.0.self_attn.q_proj.lora_B.weight holds NaN or Inf", **{"lora_B.weight": torch.full((32, 4), torch.nan)}
    )
    if trained.peft_config["default"].learns_along_directions:
        refuse(r"'lora_dash.weight' of layer .*q_proj' is of shape \(6,\)", **{"lora_dash.weight": torch.ones(6)})
    refuse(r"'lora_B.weight' of layer .*q_proj' is of shape \(32, 3\)", **{"lora_B.weight": torch.ones(32, 3)})
    save_file({"base_model.model.score.weight": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="has no LoRA layer"):
        export_lora(tmp_path / "native", tmp_path / "out")
