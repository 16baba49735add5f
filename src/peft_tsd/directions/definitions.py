"""Task-specific directions: the definitions of the paper, as pure functions on tensors.

Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in Parameter Efficient Fine-Tuning",
arXiv 2409.01035. Throughout, W is a weight of shape (out, in) with k = min(out, in) and singular value decomposition
`W = Σ_i σ_i u_i v_iᵀ`, σ descending; ΔW is its change, of the same shape.

A change may be given dense, or as low-rank factors `(B, A, scaling)` with B (out, r) and A (r, in), meaning
`scaling · B A`. The factors are never multiplied out. All arithmetic is float64; results come back on the weight's
device in the weight's dtype, or float32 where that is narrower. Where singular values repeat (or are zero), singular
vectors are not unique, and neither are the coordinates on them.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .change import LowRank, check_change, check_matrix
from .spectrum import Spectrum, as_double

Selection = Literal["tsd", "top", "bottom", "random", "random-change"]
"""Which directions of a weight are taken (see `TsdConfig.selection`)."""


class CoreBases(NamedTuple):
    """The core bases of a weight, as factors: basis i is `u[:, i] v[:, i]ᵀ` (definition 1)."""

    u: Tensor
    """Left singular vectors, shape (out, k)."""
    sigma: Tensor
    """Singular values, shape (k,), descending."""
    v: Tensor
    """Right singular vectors, shape (in, k)."""


class TaskSpecificDirections(NamedTuple):
    """The directions of a weight that a change moves most (definition 4), highest rate first."""

    indices: Tensor
    """Positions in the spectrum, 0 being the largest singular value; int64, shape (n,)."""
    rates: Tensor
    """Change rates, shape (n,), descending."""
    u: Tensor
    """Left singular vectors, shape (out, n)."""
    sigma: Tensor
    """Singular values, shape (n,)."""
    v: Tensor
    """Right singular vectors, shape (in, n)."""


def core_bases(weight: Tensor) -> CoreBases:
    """Core bases of `weight`: its k singular pairs (definition 1).

    Args:
        weight: Shape (out, in).

    Raises:
        TypeError: `weight` is not a floating-point tensor.
        ValueError: `weight` is not a matrix, is empty, or holds NaN or Inf.
    """
    check_matrix(weight, "weight")
    u, sigma, v_transposed = torch.linalg.svd(as_double(weight), full_matrices=False)
    return CoreBases(*(_like(weight, x) for x in (u, sigma, v_transposed.mT)))


def global_coordinates(weight: Tensor, matrix: Tensor) -> Tensor:
    """Coordinates of `matrix` on the global bases `u_i v_jᵀ` of `weight`: `Uᵀ M V`, shape (k, k) (definition 2).

    Args:
        weight: The weight whose bases are used, shape (out, in).
        matrix: The matrix to express, shape (out, in).

    Raises:
        TypeError, ValueError: As `core_bases`, for either argument; or the shapes differ.
    """
    check_change(weight, matrix)
    u, _, v = core_bases(as_double(weight))
    return _like(weight, u.mT @ as_double(matrix) @ v)


def core_coordinates(weight: Tensor, matrix: Tensor | LowRank) -> Tensor:
    """Coordinates of `matrix` on the core bases `u_i v_iᵀ` of `weight`: `u_iᵀ M v_i`, shape (k,) (definition 2).

    Args:
        weight: The weight whose bases are used, shape (out, in).
        matrix: The matrix to express, shape (out, in), or its factors (B, A, scaling).

    Raises:
        TypeError, ValueError: As `core_bases`, for either argument; or the shapes do not fit.
    """
    check_change(weight, matrix)
    return _like(weight, coordinates_on(Spectrum(weight), matrix))


def direction(weight: Tensor) -> Tensor:
    """The direction of `weight`: its own coordinates on its global bases, as one vector (definition 2).

    Returns:
        Shape (k·k,): σ_i at position i·k + i, zero elsewhere. The direction of another matrix M seen from `weight` is
        `global_coordinates(weight, M).flatten()`.

    Raises:
        TypeError, ValueError: As `core_bases`.
    """
    check_matrix(weight, "weight")
    return _like(weight, torch.diag(torch.linalg.svdvals(as_double(weight))).flatten())


def change_rates(weight: Tensor, delta: Tensor | LowRank, eps: float = 1e-6) -> Tensor:
    """Change rate of every core direction (definition 3): `δ_i = |u_iᵀ ΔW v_i| / (σ_i + ε)`.

    Args:
        weight: Frozen weight W, shape (out, in).
        delta: Its change ΔW, shape (out, in), or the factors (B, A, scaling) of it.
        eps: Keeps the rate finite where σ is zero; in the unit of σ.

    Returns:
        Shape (k,), in the order of the singular values (descending).

    Raises:
        TypeError, ValueError: As `core_bases`, for either argument; or the shapes do not fit; or `eps` is not
            positive.
    """
    check_change(weight, delta)
    return _like(weight, rates_on(Spectrum(weight), delta, eps))


def task_specific_directions(
    weight: Tensor,
    delta: Tensor | LowRank,
    num: int,
    eps: float = 1e-6,
    *,
    selection: Selection = "tsd",
    seed: int = 0,
) -> TaskSpecificDirections:
    """The `num` core directions of `weight` with the highest change rates under `delta` (definition 4).

    Args:
        weight: Frozen weight W, shape (out, in).
        delta: Its change ΔW, shape (out, in), or the factors (B, A, scaling) of it.
        num: How many to choose; a weight with fewer (k < num) gives all k.
        eps: As in `change_rates`.
        selection: Take others instead, as a control. Their rates are still those under `delta`.
        seed: Of the random selections.

    Raises:
        TypeError, ValueError: As `change_rates`; or `num` is not a positive integer.
    """
    if isinstance(num, bool) or not isinstance(num, int) or num < 1:
        raise ValueError(f"num must be a positive integer, the number of directions to choose; got {num!r}.")
    check_change(weight, delta)
    spectrum = Spectrum(weight)
    rates = rates_on(spectrum, delta, eps)
    return directions_on(spectrum, rates, ranked(rates, spectrum.sigma + eps, selection, seed)[:num], like=weight)


def coordinates_on(spectrum: Spectrum, delta: Tensor | LowRank) -> Tensor:
    """`core_coordinates` of a weight that has been factorized: float64, shape (k,). `delta` is not checked."""
    if isinstance(delta, Tensor):
        return (spectrum.u() * (as_double(delta) @ spectrum.v())).sum(0)
    b, a, scaling = delta
    return scaling * (spectrum.left_coordinates(b) * spectrum.right_coordinates(a.mT)).sum(1)


def rates_on(spectrum: Spectrum, delta: Tensor | LowRank, eps: float) -> Tensor:
    """`change_rates` of a weight that has been factorized: float64, shape (k,). `delta` is not checked."""
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite; got {eps!r}.")
    return coordinates_on(spectrum, delta).abs() / (spectrum.sigma + eps)


def ranked(rates: Tensor, sigma: Tensor, selection: Selection, seed: int) -> Tensor:
    """All positions of the spectrum, in the order in which they would be taken."""
    if selection == "top":
        return torch.arange(len(rates), device=rates.device)
    if selection == "bottom":
        return torch.arange(len(rates), device=rates.device).flip(0)
    generator = torch.Generator().manual_seed(seed)
    if selection == "random":
        return torch.randperm(len(rates), generator=generator).to(rates.device)
    if selection == "random-change":
        # The coordinates u_iᵀ N v_i of a Gaussian N are independent standard normal numbers.
        rates = torch.randn(len(rates), generator=generator, dtype=rates.dtype).abs().to(sigma) / sigma
    return highest_first(rates)


def highest_first(rates: Tensor) -> Tensor:
    """Positions of change rates, the highest first; int64, shape (k,)."""
    # A stable sort, so that equal rates are taken in the order of the spectrum on every machine.
    return torch.sort(rates, descending=True, stable=True).indices


def directions_on(spectrum: Spectrum, rates: Tensor, indices: Tensor, like: Tensor) -> TaskSpecificDirections:
    """`TaskSpecificDirections` of those `indices` of a factorized weight, in the device and dtype for `like`."""
    return TaskSpecificDirections(
        indices=indices.to(like.device),
        rates=_like(like, rates[indices]),
        u=_like(like, spectrum.u(indices)),
        sigma=_like(like, spectrum.sigma[indices]),
        v=_like(like, spectrum.v(indices)),
    )


def _like(weight: Tensor, result: Tensor) -> Tensor:
    return result.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
