"""Directions beside another method: the arithmetic, training and export. test_methods.py has every method."""

import copy

import pytest
import torch
from peft import (
    AdaLoraConfig,
    AdamssConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    convert_to_lora,
    get_peft_model,
)
from torch import nn

from peft_tsd import advance, export_lora
from peft_tsd.export.ranks import served_rank
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny
from support.dash import config, logits, trained
from support.layers import LAYERS, One
from support.trainers import losses, trainer

# The arithmetic


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dash_unit", ["one", "sigma"])
def test_layers_of_every_kind(kind, dash_unit):
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    base = One(layer).double()
    inner = (
        LoraConfig(r=2, target_modules=["layer"], use_dora=True)
        if kind == "conv1d"
        else LoHaConfig(r=2, target_modules=["layer"])
    )
    model = trained(inner, steps=0, base=copy.deepcopy(base), dash_unit=dash_unit)
    x = torch.randn(shape, dtype=torch.float64)
    tiny.train(model, 6, inputs=x)
    model.eval()
    made = model.base_model.model.layer
    found = model.directions()["layer"]
    dash = (found.u * found.delta_sigma) @ found.v.mT
    assert dash.abs().max() > 1e-3
    u, sigma, v = reference.svd(made.weight_matrix())
    if dash_unit == "sigma":
        theta = made.dash_scalars["default"].weight.detach()
        torch.testing.assert_close(found.delta_sigma, 20 * theta * torch.from_numpy(sigma)[found.indices])
    torch.testing.assert_close(
        (found.u * found.sigma) @ found.v.mT,
        torch.from_numpy((u[:, found.indices] * sigma[found.indices]) @ v[:, found.indices].T),
        rtol=1e-7,
        atol=1e-9,
    )
    expected = model(x)
    whole = copy.deepcopy(base)
    whole.layer.weight.data += made.like_base(made.learned_change("default") + dash)
    torch.testing.assert_close(expected, whole(x), rtol=1e-6, atol=1e-7)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-7)
    model.unmerge_adapter()
    torch.testing.assert_close(made.get_base_layer().weight, base.layer.weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_of_the_scalars(use_dora):
    torch.manual_seed(0)
    inner = LoraConfig(r=2, target_modules=["layer"], use_dora=use_dora)
    model = trained(inner, steps=0, base=One(nn.Linear(9, 14)).double())
    x, target = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 14, dtype=torch.float64)
    tiny.train(model, 4, inputs=x)
    model.zero_grad()
    (model(x) * target).sum().backward()
    layer, found = model.base_model.model.layer, model.directions()["layer"]
    gradient = target.mT @ x  # of the weight
    along = 20 * (found.u * (gradient @ found.v)).sum(0)
    torch.testing.assert_close(layer.dash_scalars["default"].weight.grad, along, rtol=1e-9, atol=1e-9)
    assert not list(layer.dash_directions.parameters())
    assert all(buffer.grad is None for buffer in layer.dash_directions.buffers())


def test_dora_is_identified_by_its_whole_effective_change():
    model = trained(LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj"], use_dora=True), steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.language_loss(model, 2).backward()
    optimizer.step()
    layers = adapted_layers(model, "default")
    expected = {}
    for name, layer in layers.items():
        w, a, b, m = (
            t.detach().double()
            for t in (
                layer.get_base_layer().weight,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.lora_magnitude_vector["default"].weight,
            )
        )
        turned = w + 5 / 3 * b @ a
        change = m[:, None] * turned / turned.norm(dim=1, keepdim=True) - w
        expected[name] = reference.change_rates(w, change)
        assert abs(expected[name] - reference.change_rates(w, 5 / 3 * b @ a)).max() > 1e-3  # LoRA's alone is another
    assert advance(model, optimizer)
    for name, found in model.directions().items():
        assert found.indices.tolist() == sorted(range(32), key=lambda i, of=expected[name]: -of[i])[:5]


def test_adapters_merged_one_after_the_other_where_the_method_turns_the_whole_weight():
    inner = {"oft_block_size": 8, "target_modules": ["q_proj"]}
    model = get_peft_model(tiny.llama(), config(OFTConfig(**inner)), adapter_name="one")
    tiny.train(model, 6)
    model.add_adapter("two", config(OFTConfig(**inner)))
    model.set_adapter("two")
    tiny.train(model, 6)
    model.eval().base_model.set_adapter(["one", "two"])
    expected = logits(model)
    model.merge_adapter(["one"])
    model.merge_adapter(["two"])
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)


