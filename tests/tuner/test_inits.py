"""LoRA-Dash from the starts that LoraConfig offers, against PEFT's own LoRA and dense arithmetic."""

import copy
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora.config import CordaConfig, EvaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga

from peft_tsd import DashConfig, TsdConfig, advance, export_lora
from peft_tsd.explore import explore
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny

SETTINGS = {"r": 4, "lora_alpha": 8, "target_modules": tiny.LLAMA_TARGETS}

STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa-rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "pissa-fast": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora"},
    "corda": {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")},
    "lora_ga": {"init_lora_weights": "lora_ga", "lora_ga_config": LoraGAConfig()},
}


def leave_what_corda_needs(base, config) -> None:
    """What preprocess_corda (whose module needs the package attrs) leaves in each layer: of the SVD of W C, with C the
    covariance of the layer's input, the first r directions, the right ones times C⁻¹."""
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in config.target_modules:
            root = torch.randn(module.in_features, 2 * module.in_features)
            covariance = root @ root.mT / root.shape[1]
            u, s, vt = torch.linalg.svd(module.weight.data @ covariance, full_matrices=False)
            v = torch.linalg.solve(covariance, vt.mT)
            module.eigens = SimpleNamespace(U_WC=u[:, : config.r], S_WC=s[: config.r], V_WC=v[:, : config.r])


def made(config, base=None):
    """What PEFT wants done before and after get_peft_model."""
    base = base or tiny.llama()
    torch.manual_seed(7)
    if config.init_lora_weights == "corda":
        leave_what_corda_needs(base, config)
    if config.init_lora_weights == "lora_ga":
        preprocess_loraga(base, config, lambda: tiny.language_loss(base, 0).backward())
        base.zero_grad()
    torch.manual_seed(7)
    return get_peft_model(base, config)


def dash(**changes) -> TsdConfig:
    return tiny.config("lora-dash", **changes)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


@pytest.fixture(params=STARTS)
def start(request) -> dict:
    return copy.deepcopy(STARTS[request.param])


@pytest.mark.filterwarnings("ignore")
def test_pre_launch_is_pefts_own_training_from_that_start(start):
    """A and B as with LoraConfig; but the base weight stays what it was."""
    base = tiny.llama()
    model, lora = made(dash(**start), base), made(LoraConfig(**SETTINGS, **start))
    for name, layer in adapted_layers(model, "default").items():
        theirs = lora.base_model.model.get_submodule(name)
        assert torch.equal(layer.lora_A["default"].weight, theirs.lora_A["default"].weight)
        assert torch.equal(layer.lora_B["default"].weight, theirs.lora_B["default"].weight)
        assert layer.lora_B["default"].weight.abs().max() > 0
        assert torch.equal(layer.get_base_layer().weight, tiny.llama().get_submodule(name).weight)
    torch.testing.assert_close(logits(model), logits(tiny.llama()), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), logits(lora), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for i in range(3):
        loss = tiny.language_loss(lora, i)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert tiny.train(model, 3) == pytest.approx(losses, rel=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_directions_output_and_export_are_the_dense_ones(start, tmp_path):
    model = made(dash(**start))
    layers = adapted_layers(model, "default")

    def products() -> dict[str, torch.Tensor]:
        with torch.no_grad():
            return {
                name: layer.scaling["default"]
                * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())
                for name, layer in layers.items()
            }

    first = products()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for i in range(6):
        tiny.language_loss(model, i).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i == 2:
            at_transition = products()
        assert advance(model, optimizer) == (i == 2)
    last = products()
    model.eval()
    dense = tiny.llama().double()
    for name, found in model.directions().items():
        weight = tiny.llama().get_submodule(name).weight
        rates = reference.change_rates(weight, at_transition[name] - first[name])
        expected = sorted(range(len(rates)), key=lambda i, rates=rates: -rates[i])[:5]
        assert found.indices.tolist() == expected
        moved = (found.u.double() * found.delta_sigma.double()) @ found.v.mT.double()
        assert moved.abs().max() > 1e-3
        dense.get_submodule(name).weight.data += last[name] - first[name] + moved
    torch.testing.assert_close(logits(model), logits(dense).float(), rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny.llama()))
    report = export_lora(model, tmp_path / "lora")
    assert set(report.ranks.values()) == {4 + 5 + 4}
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")), logits(model), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(logits(model.merge_and_unload()), logits(dense).float(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("steps", [2, 5], ids=["pre-launch", "dash"])
def test_saved_and_loaded_without_the_data_of_the_start(start, steps, tmp_path):
    model = made(dash(**start))
    tiny.train(model, steps)
    model.eval()
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert torch.equal(logits(loaded), logits(model))
        with loaded.disable_adapter():
            assert torch.equal(logits(loaded), logits(tiny.llama()))
    resumed = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    tiny.train(resumed, 2)
    assert resumed.phase() == "dash"
    export_lora(tmp_path, tmp_path / "lora")  # from the folder
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")), logits(model), rtol=1e-4, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore")
def test_eva(tmp_path):
    config = dash(init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = get_peft_model(tiny.llama(), config, low_cpu_mem_usage=True)
    rows = [{"input_ids": tiny.tokens(4, 9, seed=i)} for i in range(6)]
    initialize_lora_eva_weights(model, rows, show_progress_bar=False)
    ranks = {layer.r["default"] for layer in adapted_layers(model, "default").values()}
    assert len(ranks) > 1  # EVA has handed the ranks out anew
    torch.testing.assert_close(logits(model), logits(tiny.llama()))
    tiny.train(model, 6)
    assert model.phase() == "dash"
    model.eval().save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny.llama(), tmp_path)), logits(model))


def test_explored(tmp_path):
    model = made(dash(**STARTS["pissa"]))
    tiny.train(model, 6)
    model.save_pretrained(tmp_path / "adapter")
    tiny.llama().save_pretrained(tmp_path / "base")
    [found] = explore(str(tmp_path / "base"), str(tmp_path / "adapter"))
    for change in found.weights:
        layer = model.base_model.model.get_submodule(change.name)
        expected = reference.change_rates(layer.weight_matrix(), reference.effective_change(layer))
        torch.testing.assert_close(
            torch.tensor(change.rates).double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-7
        )


@pytest.mark.parametrize("use_dora", [False, True])
def test_rslora_scales_the_change_that_identifies(use_dora):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "use_rslora": True}
    if use_dora:
        config = DashConfig(peft=LoraConfig(**config, use_dora=True), prelaunch_steps=3, num_directions=5)
    else:
        config = dash(**config)
    model = get_peft_model(tiny.llama(), config)
    tiny.train(model, 2)
    layer = next(iter(adapted_layers(model, "default").values()))
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        w = layer.get_base_layer().weight.double()
        expected = 8 / 4**0.5 * b @ a
        if use_dora:
            whole = w + expected
            magnitude = layer.lora_magnitude_vector["default"].weight.double()[:, None]
            expected = magnitude * whole / whole.norm(dim=1, keepdim=True) - w
    change = layer.learned_change("default")
    if not use_dora:
        b, a, scaling = change
        change = scaling * b.double() @ a.double()
    torch.testing.assert_close(change, expected, rtol=1e-5, atol=1e-9)
