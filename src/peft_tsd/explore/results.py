"""What exploring a fine-tuned model finds: plain arrays, and the numbers that follow from them.

After Si et al., arXiv 2409.01035: for a weight W (out, in) with singular pairs `σ_i, u_i, v_i` and its change ΔW, the
core coordinates are `c_i = u_iᵀ ΔW v_i`, the change rates `δ_i = |c_i| / (σ_i + ε)`, and the task-specific directions
(TSDs) the `num_directions` with the highest rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

IntArray = NDArray[np.int64]

HIGHEST = (1, 2, 4, 8, 16)
"""How many of the highest rates are summed, for their share of the total."""


def highest(rates: FloatArray, num: int) -> IntArray:
    """Positions of the `num` highest rates, highest first; of equal ones, that of the larger singular value."""
    return np.argsort(-rates, kind="stable")[:num].astype(np.int64)


@dataclass(frozen=True)
class Share:
    """How much a set of core directions carries.

    Attributes:
        rate: Their part of the sum of all change rates, 0 to 1.
        energy: Their part of ‖ΔW‖² (Frobenius): `Σ c_i² / ‖ΔW‖²`, 0 to 1.
    """

    rate: float
    energy: float


@dataclass(frozen=True)
class WeightChange:
    """How one weight changed, seen along its own core directions.

    Attributes:
        name: The module's name in the model, such as `model.layers.3.self_attn.q_proj`.
        layer: The number of the block it is in (the first number in its name), or None.
        module: The rest of the name, without the number and what stands before it, such as `self_attn.q_proj`.
        shape: (out, in).
        sigma: Singular values of W, descending; shape (k,) with k = min(out, in).
        coordinates: Core coordinates c of ΔW, signed, shape (k,).
        rates: Change rates δ, shape (k,).
        directions: The TSDs: positions in the spectrum (0: the largest singular value), highest rate first; shape
            (min(num_directions, k),).
        random: As many positions, drawn at random with a fixed seed, for comparison.
        change_norm: ‖ΔW‖ (Frobenius).
        weight_norm: ‖W‖ (Frobenius).
        best_energy: The part of ‖ΔW‖² in as many leading singular directions of ΔW itself, the most that so many
            rank-one directions can hold; None where it is not known.
        gradient_energy: The part of it along the leading directions of the gradient, as many, or as the adapter holds
            where that is fewer; None without.
    """

    name: str
    layer: int | None
    module: str
    shape: tuple[int, int]
    sigma: FloatArray
    coordinates: FloatArray
    rates: FloatArray
    directions: IntArray
    random: IntArray
    change_norm: float
    weight_norm: float
    best_energy: float | None = None
    gradient_energy: float | None = None

    @property
    def k(self) -> int:
        """How many core directions the weight has."""
        return len(self.sigma)

    @property
    def core(self) -> float:
        """The part of ‖ΔW‖² that lies on the core diagonal, `Σ_i c_i² / ‖ΔW‖²`, 0 to 1; 0 for no change."""
        return self.share(range(self.k)).energy

    @property
    def positions(self) -> FloatArray:
        """Where in the spectrum the TSDs lie: 0 the largest singular value, 1 the smallest; in `directions`' order."""
        return self.directions / max(self.k - 1, 1)

    @property
    def gini(self) -> float:
        """The Gini coefficient of the rates: 0 where all are equal, towards 1 where a single one carries all."""
        total = self.rates.sum()
        if total == 0:
            return 0.0
        ranks = np.arange(1, self.k + 1)
        return float((2 * ranks - self.k - 1) @ np.sort(self.rates) / (self.k * total))

    def share(self, indices: Sequence[int] | range | IntArray) -> Share:
        """What the core directions at `indices` carry; 0 for no change."""
        chosen = np.asarray(indices, dtype=np.int64)
        rates, energy = self.rates.sum(), self.change_norm**2
        return Share(
            rate=float(self.rates[chosen].sum() / rates) if rates > 0 else 0.0,
            energy=float(np.square(self.coordinates[chosen]).sum() / energy) if energy > 0 else 0.0,
        )

    def concentration(self) -> dict[int, float]:
        """The part of the sum of all rates in the n highest, for n of `HIGHEST`."""
        return {n: self.share(highest(self.rates, n)).rate for n in HIGHEST}

    def choices(self) -> dict[str, Share]:
        """The TSDs beside as many top, bottom and random directions: `tsd`, `top`, `bottom`, `random`."""
        n = len(self.directions)
        return {
            "tsd": self.share(self.directions),
            "top": self.share(range(n)),
            "bottom": self.share(range(self.k - n, self.k)),
            "random": self.share(self.random),
        }


@dataclass(frozen=True)
class Exploration:
    """One fine-tuned model seen from its base.

    Attributes:
        base, tuned: As they were given.
        kind: What `tuned` is: `"checkpoint"`, or the adapter's PEFT type, such as `"LORA"`.
        num_directions: How many directions of each weight count as TSDs.
        eps: ε of the change rate, in the unit of σ.
        weights: One entry a matched weight that changed, in the model's order.
        left_out: The names of weights that were not measured, and why.
        along: The method, such as `"lora-tsd"`, of an adapter that was trained along directions, or started from them;
            None for others.
        direction_source: Whose these are, the weight's own or the gradient's; None without.
    """

    base: str
    tuned: str
    kind: str
    num_directions: int
    eps: float
    weights: tuple[WeightChange, ...]
    left_out: dict[str, str]
    along: str | None = None
    direction_source: str | None = None

    def __getitem__(self, name: str) -> WeightChange:
        for weight in self.weights:
            if weight.name == name:
                return weight
        raise KeyError(name)

    def random_change(self, seed: int = 0) -> Exploration:
        """What a random change of the same size would show: the null model that any finding is to be held against.

        The core coordinates of a dense ΔW of independent Gaussian entries are independent and Gaussian too, with no
        regard to σ. Its change rates fall off as 1/σ, and so crowd towards the small singular values by themselves.

        Args:
            seed: Of the draw.
        """
        rng = np.random.default_rng(seed)
        return replace(
            self,
            tuned="a random change",
            weights=tuple(_randomly_changed(weight, self.eps, rng) for weight in self.weights),
        )