# Training


def test_the_callback_counts_and_resumes_bit_for_bit(tmp_path):
    def model():
        return get_peft_model(tiny.llama(), config(prelaunch_steps=4))

    whole = trainer(tmp_path / "run", model(), save_strategy="steps", save_steps=3)
    whole.train()
    assert whole.model.phase() == "dash"
    for checkpoint in (3, 6):
        again = trainer(tmp_path / "run", model(), save_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{checkpoint}"))
        assert losses(again)[-2:] == losses(whole)[-2:]
        assert torch.equal(logits(again.model.eval()), logits(whole.model.eval()))


@pytest.mark.parametrize("kind", ["adalora", "adamss"])
@pytest.mark.filterwarnings("ignore")
def test_methods_with_calls_of_their_own_are_called_as_ever(kind, tmp_path):
    if kind == "adalora":
        steps = {"tinit": 1, "tfinal": 3, "deltaT": 1, "total_step": 10}
        inner = AdaLoraConfig(init_r=4, target_r=1, target_modules=["q_proj", "v_proj"], **steps)
    else:
        inner = AdamssConfig(r=2, num_subspaces=3, target_modules=["q_proj"], use_asa=True, asa_target_subspaces=2)
    model = get_peft_model(tiny.llama(), config(inner))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for i in range(10):
        tiny.language_loss(model, i).backward()
        optimizer.step()
        model.base_model.update_and_allocate(i)
        optimizer.zero_grad()
        advance(model, optimizer)
    assert model.phase() == "dash"
    model.eval().save_pretrained(tmp_path)
    if kind == "adalora":
        ranks = [sum(of) for of in model.peft_config["default"].rank_pattern.values()]
        assert sum(ranks) == 4 < 4 * 4
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-5)


def test_a_layer_with_nan_is_named_and_nothing_is_changed():
    model = trained(steps=2)
    layer = model.base_model.model.model.layers[1].mlp.down_proj
    layer.hada_w1_a["default"].data.fill_(torch.nan)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.1\.mlp\.down_proj'.*NaN or Inf"):
        advance(model, optimizer)
    assert model.phase() == "pre-launch"


def test_merged_adapters_are_not_identified_nor_exported(tmp_path):
    model = trained(steps=2)
    model.merge_adapter()
    with pytest.raises(
        ValueError, match=r"its adapters \['default'\] are merged into the base weight; call unmerge_adapter\(\) first"
    ):
        advance(model, torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="are merged"):
        export_lora(model, tmp_path / "out")


def test_in_bfloat16_and_under_autocast():
    model = trained(base=tiny.llama().bfloat16())
    layer = next(iter(adapted_layers(model, "default").values()))
    assert {p.dtype for p in (*layer.dash_scalars.parameters(), layer.fixed("default").u)} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16
    expected = logits(model)
    model.merge_adapter()
    assert ((logits(model) - expected).norm() / expected.norm()).item() < 0.05
    model = trained()
    with torch.autocast("cpu", torch.bfloat16):
        assert ((logits(model).float() - expected.float()).norm() / expected.norm()).item() < 0.2


@pytest.mark.long
def test_compiled_with_one_graph_over_the_transition():
    runs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = get_peft_model(tiny.llama(), config(LoraConfig(r=3, target_modules=tiny.LLAMA_TARGETS)))
        wrapped = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        with torch._dynamo.config.patch(error_on_recompile=True):
            runs.append(tiny.train(wrapped, 6))
    torch.testing.assert_close(*runs, rtol=1e-5, atol=1e-6)


# Export


