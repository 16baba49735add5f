"""The factorization of one large frozen weight, as identification needs it.

Change rates need the singular values of W and, for every singular pair, two short products: `Uᵀ B` and `A V` with the
low-rank factors of the change. They never need all of U. So the smaller Gram matrix is diagonalized in float64,
`WᵀW = V Σ² Vᵀ` (or `WWᵀ` for a wide W), and a left vector is formed as `u = W v / σ` only where one is asked for.

Squaring costs accuracy at the small end, which is where task-specific directions live: a computed eigenvalue is wrong
by up to about `k · eps · σ₁²`, so σ_i is wrong by a fraction of up to about `k · eps · (σ₁/σ_i)²`. Where that bound
passes `GRAM_TOLERANCE` for the smallest σ (nearly singular, rank-deficient and zero weights) the full float64 SVD is
taken instead. Of the 150 q, k, v, up and down weights of SmolLM2-135M (σ₁/σ_k: median 19, 95th percentile 2e4, largest
8e5) four take it; `benchmarks/identify.py` compares the choice with its alternatives.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

GRAM_TOLERANCE = 1e-3
"""Largest bound on the relative error of a singular value at which the Gram factorization is trusted."""

BLOCK = 1024
"""Rows of a weight that are in float64 at one time."""


class Spectrum:
    """Singular values and vectors of one weight, in float64 and in descending order of σ.

    Attributes:
        sigma: Singular values, shape (k,) with k = min(out, in).
    """

    def __init__(self, weight: Tensor) -> None:
        """Factorize `weight`, shape (out, in), any float dtype, all finite."""
        # Work on the tall form; a wide weight swaps the roles of left and right. It is kept as it came, so that a
        # spectrum holds no more than σ and the short side's vectors.
        self._wide = weight.shape[0] < weight.shape[1]
        tall = weight.detach().mT if self._wide else weight.detach()
        self._tall: Tensor | None = tall
        self._long: Tensor | None = None  # (long, k), only where the full SVD was needed
        gram = _gram_factorization(tall)
        if gram is not None:
            self.sigma, self._short = gram
        else:
            self._tall = None
            self._long, self.sigma, short_transposed = torch.linalg.svd(as_double(tall), full_matrices=False)
            self._short = short_transposed.mT

    def cpu(self) -> Spectrum:
        """The same on the CPU."""
        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, value.cpu())
        return moved

    def bytes_on_cpu(self) -> int:
        """What `cpu()` holds there, but for a weight that is there anyway."""
        held = [self.sigma, self._short, self._long]
        if self._tall is not None and self._tall.device.type != "cpu":
            held.append(self._tall)
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    def u(self, indices: Tensor | None = None) -> Tensor:
        """Left singular vectors, shape (out, n); all k of them without `indices`."""
        return self._select_short(indices) if self._wide else self._select_long(indices)

    def v(self, indices: Tensor | None = None) -> Tensor:
        """Right singular vectors, shape (in, n); all k of them without `indices`."""
        return self._select_long(indices) if self._wide else self._select_short(indices)

    def left_coordinates(self, columns: Tensor) -> Tensor:
        """`Uᵀ X` for X of shape (out, n): shape (k, n)."""
        return self._onto_short(columns) if self._wide else self._onto_long(columns)

    def right_coordinates(self, columns: Tensor) -> Tensor:
        """`Vᵀ X` for X of shape (in, n): shape (k, n)."""
        return self._onto_long(columns) if self._wide else self._onto_short(columns)

    def _select_short(self, indices: Tensor | None) -> Tensor:
        return self._short if indices is None else self._short[:, indices]

    def _select_long(self, indices: Tensor | None) -> Tensor:
        if self._tall is None:
            assert self._long is not None
            return self._long if indices is None else self._long[:, indices]
        sigma = self.sigma if indices is None else self.sigma[indices]
        short = self._select_short(indices) / sigma
        return torch.cat([as_double(rows) @ short for rows in torch.split(self._tall, BLOCK)])

    def _onto_short(self, columns: Tensor) -> Tensor:
        return self._short.mT @ as_double(columns)

    def _onto_long(self, columns: Tensor) -> Tensor:
        if self._tall is None:
            assert self._long is not None
            return self._long.mT @ as_double(columns)
        # Onto the k short vectors first, through W: no (long, k) matrix is ever formed.
        return self._onto_short(_transposed_product(self._tall, columns)) / self.sigma[:, None]


def as_double(tensor: Tensor) -> Tensor:
    """`tensor` in float64, detached; on the CPU where the device has no float64 (Apple's MPS)."""
    tensor = tensor.detach()
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _transposed_product(tall: Tensor, columns: Tensor) -> Tensor:
    """`Tᵀ X` in float64 for T (n, k) and X (n, m), without a copy of T."""
    product = as_double(tall[:0]).mT @ as_double(columns[:0])  # zeros, on the device that has float64
    for rows, others in zip(torch.split(tall, BLOCK), torch.split(columns, BLOCK)):
        product.addmm_(as_double(rows).mT, as_double(others))
    return product


def _gram_factorization(tall: Tensor) -> tuple[Tensor, Tensor] | None:
    """σ (k,) and the short-side vectors (k, k) of `tall` (n, k), or None where their error bound is too large."""
    k = tall.shape[1]
    try:
        squares, vectors = torch.linalg.eigh(_transposed_product(tall, tall))
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return None
    largest, smallest = squares[-1], squares[0]
    # Written so that a zero weight, or an eigenvalue rounded below zero, fails the comparison.
    if not k * torch.finfo(squares.dtype).eps * largest < GRAM_TOLERANCE * smallest:
        return None
    return squares.flip(0).sqrt(), vectors.flip(1)
