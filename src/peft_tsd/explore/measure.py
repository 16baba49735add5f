"""One weight and its change, measured along the weight's core directions; and what follows from several of those.

Everything is float64 and comes from one factorization a weight. Si et al., arXiv 2409.01035; the definitions are in
`peft_tsd.directions`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..directions.change import LowRank, best_energy, change_norm, check_change, energy_along
from ..directions.definitions import coordinates_on
from ..directions.spectrum import Spectrum, as_double
from .results import Agreement, Exploration, FloatArray, IntArray, Overlap, WeightChange, highest
from .trajectory import Trajectory, same_norm


def measure(
    name: str,
    weight: Tensor,
    delta: Tensor | LowRank,
    *,
    num_directions: int = 8,
    eps: float = 1e-6,
    spectrum: Spectrum | None = None,
    gradient: tuple[Tensor, Tensor] | None = None,
) -> WeightChange:
    """How `weight` changed by `delta`, along its core directions.

    Args:
        name: The module's name in the model.
        weight: W, shape (out, in), any float dtype, on any device.
        delta: ΔW, shape (out, in), or its factors (B, A, scaling) with B (out, r) and A (r, in), which are never
            multiplied out.
        num_directions: How many directions count as task-specific; a weight with fewer (k < num_directions) gives all.
        eps: ε of the change rate, in the unit of σ.
        spectrum: The factorization of `weight`, where it is there already.
        gradient: The leading singular directions of the gradient, u (out, n) and v (in, n), where they are known; the
            first `num_directions` of them count.

    Raises:
        TypeError, ValueError: As `peft_tsd.directions.task_specific_directions`.
    """
    check_settings(num_directions, eps)
    check_change(weight, delta)
    spectrum = spectrum or Spectrum(weight)
    coordinates = _array(coordinates_on(spectrum, delta))
    sigma = _array(spectrum.sigma)
    rates = np.abs(coordinates) / (sigma + eps)
    directions = highest(rates, num_directions)
    # The highest of those that are held: of no more directions than the others are.
    leading = None if gradient is None else tuple(part[:, : len(directions)] for part in gradient)
    layer, module = place(name)
    return WeightChange(
        name=name,
        layer=layer,
        module=module,
        shape=(weight.shape[0], weight.shape[1]),
        sigma=sigma,
        coordinates=coordinates,
        rates=rates,
        directions=directions,
        random=random_directions(name, len(sigma), num_directions),
        change_norm=change_norm(delta),
        weight_norm=float(as_double(weight).norm()),
        best_energy=best_energy(delta, len(directions)),
        gradient_energy=None if leading is None else energy_along(delta, *leading),
    )


def check_settings(num_directions: int, eps: float) -> None:
    """Refuse what is no number of directions or no ε.

    Raises:
        ValueError: With what was given.
    """
    if isinstance(num_directions, bool) or not isinstance(num_directions, int) or num_directions < 1:
        raise ValueError(f"num_directions must be a positive integer; got {num_directions!r}.")
    if not 0 < eps < float("inf"):
        raise ValueError(f"eps must be positive and finite; got {eps!r}.")


def random_directions(name: str, k: int, num: int) -> IntArray:
    """min(num, k) different positions below k, drawn by a generator that the weight's name seeds."""
    # Python's own hash of a string differs from process to process.
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).choice(k, size=min(num, k), replace=False).astype(np.int64)


def place(name: str) -> tuple[int | None, str]:
    """The number of the block a module is in, and the rest of its name.

    >>> place("model.layers.3.self_attn.q_proj")
    (3, 'self_attn.q_proj')
    """
    found = re.fullmatch(r"(?:.*?\.)?(\d+)\.(.+)", name)
    return (int(found[1]), found[2]) if found else (None, name)


