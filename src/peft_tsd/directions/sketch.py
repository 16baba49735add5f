"""Leading singular directions of a sum of outer products that is never formed.

The gradient of a loss with respect to a weight is `G = Σ dy xᵀ`, shape (out, in), over tokens with input x and
gradient dy of the output. Its leading singular triples need no G: by the randomized range finder (Halko, Martinsson,
Tropp, arXiv 0909.4061) with p = number wanted + `OVERSAMPLING` columns,

    first sums     Y = Σ dy (xᵀ Ω)     shape (out, p), Ω Gaussian (in, p);    Q = qr(Y)
    second sums    Z = Σ (Qᵀ dy) xᵀ    shape (p, in);    Z = Ũ S Vᵀ,    U = Q Ũ

Both are two skinny products for the tokens that pass, and (out + in)·p numbers are kept. The second sums are of the
same tokens: then the triples are those of `Q Qᵀ G`, which is G itself where its rank is at most p. The weight is never
looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spectrum import as_double

OVERSAMPLING = 8
"""Columns more than directions wanted; with so many the range finder is near its best (Halko et al., section 1.3)."""


RANK_TOLERANCE = 1e-7
"""A direction whose part of a sum is this much smaller than the largest is rounding: sums are float32."""


class Triples(NamedTuple):
    """Leading singular triples `u_j s_j v_jᵀ` of a matrix, in float64, s descending."""

    u: Tensor
    """Left singular vectors, shape (out, n)."""
    s: Tensor
    """Singular values, shape (n,)."""
    v: Tensor
    """Right singular vectors, shape (in, n)."""
    norm: float
    """‖G‖ (Frobenius), estimated from the first sums: `‖GΩ‖²/p` has the mean ‖G‖²."""


class Sketch:
    """The sums of one matrix. First sums, `turn`, second sums, `triples`.

    Attributes:
        sums: Those that are being added up: Y, then Z. What other processes have added up may be added in place.
    """

    def __init__(self, shape: tuple[int, int], num: int, seed: int, like: Tensor) -> None:
        """
        Args:
            shape: (out, in).
            num: How many triples are wanted; a matrix with fewer gives all.
            seed: Of Ω; the same in every process.
            like: For its device; sums are in its dtype, or float32 where that is narrower.
        """
        out_size, in_size = shape
        columns = min(num + OVERSAMPLING, out_size, in_size)
        generator = torch.Generator().manual_seed(seed)
        dtype = torch.promote_types(like.dtype, torch.float32)
        omega = torch.randn(in_size, columns, generator=generator, dtype=torch.float32)
        self._num = min(num, columns)
        self._omega: Tensor | None = omega.to(like.device, dtype)
        self._basis: Tensor | None = None  # Q, from the turn on
        self._square = 0.0
        self.sums = torch.zeros(out_size, columns, dtype=dtype, device=like.device)

    @torch.no_grad()
    def add(self, x: Tensor, dy: Tensor) -> None:
        """Add tokens: their inputs x, shape (tokens, in), and gradients dy of the output, (tokens, out)."""
        x, dy = x.to(self.sums.dtype), dy.to(self.sums.dtype)
        if self._omega is not None:
            self.sums.addmm_(dy.mT, x @ self._omega)
        else:
            assert self._basis is not None
            self.sums.addmm_((dy @ self._basis).mT, x)

    @torch.no_grad()
    def turn(self) -> None:
        """End the first sums, and begin the second.

        Raises:
            ValueError: There is NaN or Inf in them.
        """
        assert self._omega is not None
        self._check()
        first = as_double(self.sums)
        self._square = float(first.square().sum()) / first.shape[1]
        self._basis = torch.linalg.qr(first).Q.to(self.sums)
        self.sums = self.sums.new_zeros(self._basis.shape[1], len(self._omega))
        self._omega = None

    @torch.no_grad()
    def triples(self) -> Triples:
        """What was found, from the second sums.

        Raises:
            ValueError: There is NaN or Inf in them.
        """
        assert self._basis is not None
        self._check()
        # Z is short and wide: its decomposition is that of the small factor of its QR.
        q, r = torch.linalg.qr(as_double(self.sums).mT)
        u, s, v_transposed = torch.linalg.svd(r.mT)
        # A G of fewer tokens than columns has fewer triples; what is far below the largest is rounding.
        n = min(self._num, int((s > RANK_TOLERANCE * s[0]).sum()))
        return Triples(as_double(self._basis) @ u[:, :n], s[:n], q @ v_transposed[:n].mT, self._square**0.5)

    def _check(self) -> None:
        if not bool(self.sums.isfinite().all()):
            raise ValueError(
                "the gradient of the loss has NaN or Inf in it; look at the loss of the batches, or use float32."
            )