def _randomly_changed(weight: WeightChange, eps: float, rng: np.random.Generator) -> WeightChange:
    out, inner = weight.shape
    coordinates = rng.normal(0, weight.change_norm / np.sqrt(out * inner), weight.k)
    rates = np.abs(coordinates) / (weight.sigma + eps)
    directions = highest(rates, len(weight.directions))
    return replace(
        weight,
        coordinates=coordinates,
        rates=rates,
        directions=directions,
        best_energy=None,
        gradient_energy=None,
    )


@dataclass(frozen=True)
class Overlap:
    """Whether fine-tuned models of one base share their TSDs.

    Attributes:
        tuned: The models, in the order of the matrices below.
        weights: The weights all of them changed.
        shared: `|S_a ∩ S_b| / |S|` of the TSD sets, shape (weights, models, models); 1 on the diagonal.
        chance: What two random sets of that size share on average, `|S| / k`, shape (weights,).
        random_change: What two random changes of the weight share (`Exploration.random_change`), shape (weights,).
    """

    tuned: tuple[str, ...]
    weights: tuple[str, ...]
    shared: FloatArray
    chance: FloatArray
    random_change: FloatArray


@dataclass(frozen=True)
class Agreement:
    """How well directions predicted during training agree with the true TSDs.

    At each step the `predicted` directions with the highest change rates are compared with the `true` highest of the
    truth: precision is the part of the predicted that are true, recall the part of the true that were predicted.

    Attributes:
        truth: What the true directions are those of, in words.
        predicted, true: Sizes of the two sets; a weight with fewer directions uses all it has.
        steps: Optimizer steps at which rates were recorded, shape (t,).
        weights: The weights compared.
        precision, recall: Shape (t, weights), 0 to 1.
        chance: Precision of a random choice, `true / k`, shape (weights,); random recall is `predicted / k`.
        random_change: Precision of the highest rates of a random change (`Exploration.random_change`), shape
            (weights,): what the weights alone give away. Its recall is that times `predicted / true`. None where the
            truth is the end of the run itself.
    """

    truth: str
    predicted: int
    true: int
    steps: IntArray
    weights: tuple[str, ...]
    precision: FloatArray
    recall: FloatArray
    chance: FloatArray
    random_change: FloatArray | None = None


def summary(
    explorations: Sequence[Exploration], overlap: Overlap | None = None, agreement: Agreement | None = None
) -> dict[str, Any]:
    """Everything but the arrays over the spectrum, for programs: plain JSON. The columns are in `docs/explore.md`."""
    found: dict[str, Any] = {
        "models": [
            {
                "base": one.base,
                "tuned": one.tuned,
                "kind": one.kind,
                "num_directions": one.num_directions,
                "eps": one.eps,
                "along": one.along,
                "direction_source": one.direction_source,
                "mean": _means([_row(weight) for weight in one.weights]),
                "random_change": _means([_row(weight) for weight in one.random_change().weights]),
                "weights": [{**_identity(weight), **_row(weight)} for weight in one.weights],
                "left_out": one.left_out,
            }
            for one in explorations
        ]
    }
    if overlap is not None:
        found["overlap"] = {
            "tuned": list(overlap.tuned),
            "weights": list(overlap.weights),
            "shared": overlap.shared.tolist(),
            "chance": overlap.chance.tolist(),
            "random_change": overlap.random_change.tolist(),
        }
    if agreement is not None:
        found["agreement"] = {
            "truth": agreement.truth,
            "predicted": agreement.predicted,
            "true": agreement.true,
            "steps": agreement.steps.tolist(),
            "weights": list(agreement.weights),
            "precision": agreement.precision.tolist(),
            "recall": agreement.recall.tolist(),
            "chance": agreement.chance.tolist(),
            "random_change": None if agreement.random_change is None else agreement.random_change.tolist(),
        }
    return found


def _identity(weight: WeightChange) -> dict[str, Any]:
    return {
        "name": weight.name,
        "layer": weight.layer,
        "module": weight.module,
        "shape": list(weight.shape),
        "directions": weight.directions.tolist(),
        "direction_rates": weight.rates[weight.directions].tolist(),
        "direction_positions": weight.positions.tolist(),
    }


def _row(weight: WeightChange) -> dict[str, float | None]:
    choices = weight.choices()
    return {
        "change_norm": weight.change_norm,
        "weight_norm": weight.weight_norm,
        "largest_rate": float(weight.rates.max()),
        "gini": weight.gini,
        "core_energy": weight.core,
        **{f"highest_{n}_rate": share for n, share in weight.concentration().items()},
        **{f"{name}_rate": share.rate for name, share in choices.items()},
        **{f"{name}_energy": share.energy for name, share in choices.items()},
        "best_energy": weight.best_energy,
        "gradient_energy": weight.gradient_energy,
        "mean_position": float(weight.positions.mean()),
    }


def _means(rows: Sequence[dict[str, float | None]]) -> dict[str, float | None]:
    return {key: mean_of([row[key] for row in rows]) for key in rows[0]} if rows else {}


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of those that are known; None without any."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
