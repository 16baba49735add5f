import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_tsd.directions.spectrum import Spectrum
from support import reference


def weight_of(sigma: torch.Tensor, out: int, inner: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = min(out, inner)
    u = torch.linalg.qr(torch.randn(out, k, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inner, k, generator=generator, dtype=torch.float64)).Q
    return (u * sigma) @ v.mT


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0, 9), st.integers(0, 2**31))
def test_spectrum_agrees_with_the_svd_at_every_condition_number(out, inner, decades, seed):
    sigma = torch.logspace(1, 1 - decades, min(out, inner), dtype=torch.float64)
    weight = weight_of(sigma, out, inner, seed)
    found = Spectrum(weight)
    np.testing.assert_allclose(found.sigma, reference.svd(weight)[1], rtol=1e-3, atol=1e-14)
    u, v = found.u(), found.v()
    torch.testing.assert_close((u * found.sigma) @ v.mT, weight, rtol=1e-8, atol=1e-8)
    columns = torch.randn(out, 3, dtype=torch.float64)
    torch.testing.assert_close(found.left_coordinates(columns), u.mT @ columns, rtol=1e-6, atol=1e-6)
    rows = torch.randn(inner, 3, dtype=torch.float64)
    torch.testing.assert_close(found.right_coordinates(rows), v.mT @ rows, rtol=1e-6, atol=1e-6)
    some = torch.arange(0, len(found.sigma), 2)
    torch.testing.assert_close(found.u(some), u[:, some])
    torch.testing.assert_close(found.v(some), v[:, some])


@pytest.mark.parametrize(
    ("smallest", "expected"),
    [(1e-3, "gram"), (1e-9, "svd"), (0.0, "svd")],
    ids=["real", "nearly singular", "singular"],
)
def test_the_full_svd_is_taken_where_the_bound_does_not_hold(smallest, expected):
    sigma = torch.cat([torch.linspace(10, 1, 15, dtype=torch.float64), torch.tensor([smallest], dtype=torch.float64)])
    found = Spectrum(weight_of(sigma, 20, 16))
    assert ("gram" if found._tall is not None else "svd") == expected
    np.testing.assert_allclose(found.sigma[-1], smallest, rtol=1e-4, atol=1e-13)


def test_a_failed_eigendecomposition_falls_back_to_the_svd(monkeypatch):
    def fail(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    weight = torch.randn(6, 4, dtype=torch.float64)
    np.testing.assert_allclose(Spectrum(weight).sigma, reference.svd(weight)[1])