def overlap(explorations: Sequence[Exploration]) -> Overlap:
    """Whether models fine-tuned from one base share their task-specific directions.

    Args:
        explorations: Two or more, of one base, with the same `num_directions`.

    Raises:
        ValueError: There are fewer than two; they differ in `num_directions`; or a weight has another number of
            directions in one than in another.
    """
    if len(explorations) < 2:
        raise ValueError(f"overlap needs two or more explorations; got {len(explorations)}.")
    sizes = {one.num_directions for one in explorations}
    if len(sizes) > 1:
        raise ValueError(
            f"Explorations with different num_directions cannot be compared; got {sorted(sizes)}. "
            "Explore all with the same."
        )
    by_name = [{weight.name: weight for weight in one.weights} for one in explorations]
    names = tuple(name for name in by_name[0] if all(name in found for found in by_name))
    count = len(explorations)
    shared = np.empty((len(names), count, count))
    chance = np.empty(len(names))
    random_change = np.empty(len(names))
    random = [{weight.name: weight for weight in explorations[0].random_change(seed).weights} for seed in (0, 1)]
    for i, name in enumerate(names):
        weights = [found[name] for found in by_name]
        _check_same_k(name, [weight.k for weight in weights])
        sets = [set(weight.directions.tolist()) for weight in weights]
        shared[i] = [[len(a & b) / len(a) for b in sets] for a in sets]
        chance[i] = len(sets[0]) / weights[0].k
        random_change[i] = np.isin(random[0][name].directions, random[1][name].directions).mean()
    return Overlap(tuple(one.tuned for one in explorations), names, shared, chance, random_change)


def agreement(
    trajectory: Trajectory, truth: Exploration | None = None, *, predicted: int = 8, true: int = 8
) -> Agreement:
    """How early in training the task-specific directions of LoRA's ΔW are the true ones.

    A direction that has not moved at all is never predicted: at a step where a weight's ΔW is still zero, both its
    precision and its recall are 0.

    Args:
        trajectory: Change rates recorded during training, by `DirectionRecorder`.
        truth: The model whose directions are the true ones, such as one fully fine-tuned on the same data; by default
            the end of the recorded run itself.
        predicted: How many of the highest rates of each step are taken as predicted.
        true: How many of the truth's highest rates are taken as true. The paper does not print the sizes it used.

    Raises:
        ValueError: A size is not a positive integer; nothing was recorded; the two have no weight in common, or one
            of another number of directions.
    """
    for option, size in (("predicted", predicted), ("true", true)):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"{option} must be a positive integer, the size of a set of directions; got {size!r}.")
    randomly: dict[str, FloatArray] | None = None
    if truth is None:
        words = f"the end of the run (step {trajectory.steps[-1]})"
        rates_of_truth = {name: trajectory.rates(name)[-1].astype(np.float64) for name in trajectory.weights}
    else:
        words = truth.tuned
        rates_of_truth = {weight.name: weight.rates for weight in truth.weights}
        randomly = {weight.name: weight.rates for weight in truth.random_change().weights}
        for weight in truth.weights:
            norm = trajectory.norms.get(weight.name, weight.weight_norm)
            if not same_norm(norm, weight.weight_norm):
                raise ValueError(
                    f"{trajectory.folder} and {words} are not of one base model: its weight {weight.name} has norm "
                    f"{norm:.6g} in the first and {weight.weight_norm:.6g} in the second."
                )
    # A weight that the truth left as it was has no true directions.
    names = tuple(n for n in trajectory.weights if n in rates_of_truth and rates_of_truth[n].any())
    if not names:
        raise ValueError(
            f"{trajectory.folder} and {words} have no changed weight in common: "
            f"{_some(trajectory.weights)} were recorded, {_some(tuple(rates_of_truth))} are known of the other."
        )
    precision = np.zeros((len(trajectory.steps), len(names)))
    recall = np.zeros_like(precision)
    chance = np.zeros(len(names))
    random_change = np.zeros(len(names))
    for i, name in enumerate(names):
        rates = trajectory.rates(name)
        k = rates.shape[1]
        _check_same_k(name, [k, len(rates_of_truth[name])])
        right = set(highest(rates_of_truth[name], true).tolist())
        chance[i] = len(right) / k
        if randomly is not None:
            chosen = highest(randomly[name], predicted).tolist()
            random_change[i] = len(right.intersection(chosen)) / len(chosen)
        for t, row in enumerate(rates):
            chosen = [j for j in highest(row.astype(np.float64), predicted).tolist() if row[j] > 0]
            hits = len(right.intersection(chosen))
            precision[t, i] = hits / len(chosen) if chosen else 0.0
            recall[t, i] = hits / len(right)
    return Agreement(
        truth=words,
        predicted=predicted,
        true=true,
        steps=trajectory.steps,
        weights=names,
        precision=precision,
        recall=recall,
        chance=chance,
        random_change=None if randomly is None else random_change,
    )


def _check_same_k(name: str, sizes: list[int]) -> None:
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{name} has {' and '.join(map(str, sizes))} directions: these are not of the same base model."
        )


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") if names else "none"


def _array(tensor: Tensor) -> FloatArray:
    found: FloatArray = tensor.cpu().numpy()
    return found
