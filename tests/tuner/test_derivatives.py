"""Derivatives of every kind go through an adapted layer as through PEFT's LoRA: right, or refused in one line."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap

from peft_tsd import TsdConfig
from peft_tsd.tuner.phase import adapted_layers
from support import tiny

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
METHODS = [("lora-dash", "svd"), ("lora-init", "svd"), ("lora-tsd", "svd"), ("lora-tsd", "orthonormal")]


def adapted(method="lora-tsd", reading="svd", targets=("0", "2"), train=False):
    """Two linear layers, the last adapted; every factor random, in float64."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 4)).double()
    config = TsdConfig(
        method=method, init_reading=reading, r=2, num_directions=3, prelaunch_steps=1, target_modules=list(targets)
    )
    model = get_peft_model(base, config, autocast_adapter_dtype=False).train(train)
    tiny.train(model, 1, inputs=X)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.5)
    return model


def penalty(model, x):
    """A gradient penalty: of the input's gradient."""
    x = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return found.square().sum()


@pytest.mark.parametrize("targets", [("2",), ("0",), ("0", "2")], ids=["last", "first", "both"])
@pytest.mark.parametrize(("method", "reading"), METHODS)
def test_second_derivatives_are_those_of_finite_differences(method, reading, targets):
    model = adapted(method, reading, targets)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(penalty(model, X), list(parameters.values()), allow_unused=True)
    for (name, parameter), gradient in zip(parameters.items(), found):
        assert gradient is not None, name
        entry, step = (0,) * parameter.ndim, 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[entry] += sign * step
            values.append(penalty(model, X).item())
            with torch.no_grad():
                parameter[entry] -= sign * step
        assert gradient[entry].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5, abs=1e-7), name


@pytest.mark.long
def test_second_derivatives_by_parameters_and_through_the_input():
    """A Hessian-vector product, and gradcheck's own test of the second derivative."""
    model = adapted()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    values = tuple(dict(model.named_parameters())[name].detach().requires_grad_() for name in names)

    def call(x, *values):
        return functional_call(model, dict(zip(names, values)), (x,))

    assert torch.autograd.gradcheck(call, (X.clone().requires_grad_(), *values))
    assert torch.autograd.gradgradcheck(call, (X.clone().requires_grad_(), *values))


def test_the_autograd_of_one_backward_is_as_before():
    """The hand-written backward and the plain path agree, bit for bit in the output."""
    model = adapted()
    model(X).square().sum().backward()
    by_hand = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    plain = grad(lambda values: functional_call(model, values, (X,)).square().sum())(
        {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    )
    assert by_hand.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(by_hand[name], gradient)


def test_gradients_by_row():
    model = adapted()
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values, x):
        return functional_call(model, values, (x[None],)).square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(values, X)
    for row, x in enumerate(X):
        model.zero_grad()
        model(x[None]).square().sum().backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(found[name][row], p.grad)


def test_forward_mode_and_jacobians():
    model = adapted()
    direction = torch.ones_like(X)
    step = 1e-6
    expected = (model(X + step * direction) - model(X - step * direction)).detach() / (2 * step)
    torch.testing.assert_close(jvp(model, (X,), (direction,))[1], expected, rtol=1e-5, atol=1e-8)
    with forward_ad.dual_level():
        out = model(forward_ad.make_dual(X, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, expected, rtol=1e-5, atol=1e-8)
    dense = torch.autograd.functional.jacobian(model, X)
    torch.testing.assert_close(torch.autograd.functional.jacobian(model, X, vectorize=True), dense)


@pytest.mark.parametrize("train", [False, True])
def test_tracing(train):
    model = adapted(train=train)
    traced = torch.jit.trace(model.base_model.model, X, check_trace=False)
    torch.testing.assert_close(traced(2 * X), model(2 * X))


@pytest.mark.filterwarnings("ignore")
def test_onnx_by_tracing(tmp_path):
    pytest.importorskip("onnx")
    torch.onnx.export(adapted().float().base_model.model, (X.float(),), str(tmp_path / "model.onnx"), dynamo=False)
    assert (tmp_path / "model.onnx").stat().st_size > 0


def test_export():
    model = adapted()
    exported = torch.export.export(model.base_model.model, (X,)).module()
    torch.testing.assert_close(exported(X), model(X))


def test_opacus_is_refused_in_one_line():
    """As its GradSampleModule marks a parameter, without the package."""
    model = adapted(train=True)
    adapted_layers(model, "default")["2"].lora_A["default"].weight._forward_counter = 0
    with pytest.raises(ValueError, match=r"Opacus' GradSampleModule .* torch.func \(vmap of grad\)") as told:
        model(X)
    assert "\n" not in str(told.value)
