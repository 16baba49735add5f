"""A transition loses nothing: what pre-launch learned stays, beside A and B that start anew."""

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_tsd import advance, check_adapter, export_lora, identify_from_gradients
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny
from support.gradients import BATCHES
from support.layers import LAYERS, One
from support.trainers import adapter_bits, trainer

METHODS = [
    ("lora-dash", "svd"),
    ("lora-init", "svd"),
    ("lora-init", "orthonormal"),
    ("lora-tsd", "svd"),
    ("lora-tsd", "orthonormal"),
]


def over_the_transition(model, from_gradients: bool = False) -> tuple[float, float]:
    """The loss of a fixed batch right before the transition and right after it."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 3 if from_gradients else 2, optimizer=optimizer)
    if from_gradients:
        before = tiny.language_loss(model, 0).item()
        identify_from_gradients(model, BATCHES, optimizer)
    else:
        tiny.language_loss(model, 2).backward()
        optimizer.step()
        optimizer.zero_grad()
        before = tiny.language_loss(model, 0).item()
        assert advance(model, optimizer)
    assert model.phase() == "dash"
    return before, tiny.language_loss(model, 0).item()


@pytest.mark.parametrize("source", ["weight", "gradient"])
@pytest.mark.parametrize(("method", "reading"), METHODS)
def test_the_loss_after_the_transition_of_a_default_is_that_before_it(method, reading, source):
    base = tiny.language_loss(tiny.llama(), 0).item()
    changes = {"init_reading": reading, "direction_source": source, "first_step": False}
    model = get_peft_model(tiny.llama(), tiny.config(method, **changes))
    before, after = over_the_transition(model, source == "gradient")
    assert abs(before - base) > 1e-3 * base  # something was learned
    assert after == pytest.approx(before, rel=1e-4)


def test_a_first_step_goes_down_from_what_was_learned():
    model = get_peft_model(tiny.llama(), tiny.config(direction_source="gradient"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 3, optimizer=optimizer)
    before = sum(model(**batch).loss.item() for batch in BATCHES)
    identify_from_gradients(model, [*BATCHES, *BATCHES], optimizer)
    assert sum(model(**batch).loss.item() for batch in BATCHES) < before


@pytest.mark.parametrize("reading", ["svd", "orthonormal"])
def test_the_papers_restart_from_w_is_there_by_name(reading):
    base = tiny.language_loss(tiny.llama(), 0).item()
    model = get_peft_model(tiny.llama(), tiny.config(init_reading=reading, keep_prelaunch=False))
    before, after = over_the_transition(model)
    assert abs(before - base) > 1e-3 * base
    assert after == pytest.approx(base, rel=1e-4)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_change_is_the_sum_of_both(kind, tmp_path):
    """ΔW = s·B₁·A₁ + s·B·A + Σ_j (Δσ_j − [j < r]·σ_j) u_j v_jᵀ, against dense float64 products and the SVD of W."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    base = One(layer).double()
    model = get_peft_model(base, tiny.config(target_modules=["layer"], r=3, num_directions=4))
    x = torch.randn(shape, dtype=torch.float64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 2, inputs=x, optimizer=optimizer)
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    layer = adapted_layers(model, "default")["layer"]
    a, b = (f["default"].weight.detach().flatten(1).clone() for f in (layer.lora_A, layer.lora_B))
    kept = layer.scaling["default"] * b @ a
    assert advance(model, optimizer)
    tiny.train(model, 3, inputs=x, optimizer=optimizer)
    found = model.directions()["layer"]
    u, sigma, v = map(torch.from_numpy, reference.svd(layer.weight_matrix()))
    a, b = (f["default"].weight.detach().flatten(1) for f in (layer.lora_A, layer.lora_B))
    expected = kept + layer.scaling["default"] * b @ a
    for j, i in enumerate(found.indices.tolist()):
        expected = expected + (float(found.delta_sigma[j]) - (j < 3) * sigma[i]) * torch.outer(u[:, i], v[:, i])
    factors = layer.factors("default")
    assert len(factors.down()) == 2 * 3 + 4
    torch.testing.assert_close((factors.up() @ factors.down()).detach(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(reference.effective_change(layer), expected, rtol=1e-5, atol=1e-5)
    assert export_lora(model, tmp_path / "lora").ranks == {"layer": 2 * 3 + 4}


@pytest.mark.parametrize(("method", "reading"), METHODS[1:])
def test_it_is_saved_loaded_merged_exported_and_compressed(method, reading, tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(method, init_reading=reading))
    tiny.train(model, 6)
    ids = tiny.tokens(seed=9)
    out = model.eval()(ids).logits
    model.save_pretrained(tmp_path / "native")
    assert check_adapter(tmp_path / "native").keep_prelaunch
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "native", is_trainable=True)
    assert torch.equal(loaded.eval()(ids).logits, out)
    export_lora(tmp_path / "native", tmp_path / "lora")
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    torch.testing.assert_close(plain(ids).logits, out, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny.llama()(ids).logits)
    report = export_lora(model, tmp_path / "small", rank=6)
    for name, layer in adapted_layers(model, "default").items():
        sigma = torch.linalg.svdvals(reference.effective_change(layer))
        error = float(sigma[6:].norm() / sigma.norm())
        assert report.errors[name] == pytest.approx(error, rel=1e-3, abs=1e-6)
    loaded.merge_adapter()
    torch.testing.assert_close(loaded(ids).logits, out, rtol=1e-4, atol=1e-5)
    loaded.unmerge_adapter()
    torch.testing.assert_close(loaded(ids).logits, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stopped", [2, 4])
def test_a_run_that_is_resumed_before_or_after_the_transition_has_the_same_bits(tmp_path, stopped):
    whole = get_peft_model(tiny.llama(), tiny.config())
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
    trainer(tmp_path / "whole", whole, **saving).train()
    again = get_peft_model(tiny.llama(), tiny.config())
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{stopped}")
    trainer(tmp_path / "again", again, **saving).train(resume_from_checkpoint=checkpoint)
    expected, found = (adapter_bits(m, tmp_path / n) for m, n in ((whole, "a"), (again, "b")))
    assert any(key.endswith("kept_b") and bool(tensor.any()) for key, tensor in expected.items())
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_moments_of_a_bias_that_goes_on_are_kept():
    model = get_peft_model(One(LAYERS["tall"]()[0]), tiny.config(target_modules=["layer"], lora_bias=True))
    layer = adapted_layers(model, "default")["layer"]
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    assert {id(p) for p in layer.restarted("default")} == {id(a.weight), id(b.weight)}


def test_a_layer_that_has_not_changed_keeps_nothing():
    model = get_peft_model(tiny.llama(), tiny.config())
    layers = adapted_layers(model, "default")
    first = next(iter(layers.values()))
    for parameter in (*first.lora_A.parameters(), *first.lora_B.parameters()):
        parameter.requires_grad = False
    tiny.train(model, 4)
    assert model.phase() == "dash"
    kept = [bool(layer.fixed("default").kept_b.any()) for layer in layers.values()]
    assert kept == [False] + [True] * (len(layers) - 1)
