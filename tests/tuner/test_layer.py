"""Every layer type against dense arithmetic: W_eff = W + s(B·A − B₀·A₀) + Σ_j Δσ_j u_j v_jᵀ."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_tsd import advance
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny
from support.layers import LAYERS, One


def adapted(kind: str, seed: int = 0, **changes):
    """A model of one layer in float64, its adapter, an input."""
    torch.manual_seed(seed)
    layer, shape = LAYERS[kind]()
    base = One(layer).double()
    model = get_peft_model(copy.deepcopy(base), tiny.config(**{"target_modules": ["layer"], **changes}))
    return base, model, torch.randn(shape, dtype=torch.float64)


def dense_output(base: One, model, x: torch.Tensor) -> torch.Tensor:
    """The base layer with the effective weight in place of its own, in float64."""
    moved = copy.deepcopy(base)
    delta = reference.effective_change(model.base_model.model.layer)
    weight = moved.layer.weight
    delta = delta.T if isinstance(moved.layer, Conv1D) else delta
    weight.data += delta.reshape(weight.shape)
    return moved(x)


@pytest.mark.parametrize("kind", LAYERS)
def test_output_delta_and_merge_are_the_dense_ones(kind, method):
    base, model, x = adapted(kind, **method)
    tiny.train(model, 6, inputs=x)
    assert model.phase() == "dash"
    model.eval()
    expected = dense_output(base, model, x)
    assert (expected - base(x)).abs().max() > 1e-4  # it learned something
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    layer = model.base_model.model.layer
    delta = reference.effective_change(layer)
    torch.testing.assert_close(
        layer.get_delta_weight("default"),
        (delta.T if kind == "conv1d" else delta).reshape(base.layer.weight.shape),
        rtol=1e-9,
        atol=1e-9,
    )
    weight = base.layer.weight
    for safe in (False, True):
        model.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
        assert not torch.equal(layer.get_base_layer().weight, weight)
        model.unmerge_adapter()
        torch.testing.assert_close(layer.get_base_layer().weight, weight, rtol=1e-9, atol=1e-9)
    merged = model.merge_and_unload(safe_merge=True)
    assert type(merged.layer) is type(base.layer)
    torch.testing.assert_close(merged(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_are_the_dense_ones(kind, method):
    """Every trained parameter, before and after the transition, against autograd through the dense weight."""
    base, model, x = adapted(kind, **method)
    layer = model.base_model.model.layer
    for steps in (2, 3):
        tiny.train(model, steps, inputs=x)
        dash = "default" in layer.lora_dash
        if dash:
            layer.lora_dash["default"].weight.data.normal_()
        target = torch.randn_like(base(x))
        model.zero_grad()
        (model(x) * target).sum().backward()
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        dense = base.layer.weight.detach().clone().requires_grad_()
        (torch.func.functional_call(base, {"layer.weight": dense}, x) * target).sum().backward()
        gradient = (dense.grad.T if kind == "conv1d" else dense.grad).flatten(1)
        scaling, fixed = layer.scaling["default"], layer.lora_directions["default"]
        torch.testing.assert_close(a.grad.flatten(1), scaling * b.flatten(1).mT @ gradient, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(b.grad.flatten(1), scaling * gradient @ a.flatten(1).mT, rtol=1e-7, atol=1e-9)
        if dash:
            u, v = fixed.u[:, :5], fixed.v[:5]
            if fixed.taken is not None:
                u, v = nn.functional.normalize(u, dim=0), nn.functional.normalize(v, dim=1)
            along = 20.0 * (u * (gradient @ v.mT)).sum(0)
            torch.testing.assert_close(layer.lora_dash["default"].weight.grad, along, rtol=1e-7, atol=1e-9)
        assert not list(fixed.parameters())
        assert all(buffer.grad is None for buffer in fixed.buffers())


@given(seed=st.integers(0, 1000), kind=st.sampled_from(list(LAYERS)))
def test_the_transition_keeps_the_function_or_returns_to_the_base(seed, kind):
    """By default a model goes on from where it is; without what was learned, LoRA-Init and LoRA-TSD start at W."""
    for method, reading, keep in (
        ("lora-dash", "svd", False),
        ("lora-init", "svd", False),
        ("lora-tsd", "orthonormal", False),
        ("lora-init", "orthonormal", True),
        ("lora-tsd", "svd", True),
    ):
        base, model, x = adapted(kind, seed, method=method, init_reading=reading, keep_prelaunch=keep)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        tiny.train(model, 2, inputs=x, optimizer=optimizer)
        model(x).square().mean().backward()
        optimizer.step()
        before = model(x)
        assert advance(model, optimizer)
        expected = before if keep or method == "lora-dash" else base(x)
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_directions_chosen_are_those_of_the_definition(kind):
    base, model, x = adapted(kind, method="lora-tsd")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tiny.train(model, 2, inputs=x, optimizer=optimizer)
    model(x).square().mean().backward()
    optimizer.step()
    layer = model.base_model.model.layer
    delta = reference.effective_change(layer)
    advance(model, optimizer)
    weight = base.layer.weight.T if kind == "conv1d" else base.layer.weight.flatten(1)
    rates = reference.change_rates(weight, delta)
    found = model.directions()["layer"]
    expected = sorted(range(len(rates)), key=lambda i: -rates[i])[:5]
    assert found.indices.tolist() == expected
    u, sigma, v = reference.svd(weight)
    for j, i in enumerate(expected):
        torch.testing.assert_close(found.rates[j].item(), rates[i], rtol=1e-6, atol=0)
        torch.testing.assert_close(found.sigma[j].item(), sigma[i], rtol=1e-6, atol=0)
        pair = torch.outer(found.u[:, j], found.v[:, j])
        torch.testing.assert_close(pair, torch.from_numpy(u[:, [i]] @ v[:, [i]].T), rtol=1e-5, atol=1e-7)
    a = layer.lora_A["default"].weight.flatten(1)
    b = layer.lora_B["default"].weight.flatten(1)
    start = sum(sigma[i] * torch.from_numpy(u[:, [i]] @ v[:, [i]].T) for i in expected[:4])
    torch.testing.assert_close(layer.scaling["default"] * b @ a, start, rtol=1e-5, atol=1e-7)


def test_orthonormal_start_is_orthonormal():
    _, model, x = adapted("tall", method="lora-init", init_reading="orthonormal")
    tiny.train(model, 3, inputs=x)
    layer = model.base_model.model.layer
    a = layer.lora_A["default"].weight
    torch.testing.assert_close(a @ a.mT, torch.eye(4, dtype=torch.float64))
    assert not layer.lora_B["default"].weight.any()


def test_fewer_directions_than_asked_for_leave_the_rest_without_effect():
    torch.manual_seed(0)
    model = get_peft_model(One(nn.Linear(6, 3)), tiny.config("lora-dash", target_modules=["layer"], num_directions=9))
    x = torch.randn(4, 6)
    tiny.train(model, 6, inputs=x)
    found = model.directions()["layer"]
    assert len(found.indices) == 3
    assert found.u.shape == (3, 3)
    theta = model.base_model.model.layer.lora_dash["default"].weight
    assert theta.shape == (9,)
    assert not theta[3:].any()
    assert theta[:3].any()


def test_one_dropout_mask_serves_every_term():
    """With dropout, LoRA-Init still starts at W: B·A and B₀·A₀ see the same input."""
    base, model, x = adapted("tall", method="lora-init", lora_dropout=0.5, keep_prelaunch=False)
    tiny.train(model, 3, inputs=x)
    model.train()
    torch.testing.assert_close(model(x), base(x), rtol=1e-9, atol=1e-9)
    tiny.train(model, 3, inputs=x)
    model.train()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("keep", [False, True])
def test_lora_bias_is_trained_scaled_and_restarted_or_kept(keep):
    _, model, x = adapted("conv2d", lora_bias=True, keep_prelaunch=keep)
    layer = model.base_model.model.layer
    tiny.train(model, 2, inputs=x)
    assert layer.lora_B["default"].bias.any()
    tiny.train(model, 1, inputs=x)
    assert layer.lora_B["default"].bias.any() == keep
    tiny.train(model, 2, inputs=x)
    expected = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), expected, rtol=1e-9, atol=1e-9)


def test_the_strength_of_the_whole_adapter_can_be_turned():
    base, model, x = adapted("tall", method="lora-tsd")
    tiny.train(model, 6, inputs=x)
    model.eval()
    layer = model.base_model.model.layer
    full = model(x) - base(x)
    layer.set_scale("default", 0.25)
    torch.testing.assert_close(model(x) - base(x), full / 4, rtol=1e-7, atol=1e-9)
    layer.scale_layer(2.0)
    torch.testing.assert_close(model(x) - base(x), full / 2, rtol=1e-7, atol=1e-9)
    layer.unscale_layer()
    torch.testing.assert_close(model(x) - base(x), full, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast_adapter", [True, False])
def test_half_precision_weights(dtype, autocast_adapter, method):
    torch.manual_seed(0)
    base = tiny.llama().to(dtype)
    model = get_peft_model(base, tiny.config(**method), autocast_adapter_dtype=autocast_adapter)
    layer = next(iter(adapted_layers(model, "default").values()))
    expected = torch.float32 if autocast_adapter else dtype
    assert {t.dtype for n, t in layer.state_dict().items() if "lora_" in n} == {expected, torch.int64}
    assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {expected}
    assert not any(t.requires_grad for t in layer.lora_directions.buffers())
    # An ε that float16 can hold: Adam's default rounds to zero there, for any parameter.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=1e-4)
    losses = tiny.train(model, 6, optimizer=optimizer)
    assert all(loss == loss for loss in losses)
    assert model.phase() == "dash"
    out = model(tiny.tokens()).logits
    assert out.dtype == dtype
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tiny.tokens()).logits.float(), out.float(), rtol=0.1, atol=0.1)


def test_autocast():
    model = get_peft_model(tiny.llama(), tiny.config())
    tiny.train(model, 6)
    expected = model(tiny.tokens()).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tiny.tokens()).logits
        out.float().mean().backward()
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def replaced_forward(base: nn.Linear, seen: list) -> None:
    forward = base.forward
    base.forward = lambda x: seen.append(forward(x)) or seen[-1]


WATCHERS = {
    "forward hook": lambda base, seen: base.register_forward_hook(lambda m, i, out: seen.append(out)),
    "forward pre-hook": lambda base, seen: base.register_forward_pre_hook(
        lambda m, inputs: seen.append(nn.functional.linear(*inputs, m.weight, m.bias))
    ),
    "backward hook": lambda base, seen: base.register_full_backward_hook(lambda m, i, out: seen.append(out)),
    "global hook": lambda base, seen: nn.modules.module.register_module_forward_hook(
        lambda m, i, out: seen.append(out) if m is base else None
    ),
    "replaced forward": replaced_forward,
}


@pytest.mark.parametrize("watcher", WATCHERS)
def test_who_watches_the_base_layer_sees_what_the_base_gives(watcher):
    base, model, x = adapted("tall")
    tiny.train(model, 6, inputs=x)
    model.eval()
    expected = dense_output(base, model, x)
    seen = []
    inner = model.base_model.model.layer.base_layer
    handle = WATCHERS[watcher](inner, seen)
    try:
        out = model(x.requires_grad_())
        out.sum().backward()
    finally:
        if watcher == "global hook":
            handle.remove()
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    (found,) = seen
    torch.testing.assert_close(
        found[0] if watcher == "backward hook" else found,
        torch.ones_like(out) if watcher == "backward hook" else base(x),
    )


def test_a_base_weight_or_bias_in_training_gets_its_gradient():
    _, model, x = adapted("tall", bias="all")
    tiny.train(model, 2, inputs=x)
    layer = model.base_model.model.layer.base_layer
    model(x).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((14,), 15.0, dtype=torch.float64))
    layer.weight.requires_grad_()
    model(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum((0, 1)).expand(14, 9))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Embedding(10, 8), "it is of type Embedding, and only Linear, Conv1D and Conv2d"),
        (nn.Conv1d(4, 4, 3), "it is of type Conv1d"),
        (nn.Conv2d(8, 8, 3, groups=2), "it is a convolution in 2 groups"),
        (nn.Conv2d(8, 8, 3, dilation=2), r"it is a convolution with dilation \(2, 2\)"),
        (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), r"it is a convolution with .* padding mode 'reflect'"),
        (nn.MultiheadAttention(8, 2), "it is of type MultiheadAttention"),
    ],
)
def test_other_layers_are_refused_by_name(layer, reason):
    with pytest.raises(
        ValueError, match=rf"^layer cannot carry a lora-tsd adapter: {reason}.*exclude_modules=\['layer'\]"
    ):
        get_peft_model(One(layer), tiny.config(target_modules=["layer"]))


def test_a_quantized_weight_is_refused_by_name():
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match="layer cannot carry .* its weight is quantized .*load the base model in bfloat16"
    ):
        get_peft_model(One(layer), tiny.config(target_modules=["layer"]))


def test_a_rank_beyond_the_directions_of_a_layer_is_refused():
    with pytest.raises(
        ValueError, match="layer has 3 directions, fewer than r=4 that lora-init starts from.*rank_pattern"
    ):
        get_peft_model(One(nn.Linear(6, 3)), tiny.config("lora-init", target_modules=["layer"]))
    get_peft_model(One(nn.Linear(6, 3)), tiny.config("lora-dash", target_modules=["layer"]))
    get_peft_model(One(nn.Linear(6, 3)), tiny.config("lora-init", target_modules=["layer"], rank_pattern={"layer": 2}))


def test_another_kind_of_adapter_beside_it_is_refused():
    base = One(nn.Linear(6, 5))
    model = get_peft_model(base, tiny.config("lora-dash", target_modules=["layer"]))
    with pytest.raises(TypeError, match="carries a TSD adapter and cannot take one of type LoraConfig"):
        model.base_model.model.layer.update_layer("other", 2, lora_alpha=2, config=LoraConfig(r=2))