@pytest.mark.parametrize("rank", [None, 2])
def test_export(rank, tmp_path):
    inner = LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = trained(inner)
    report = export_lora(model, tmp_path / "out", rank=rank)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "out")
    lora = {name: module for name, module in loaded.named_modules() if hasattr(module, "lora_A")}
    for name, layer in adapted_layers(model, "default").items():
        u, sigma, vt = torch.linalg.svd(layer.learned_change("default"), full_matrices=False)
        found = model.directions()[name]
        dash = (found.u * found.delta_sigma).double() @ found.v.mT.double()
        kept = (u[:, :rank] * sigma[:rank]) @ vt[:rank] + dash
        got = lora[f"base_model.model.{name}"].get_delta_weight("default")
        torch.testing.assert_close(got.double(), kept, rtol=1e-5, atol=1e-6)
        if rank:
            whole = layer.learned_change("default") + dash
            assert report.errors[name] == pytest.approx(((whole - kept).norm() / whole.norm()).item(), rel=1e-5)
    assert set(report.ranks.values()) == {(2 * 2 if rank is None else rank) + 5}
    assert report.rank == served_rank(max(report.ranks.values()))
    if rank is None:
        assert report.errors == {}
        torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-6)


def test_a_layer_whose_name_ends_that_of_another_is_exported_alone(tmp_path):
    model = trained(LoHaConfig(r=2, target_modules=r"model\.layers\.0\.self_attn\.q_proj"))
    outer = torch.nn.ModuleDict({"model": tiny.llama().model, "inner": tiny.llama()})
    renamed = get_peft_model(outer, config(LoHaConfig(r=2, target_modules=r"model\.layers\.0\.self_attn\.q_proj")))
    renamed.load_state_dict(model.state_dict(), strict=False)
    export_lora(renamed, tmp_path / "out", rank=2)
    fresh = torch.nn.ModuleDict({"model": tiny.llama().model, "inner": tiny.llama()})
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "out")
    layers = [name for name, module in loaded.named_modules() if hasattr(module, "lora_A")]
    assert layers == ["base_model.model.model.layers.0.self_attn.q_proj"]


def test_export_of_a_convolution_and_of_conv1d(tmp_path):
    images = torch.randn(3, 3, 9, 8)
    model = get_peft_model(tiny.ConvNet(), config(LoHaConfig(r=2, target_modules=["first", "second"])))
    tiny.train(model, 6, inputs=images)
    with pytest.raises(ValueError, match="Give rank"):  # as in PEFT, which converts linear layers only
        export_lora(model.eval(), tmp_path / "conv")
    assert max(export_lora(model, tmp_path / "conv", rank=12).errors.values()) < 1e-6
    loaded = PeftModel.from_pretrained(tiny.ConvNet(), tmp_path / "conv")
    torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)
    gpt2 = trained(LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True), base=tiny.gpt2())
    export_lora(gpt2, tmp_path / "gpt2")
    loaded = PeftModel.from_pretrained(tiny.gpt2(), tmp_path / "gpt2")
    torch.testing.assert_close(logits(loaded), logits(gpt2), rtol=1e-4, atol=1e-5)


def test_what_no_lora_holds_is_not_exported(tmp_path):
    oft = trained(OFTConfig(oft_block_size=8, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"OFT makes may be of full rank.*Give rank=.*merge_and_unload"):
        export_lora(oft, tmp_path / "out")
    assert export_lora(oft, tmp_path / "oft", rank=3).rank == 3 + 5
    biased = trained(LoraConfig(r=2, target_modules=["c_attn"], lora_bias=True), base=tiny.gpt2())
    with pytest.raises(ValueError, match=r"LORA has changed biases too \(in transformer\.h\.0\.attn\.c_attn\)"):
        export_lora(biased, tmp_path / "out")
    oft.save_pretrained(tmp_path / "native")
    with pytest.raises(ValueError, match=r"type DASH_OFT, whose change is read on its base model"):
        export_lora(tmp_path / "native", tmp_path / "out")
    broken = trained()
    broken.base_model.model.model.layers[0].self_attn.q_proj.hada_w1_a["default"].data[0] = torch.nan
    with pytest.raises(ValueError, match=r"the change of model\.layers\.0\.self_attn\.q_proj .* NaN or Inf"):
        export_lora(broken, tmp_path / "out")
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        convert_to_lora(trained(), rank=4)  # PEFT's own would drop the directions
    assert not (tmp_path / "out").exists()
