"""The fused product against autograd through the plain one, and through the dense change."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_tsd.tuner import stacked
from peft_tsd.tuner.stacked import Factors, adapted_linear, add_product


def problem(seed: int, dash: bool, start: bool, rows: int = 3, out: int = 6, inner: int = 5, rank: int = 2):
    torch.manual_seed(seed)

    def random(*shape: int, grad: bool = False) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=grad)

    result, x = random(2, rows, out, grad=True), random(2, rows, inner, grad=True)
    factors = Factors(random(rank, inner, grad=True), random(out, rank, grad=True), 0.7)
    if dash:
        factors = factors._replace(c=random(4, grad=True), u=random(out, 4), v=random(4, inner))
    if start:
        factors = factors._replace(a0=random(rank, inner), b0=random(out, rank))
        factors = factors._replace(kept_a=random(rank, inner), kept_b=random(out, rank))
    return result, x, factors


def dense(factors: Factors) -> torch.Tensor:
    delta = factors.scaling * factors.b @ factors.a
    if factors.u is not None:
        delta = delta + factors.u @ torch.diag(factors.c) @ factors.v
    if factors.a0 is not None:
        delta = delta - factors.scaling * factors.b0 @ factors.a0
        delta = delta + factors.scaling * factors.kept_b @ factors.kept_a
    return delta


@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.integers(1, 4), st.integers(1, 8), st.integers(1, 8))
def test_it_is_the_dense_product(seed, dash, start, rows, out, inner):
    result, x, factors = problem(seed, dash, start, rows, out, inner)
    expected = result + x @ dense(factors).mT
    torch.testing.assert_close(factors.up() @ factors.down(), dense(factors))
    torch.testing.assert_close(add_product(result, x, factors), expected)
    with torch.no_grad():
        torch.testing.assert_close(add_product(result, x, factors), expected)


@given(st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans(), st.integers(1, 4), st.integers(1, 8))
def test_with_its_base_it_is_the_dense_layer(seed, dash, start, biased, rows, inner):
    _, x, factors = problem(seed, dash, start, rows, inner=inner)
    weight, bias = torch.randn(6, inner, dtype=torch.float64), torch.randn(6, dtype=torch.float64) if biased else None
    kept = weight.clone()
    expected = torch.nn.functional.linear(x, weight + dense(factors), bias)
    torch.testing.assert_close(adapted_linear(x, weight, bias, factors), expected)
    with torch.no_grad():
        torch.testing.assert_close(adapted_linear(x, weight, bias, factors), expected)
    assert weight.equal(kept)


@pytest.mark.parametrize("dash", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_gradcheck_with_its_base(dash, start):
    _, x, factors = problem(0, dash, start)
    weight, bias = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, dtype=torch.float64)

    def layer(x, a, b, c):
        return adapted_linear(x, weight, bias, factors._replace(a=a, b=b, c=c))

    assert torch.autograd.gradcheck(layer, (x, factors.a, factors.b, factors.c))


@pytest.mark.parametrize("dash", [False, True])
@pytest.mark.parametrize("start", [False, True])
def test_gradcheck(dash, start):
    result, x, factors = problem(0, dash, start)

    def product(result, x, a, b, c):
        return add_product(result, x, factors._replace(a=a, b=b, c=c))

    assert torch.autograd.gradcheck(product, (result, x, factors.a, factors.b, factors.c))


@pytest.mark.parametrize("frozen", ["x", "a", "b", "c"])
def test_what_needs_no_gradient_gets_none(frozen):
    result, x, factors = problem(1, dash=True, start=True)
    tensors = {"x": x, "a": factors.a, "b": factors.b, "c": factors.c}
    tensors[frozen].requires_grad_(False)
    add_product(result, x, factors).sum().backward()
    assert {name for name, tensor in tensors.items() if tensor.grad is None} == {frozen}


def test_autocast_casts_forward_and_backward_alike():
    result, x, factors = problem(2, dash=True, start=True)
    factors = Factors(*(p.detach().float().requires_grad_() if torch.is_tensor(p) else p for p in factors))
    for name in ("u", "v", "a0", "b0", "kept_a", "kept_b"):
        getattr(factors, name).requires_grad_(False)
    x = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = add_product(result.detach().bfloat16(), x, factors)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    got = [t.grad.clone() for t in (x, factors.a, factors.b, factors.c)]
    assert all(g.dtype == torch.float32 for g in got)
    for t in (x, factors.a, factors.b, factors.c):
        t.grad = None
    add_product(result.detach().float(), x, factors).sum().backward()
    for g, t in zip(got, (x, factors.a, factors.b, factors.c)):
        torch.testing.assert_close(g, t.grad, rtol=0.05, atol=0.1)


def test_the_backward_pass_keeps_what_a_plain_lora_keeps():
    result, x, factors = problem(4, dash=True, start=True, rows=50)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_product(result, x, factors)
    mine = {t.data_ptr() for t in (x, *factors) if isinstance(t, torch.Tensor)}
    extra = sum(t.numel() for t in kept if t.data_ptr() not in mine)
    assert extra == 2 * 50 * len(factors.a)


def test_the_module_says_what_a_compiler_sees(monkeypatch):
    """Compiled, the plain product is traced; it is the same function."""
    result, x, factors = problem(5, dash=True, start=True)
    expected = add_product(result, x, factors)
    monkeypatch.setattr(stacked._AddProduct, "apply", None)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(add_product, backend="eager")(result, x, factors), expected)
