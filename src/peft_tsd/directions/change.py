"""A change of a weight: dense, or as low-rank factors `(B, A, scaling)` with B (out, r) and A (r, in), meaning
`scaling · B A`. The factors are never multiplied out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spectrum import as_double

LowRank = tuple[Tensor, Tensor, float]
"""A change `scaling · B A` as (B, A, scaling), with B (out, r) and A (r, in)."""


def check_matrix(matrix: Tensor, name: str) -> None:
    """Refuse what no definition here covers, naming it `name`.

    Raises:
        TypeError: Not a floating-point tensor.
        ValueError: Not two-dimensional, empty, or holding NaN or Inf.
    """
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point():
        given = matrix.dtype if isinstance(matrix, Tensor) else type(matrix).__name__
        raise TypeError(f"{name} must be a floating-point tensor of shape (out, in); got {given}.")
    if matrix.ndim != 2 or matrix.numel() == 0:
        raise ValueError(f"{name} must be a non-empty matrix of shape (out, in); got shape {tuple(matrix.shape)}.")
    bad = matrix.numel() - int(torch.isfinite(matrix).sum())
    if bad:
        raise ValueError(
            f"{name} of shape {tuple(matrix.shape)} holds {bad} NaN or Inf; its directions are not defined. "
            "Look for a diverged training step or a damaged checkpoint."
        )


def check_change(weight: Tensor, delta: Tensor | LowRank) -> None:
    """Refuse a weight, or a change of it, that the definitions here do not cover.

    Raises:
        TypeError, ValueError: As `check_matrix`, for either; or the shapes do not fit; or a scaling is not finite.
    """
    check_matrix(weight, "weight")
    if isinstance(delta, Tensor):
        check_matrix(delta, "delta")
        shape = tuple(delta.shape)
    else:
        if not isinstance(delta, tuple) or len(delta) != 3:
            raise TypeError(f"delta must be a dense tensor or the tuple (B, A, scaling); got {type(delta).__name__}.")
        b, a, scaling = delta
        check_matrix(b, "delta's B")
        check_matrix(a, "delta's A")
        if b.shape[1] != a.shape[0]:
            raise ValueError(
                "delta's factors must be B (out, r) and A (r, in) with one r; "
                f"got B {tuple(b.shape)} and A {tuple(a.shape)}."
            )
        if scaling != scaling or abs(scaling) == float("inf"):
            raise ValueError(f"delta's scaling must be finite; got {scaling}.")
        shape = (b.shape[0], a.shape[1])
    if shape != tuple(weight.shape):
        raise ValueError(f"delta must have the weight's shape {tuple(weight.shape)}; got {shape}.")


def is_no_change(delta: Tensor | LowRank) -> bool:
    """Whether a change is zero, or the difference of two low-rank products that are one: it has no directions."""
    if isinstance(delta, Tensor):
        return not bool(delta.any())
    b, a, scaling = delta
    if not scaling or not b.any() or not a.any():
        return True
    # Of A − A₀ and B − B₀ nothing is left but the rounding of float64; a step changes float32 by 1e-7 at least.
    return change_norm(delta) <= 1e-12 * abs(scaling) * float(as_double(b).norm() * as_double(a).norm())


def best_energy(delta: Tensor | LowRank, num: int) -> float:
    """The most of ‖ΔW‖² that `num` orthonormal pairs can hold, 0 to 1: what its `num` leading singular values hold
    (Eckart and Young). 0 for no change."""
    if isinstance(delta, Tensor):
        dense = as_double(delta)
        gram = dense @ dense.mT if dense.shape[0] <= dense.shape[1] else dense.mT @ dense
        energies = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0)
    else:
        b, a, _ = delta
        core_b = torch.linalg.qr(as_double(b), mode="r").R
        core_a = torch.linalg.qr(as_double(a).mT, mode="r").R
        energies = torch.linalg.svdvals(core_b @ core_a.mT).square()
    total = float(energies.sum())
    return float(energies[:num].sum()) / total if total > 0 else 0.0


def energy_along(delta: Tensor | LowRank, u: Tensor, v: Tensor) -> float:
    """The part of ‖ΔW‖² along the orthonormal pairs u (out, n) and v (in, n): `Σ_j (u_jᵀ ΔW v_j)² / ‖ΔW‖²`."""
    total = change_norm(delta) ** 2
    u, v = as_double(u), as_double(v)
    if isinstance(delta, Tensor):
        found = ((u.mT @ as_double(delta)).mT * v).sum(0)
    else:
        b, a, scaling = delta
        found = scaling * ((as_double(b).mT @ u) * (as_double(a) @ v)).sum(0)
    return float(found.square().sum()) / total if total > 0 else 0.0


def change_norm(delta: Tensor | LowRank) -> float:
    """‖ΔW‖ (Frobenius); of low-rank factors, from the (r, r) core between the QR factors of B and Aᵀ."""
    if isinstance(delta, Tensor):
        return float(as_double(delta).norm())
    b, a, scaling = delta
    # Not from BᵀB and AAᵀ: squaring would lose half of the digits where the factors' terms cancel each other, as those
    # of a LoRA-Init that has just begun.
    core_b = torch.linalg.qr(as_double(b), mode="r").R
    core_a = torch.linalg.qr(as_double(a).mT, mode="r").R
    return abs(scaling) * float((core_b @ core_a.mT).norm())
