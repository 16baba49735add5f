import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from peft_tsd.directions import definitions as d
from support import reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@st.composite
def problems(draw):
    """A weight with a spectrum over up to four decades, and the factors of a change."""
    out, inner = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    rank = draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    k = min(out, inner)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inner, k, generator=generator, dtype=torch.float64)).Q
    sigma = torch.logspace(1, -draw(st.floats(0.5, 3)), k, dtype=torch.float64)
    b = torch.randn(out, rank, generator=generator, dtype=torch.float64)
    a = torch.randn(rank, inner, generator=generator, dtype=torch.float64)
    return (u * sigma) @ v.mT, (b, a, draw(st.floats(0.1, 4)))


def dense(factors):
    b, a, scaling = factors
    return scaling * b.double() @ a.double()


@given(problems())
def test_change_rates_are_those_of_the_definition(problem):
    weight, factors = problem
    expected = reference.change_rates(weight, dense(factors))
    np.testing.assert_allclose(d.change_rates(weight, factors), expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(d.change_rates(weight, dense(factors)), expected, rtol=1e-6, atol=1e-9)


@given(problems(), st.integers(1, 30))
def test_directions_are_the_highest_rates_with_their_singular_pairs(problem, num):
    weight, factors = problem
    found = d.task_specific_directions(weight, factors, num)
    rates = reference.change_rates(weight, dense(factors))
    ordered = np.sort(rates)[::-1]
    n = min(num, len(rates))
    assert len(found.indices) == n
    # The set is only defined where the last rate taken and the first one left differ by more than rounding.
    assume(n == len(rates) or ordered[n - 1] > ordered[n] * (1 + 1e-5))
    assert set(found.indices.tolist()) == set(np.argsort(-rates)[:n].tolist())
    np.testing.assert_allclose(found.rates, ordered[:n], rtol=1e-6, atol=1e-9)
    # Each pair is a singular pair of the weight: W v = σ u and Wᵀ u = σ v, of unit length.
    torch.testing.assert_close(weight @ found.v, found.u * found.sigma, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(weight.mT @ found.u, found.v * found.sigma, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.u.norm(dim=0), torch.ones(n, dtype=torch.float64), rtol=1e-5, atol=0)


@given(problems(), st.integers(1, 30), st.sampled_from(["top", "bottom", "random", "random-change"]))
def test_controls_take_other_directions_with_their_own_pairs_and_the_learned_rates(problem, num, selection):
    weight, factors = problem
    found = d.task_specific_directions(weight, factors, num, selection=selection, seed=3)
    n = min(num, min(weight.shape))
    indices = found.indices.tolist()
    assert len(set(indices)) == n
    if selection == "top":
        assert indices == list(range(n))
    if selection == "bottom":
        assert indices == list(range(min(weight.shape)))[::-1][:n]
    np.testing.assert_allclose(found.rates, d.change_rates(weight, factors)[found.indices], rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(weight @ found.v, found.u * found.sigma, rtol=1e-5, atol=1e-8)
    again = d.task_specific_directions(weight, factors, num, selection=selection, seed=3)
    assert torch.equal(again.indices, found.indices)


def test_random_controls_follow_their_seed():
    weight = torch.diag(torch.logspace(2, -2, 200, dtype=torch.float64))
    change = torch.eye(200, dtype=torch.float64)
    taken = [
        [d.task_specific_directions(weight, change, 20, selection=kind, seed=seed).indices for seed in range(50)]
        for kind in ("random", "random-change")
    ]
    assert all(len({tuple(indices.tolist()) for indices in sets}) == 50 for sets in taken)
    uniform, by_change = (torch.cat(sets).double().mean() for sets in taken)
    assert abs(uniform - 99.5) < 5
    # A random change moves small singular values most, relative to themselves.
    assert by_change > 150


@given(problems())
def test_rates_scale_with_the_change_and_ignore_its_sign(problem):
    weight, (b, a, scaling) = problem
    rates = d.change_rates(weight, (b, a, scaling))
    torch.testing.assert_close(d.change_rates(weight, (b, a, -3 * scaling)), 3 * rates)


@given(problems())
def test_transposing_weight_and_change_changes_nothing(problem):
    weight, (b, a, scaling) = problem
    torch.testing.assert_close(
        d.change_rates(weight.mT, (a.mT, b.mT, scaling)), d.change_rates(weight, (b, a, scaling)), rtol=1e-5, atol=1e-8
    )


@given(problems())
def test_coordinates(problem):
    weight, factors = problem
    u, sigma, v = reference.svd(weight)
    matrix = dense(factors)
    on_global = d.global_coordinates(weight, matrix)
    bases = d.core_bases(weight)
    # Signs of singular pairs are free; products with both signs are not.
    torch.testing.assert_close((bases.u * bases.sigma) @ bases.v.mT, weight, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(bases.sigma, sigma, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(on_global.abs(), np.abs(u.T @ matrix.numpy() @ v), rtol=1e-6, atol=1e-9)
    core = d.core_coordinates(weight, factors)
    np.testing.assert_allclose(core, np.diag(u.T @ matrix.numpy() @ v), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(core, torch.diag(on_global), rtol=1e-5, atol=1e-9)


@given(problems())
def test_the_direction_of_a_weight_is_its_own_global_coordinates(problem):
    weight, _ = problem
    direction = d.direction(weight)
    k = min(weight.shape)
    assert direction.shape == (k * k,)
    torch.testing.assert_close(direction, d.global_coordinates(weight, weight).flatten(), rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(24, 16), (16, 24), (16, 16)])
def test_every_dtype_is_computed_in_float64(dtype, shape):
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    b, a = torch.randn(shape[0], 3).to(dtype), torch.randn(3, shape[1]).to(dtype)
    found = d.task_specific_directions(weight, (b, a, 0.5), 4)
    expected = reference.change_rates(weight, dense((b, a, 0.5)))
    assert found.indices.tolist() == np.argsort(-expected)[:4].tolist()
    assert found.rates.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(found.rates.double(), np.sort(expected)[::-1][:4], rtol=1e-6)


def test_a_rank_deficient_weight_puts_its_null_directions_first():
    torch.manual_seed(2)
    weight = torch.randn(12, 5) @ torch.randn(5, 10)
    delta = torch.randn(12, 10)
    found = d.task_specific_directions(weight, delta, 5)
    # Rank 5 of 10: every null direction has σ ≈ 0, so any change along it is an enormous rate.
    assert set(found.indices.tolist()) == {5, 6, 7, 8, 9}
    assert found.rates.isfinite().all()


def test_a_zero_weight_and_a_zero_change():
    zero = torch.zeros(4, 6)
    found = d.task_specific_directions(zero, torch.ones(4, 6), 9)
    assert len(found.indices) == 4
    assert found.sigma.tolist() == [0] * 4
    assert found.rates.isfinite().all()
    torch.testing.assert_close(found.u.mT @ found.u, torch.eye(4))
    unchanged = d.task_specific_directions(torch.randn(4, 6), zero, 2)
    assert unchanged.rates.tolist() == [0, 0]
    assert unchanged.indices.tolist() == [0, 1]  # ties: in the order of the spectrum


@pytest.mark.parametrize("name", ["weight", "delta", "delta's B", "delta's A"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_named(name, bad):
    tensors = {"weight": torch.ones(4, 3), "delta": torch.ones(4, 3)}
    tensors |= {"delta's B": torch.ones(4, 2), "delta's A": torch.ones(2, 3)}
    tensors[name][1, 1] = bad
    delta = tensors["delta"] if name == "delta" else (tensors["delta's B"], tensors["delta's A"], 1.0)
    with pytest.raises(ValueError, match=rf"{name} of shape .* holds 1 NaN or Inf"):
        d.change_rates(tensors["weight"], delta)


def test_bad_arguments_are_repeated():
    weight, delta = torch.ones(4, 3), torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"weight must be a floating-point tensor .* got torch.int64"):
        d.core_bases(torch.ones(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="got list"):
        d.core_bases([[1.0]])
    with pytest.raises(ValueError, match=r"got shape \(4,\)"):
        d.core_bases(torch.ones(4))
    with pytest.raises(ValueError, match=r"got shape \(0, 3\)"):
        d.direction(torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"delta must have the weight's shape \(4, 3\); got \(3, 4\)"):
        d.change_rates(weight, delta.mT)
    with pytest.raises(ValueError, match=r"got B \(4, 2\) and A \(3, 3\)"):
        d.change_rates(weight, (torch.ones(4, 2), torch.ones(3, 3), 1.0))
    with pytest.raises(ValueError, match="scaling must be finite; got nan"):
        d.change_rates(weight, (torch.ones(4, 2), torch.ones(2, 3), float("nan")))
    with pytest.raises(TypeError, match=r"the tuple \(B, A, scaling\); got list"):
        d.change_rates(weight, [delta])
    with pytest.raises(ValueError, match="eps must be positive and finite; got 0"):
        d.change_rates(weight, delta, eps=0)
    for num in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"num must be a positive integer.*got {num!r}"):
            d.task_specific_directions(weight, delta, num)
