"""Directions of a gradient that is never formed, against the SVD of one that is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_tsd.directions.sketch import OVERSAMPLING, Sketch, Triples


def tokens(
    number: int, out_size: int, in_size: int, seed: int, decay: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and gradients of the output, of a G whose singular values fall by e^-decay from one to the next."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.linalg.qr(torch.randn(in_size, number, generator=generator, dtype=torch.float64)).Q.mT
    dy = torch.linalg.qr(torch.randn(out_size, number, generator=generator, dtype=torch.float64)).Q.mT
    return x, dy * torch.exp(-decay * torch.arange(len(dy)))[:, None]


def summed(x: torch.Tensor, dy: torch.Tensor, num: int, seed: int = 0, parts: int = 3) -> Sketch:
    sketch = Sketch((dy.shape[1], x.shape[1]), num, seed, like=x)
    for _ in range(2):
        for x_part, dy_part in zip(x.chunk(parts), dy.chunk(parts)):
            sketch.add(x_part, dy_part)
        if sketch._basis is None:
            sketch.turn()
    return sketch


def sketched(x: torch.Tensor, dy: torch.Tensor, num: int, seed: int = 0) -> Triples:
    return summed(x, dy, num, seed).triples()


def largest_angle(found: torch.Tensor, true: torch.Tensor) -> float:
    """The sine of the largest angle between the spaces that two sets of orthonormal columns span."""
    return float(torch.linalg.matrix_norm(true - found @ (found.mT @ true), 2))


@given(
    number=st.integers(1, 10), out_size=st.integers(10, 40), in_size=st.integers(10, 40), num=st.integers(2, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_exact_where_the_rank_is_within_its_columns(number, out_size, in_size, num, seed):
    x, dy = tokens(number, out_size, in_size, seed, decay=0.3)
    found = sketched(x, dy, num, seed)
    u, s, v_transposed = torch.linalg.svd(dy.mT @ x)
    n = min(num, number)
    assert torch.allclose(found.s[:n], s[:n], rtol=1e-8)
    assert largest_angle(found.u[:, :n], u[:, :n]) < 1e-6
    assert largest_angle(found.v[:, :n], v_transposed[:n].mT) < 1e-6
    # Sign and pairing: each pair is G's own.
    assert torch.allclose((found.u * (dy.mT @ x @ found.v)).sum(0)[:n], s[:n], rtol=1e-8)


def test_the_leading_directions_of_a_gradient_of_full_rank():
    x, dy = tokens(60, 80, 60, seed=1, decay=0.5)
    u, s, v_transposed = torch.linalg.svd(dy.mT @ x)
    found = sketched(x, dy, 8)
    assert largest_angle(found.u, u[:, :8]) < 0.02
    assert largest_angle(found.v, v_transposed[:8].mT) < 0.02
    assert torch.allclose(found.s, s[:8], rtol=1e-3)


FULL_RANK = {
    "out_size": st.integers(24, 60),
    "in_size": st.integers(24, 60),
    "num": st.integers(2, 8),
    "decay": st.sampled_from([0.02, 0.1, 0.3]),
    "gap": st.sampled_from([1.0, 10.0, 1e3]),
    "seed": st.integers(0, 999),
}
"""A spectrum that falls by e^-decay from one to the next, and after the directions wanted by `gap` more."""


def of_full_rank(out_size: int, in_size: int, num: int, decay: float, gap: float, seed: int):
    x, dy = tokens(min(out_size, in_size), out_size, in_size, seed, decay)
    dy[:num] *= gap
    return x, dy, dy.mT @ x


def outside(sketch: Sketch, gradient: torch.Tensor) -> torch.Tensor:
    """(I − QQᵀ) G."""
    q = sketch._basis
    return gradient - q @ (q.mT @ gradient)


@given(**FULL_RANK)
def test_what_is_left_of_a_gradient_of_full_rank_is_as_little_as_the_range_finder_promises(num, seed, **shape):
    """E‖(I − QQᵀ)G‖² ≤ (1 + k/(q − 1)) Σ_{j>k} σ_j² for k directions and q columns more (Halko et al., theorem 10.5).

    The mean over 16 draws of Ω stays below twice that: it was below the bound itself in 20,000 such examples.
    """
    x, dy, gradient = of_full_rank(num=num, seed=seed, **shape)
    left = [outside(summed(x, dy, num, 1000 * seed + draw), gradient).square().sum() for draw in range(16)]
    beyond = torch.linalg.svdvals(gradient)[num:].square().sum()
    assert sum(left) / len(left) <= 2 * (1 + num / (OVERSAMPLING - 1)) * beyond


@given(**FULL_RANK)
def test_singular_values_are_never_above_the_true_ones_and_no_further_below_than_what_is_left(num, seed, **shape):
    x, dy, gradient = of_full_rank(num=num, seed=seed, **shape)
    sketch = summed(x, dy, num, seed)
    found, true = sketch.triples(), torch.linalg.svdvals(gradient)
    left = outside(sketch, gradient)
    rounding = 1e-12 * true[0] ** 2
    assert len(found.s) == num
    assert (found.s.square() <= true[:num].square() + rounding).all()
    assert (true[:num].square() <= found.s.square() + torch.linalg.matrix_norm(left, 2) ** 2 + rounding).all()
    # The triples are the best approximation of QQᵀG, whose singular values beyond them are below those of G too.
    difference = gradient - found.u * found.s @ found.v.mT
    assert difference.square().sum() <= left.square().sum() + true[num:].square().sum() + rounding


def test_its_norm_is_an_estimate():
    x, dy = tokens(30, 50, 40, seed=2, decay=0.05)
    norms = torch.tensor([sketched(x, dy, 8, seed).norm for seed in range(40)])
    assert float(norms.square().mean().sqrt()) == pytest.approx(float(torch.linalg.matrix_norm(dy.mT @ x)), rel=0.1)


def test_vectors_are_orthonormal_and_few_rows_are_enough():
    x, dy = tokens(3, 5, 4, seed=3, decay=0.1)
    found = sketched(x, dy, 8)
    assert found.u.shape == (5, 3)
    assert found.v.shape == (4, 3)
    for vectors in (found.u, found.v):
        assert torch.allclose(vectors.mT @ vectors, torch.eye(3, dtype=torch.float64), atol=1e-10)


def test_a_sum_of_nothing_has_no_directions():
    assert sketched(torch.zeros(5, 6), torch.zeros(5, 7), 4).s.numel() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sums_are_float32_at_least_and_of_few_columns(dtype):
    sketch = Sketch((300, 200), 8, 0, like=torch.empty(0, dtype=dtype))
    assert sketch.sums.dtype == torch.float32
    assert sketch.sums.shape == (300, 8 + OVERSAMPLING)
    sketch.sums.normal_()
    sketch.turn()
    assert sketch.sums.shape == (8 + OVERSAMPLING, 200)


def test_sums_of_several_processes_add_up():
    x, dy = tokens(10, 30, 20, seed=4, decay=0.2)
    halves = [Sketch((30, 20), 4, 7, like=x) for _ in range(2)]
    for one in range(2):
        for sketch, x_part, dy_part in zip(halves, x.chunk(2), dy.chunk(2)):
            sketch.add(x_part, dy_part)
        total = halves[0].sums + halves[1].sums
        for sketch in halves:
            sketch.sums.copy_(total)
            if not one:
                sketch.turn()
    whole = sketched(x, dy, 4, seed=7)
    for sketch in halves:
        assert torch.allclose(sketch.triples().s, whole.s, rtol=1e-10)
