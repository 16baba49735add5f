"""Every method that PEFT registers: directions beside it against dense arithmetic, or refused."""

import copy
import re

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

from peft_tsd import DashConfig, advance
from peft_tsd.dash.layer import DashLayer
from peft_tsd.tuner.phase import adapted_layers
from support import peft_methods, reference, tiny

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3  # of the pre-launch


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


def assert_same(got, expected):
    """To what float32 arithmetic can show."""
    assert ((got - expected).norm() / expected.norm()).item() < 3e-6


def step(model, optimizer, i: int) -> None:
    tiny.language_loss(model, i).backward()
    optimizer.step()
    optimizer.zero_grad()


def adam(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def changes_by_peft(kind: str, model) -> dict[str, torch.Tensor]:
    """ΔW (out, in) of each layer, without directions: a model with the method alone, merged by PEFT in float64."""
    state = get_peft_model_state_dict(model)
    state = {key: tensor for key, tensor in state.items() if not re.search(r"[_.](dash|directions)\.", key)}
    plain = get_peft_model(tiny.llama(), peft_methods.WORKS[kind]())
    set_peft_model_state_dict(plain, state)
    merged = plain.double().eval().merge_and_unload()
    base = tiny.llama().double()
    return {
        name: (merged.get_submodule(name).weight - base.get_submodule(name).weight).detach()
        for name in adapted_layers(model, "default")
    }


def dense(kind: str, model) -> torch.nn.Module:
    """The base model with `W + ΔW + Σ_j Δσ_j u_j v_jᵀ` in place of each adapted W, in float64."""
    result = tiny.llama().double()
    changes = changes_by_peft(kind, model)
    with torch.no_grad():
        for name, found in model.directions().items():
            weight = result.get_submodule(name).weight
            u, _, v = reference.svd(weight)
            assert found.delta_sigma.abs().max() > 1e-3
            weight += changes[name]
            for i, change in zip(found.indices.tolist(), found.delta_sigma.tolist()):
                weight += change * torch.outer(torch.from_numpy(u[:, i]), torch.from_numpy(v[:, i]))
    return result


def test_every_registered_method_is_here():
    known = {kind.partition("-")[0] for kind in peft_methods.WORKS} | set(peft_methods.REFUSED)
    assert known == peft_methods.registered(), (
        "add it to tests/support/peft_methods.py, and write docs/methods.md anew"
    )


@pytest.mark.parametrize("kind", peft_methods.REFUSED)
def test_refused(kind):
    [line] = peft_methods.refusal(kind).splitlines()
    assert line.endswith(".")


def test_the_page_is_up_to_date():
    assert peft_methods.PAGE.read_text() == peft_methods.page(), (
        "run `PYTHONPATH=tests python -m support.peft_methods`"
    )


@pytest.mark.parametrize("kind", peft_methods.WORKS)
def test_works(kind, tmp_path):
    expected = logits(tiny.llama())
    made = []
    for config in (peft_methods.WORKS[kind](), peft_methods.config(kind)):
        base = tiny.llama()
        torch.manual_seed(3)
        made.append(get_peft_model(base, config))
    plain, model = made
    layers = adapted_layers(model, "default")

    # The method is what it is without directions, but for one more parameter a layer.
    assert torch.equal(logits(plain.eval()), logits(model.eval()))
    trained, theirs = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, plain))
    assert {name for name in trained if not re.search(r"[_.]dash\.", name)} == theirs
    assert len(trained - theirs) == len(layers) == sum("dash." in name for name in trained)
    assert len(layers) == 2 * len(plain.peft_config["default"].target_modules)
    parameters = {name: (id(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()}

    # The transition.
    peft_methods.shaken(model)
    optimizer = adam(model)
    for i in range(STEPS):
        step(model, optimizer, i)
        if i == STEPS - 1:
            changes = changes_by_peft(kind, model)
        assert advance(model, optimizer) == (i == STEPS - 1)
    for name, found in model.directions().items():
        weight = layers[name].weight_matrix()
        rates = reference.change_rates(weight, changes[name])
        # PSOFT and TinyLoRA change no more than the first few directions, and leave the rest at rates of 1e-14.
        np.testing.assert_allclose(found.rates, rates[found.indices], rtol=1e-4, atol=1e-9)
        assert sorted(found.rates.tolist(), reverse=True) == found.rates.tolist()
        assert rates[found.indices].min() >= np.sort(rates)[-5] * (1 - 1e-4) - 1e-9
    assert {name: (id(p), p.shape, p.dtype, p.requires_grad) for name, p in model.named_parameters()} == parameters

    # After it.
    for i in range(STEPS, STEPS + 3):
        step(model, optimizer, i)
        advance(model, optimizer)
    output = logits(model)
    assert_same(output, logits(dense(kind, model)))
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), output)

    # Saved, loaded, and resumed beside the run that was not interrupted.
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
        assert type(loaded.peft_config["default"].peft) is type(peft_methods.WORKS[kind]())
        assert_same(logits(loaded), output)
        assert str(loaded.directions()) == str(model.directions())
    if not model.base_model.uses_shared_state and kind != "LORA-use_dora":  # whose magnitudes transformers leaves out
        hosted = tiny.llama()
        hosted.load_adapter(str(tmp_path))
        assert_same(logits(hosted), output)
    resumed = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True).eval()
    second = adam(resumed)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (resumed, second)):
        step(one, its, 9)
        advance(one, its)
    assert_same(logits(resumed), logits(model))
    output = logits(model)

    # Merged; PEFT cannot undo it for OSF.
    for safe in (False, True):
        merged = copy.deepcopy(model) if kind == "OSF" else model
        merged.merge_adapter(safe_merge=safe)
        assert_same(logits(merged), output)
        if kind != "OSF":
            merged.unmerge_adapter()
            assert_same(logits(merged), output)
    unloaded = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, DashLayer) for module in unloaded.modules())
    assert_same(logits(unloaded), output)


def test_a_method_that_peft_cannot_merge_is_found_when_the_model_is_made(monkeypatch):
    def merge(self, **kwargs):
        raise NotImplementedError("not today")

    monkeypatch.setattr("peft.tuners.lycoris_utils.LycorisLayer.merge", merge)
    with pytest.raises(
        ValueError, match=r"layers\.0\.self_attn\.q_proj cannot be given directions: PEFT cannot merge"
    ):
        get_peft_model(tiny.llama(), DashConfig(peft=peft_methods.WORKS["LOHA"]()))
