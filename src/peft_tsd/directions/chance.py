"""What a random change of a weight would show; by it, directions of different weights are compared for a budget of the
whole model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .spectrum import as_double


def chance_rate(sigma: Tensor, entry: float, num: int, eps: float) -> float:
    """The change rate that, on average, `num` directions of a weight exceed under a random change.

    The core coordinates of a ΔW of independent Gaussian entries are independent and Gaussian, of the same standard
    deviation as the entries. So this is the t with `Σ_i P(|N(0, entry²)| > t·(σ_i + ε)) = num`. Rates of different
    weights, divided by it, can be compared: a small σ raises both alike.

    Args:
        sigma: Singular values, shape (k,), float64.
        entry: Root mean square of the entries of ΔW, `‖ΔW‖/√(out·in)`.
        num: How many; of a weight with few directions at most half of them.
        eps: As in `change_rates`.
    """
    if not entry:
        return 0.0
    thresholds = (sigma + eps) / (2**0.5 * entry)  # of a standard normal N, P(|N| > x) = erfc(x/√2)
    wanted = min(num, len(sigma) / 2)
    low, high = 0.0, 6.0 / float(thresholds.min())  # erfc(6) is 2e-17: no direction is expected above `high`
    for _ in range(100):
        middle = (low + high) / 2
        if float(torch.special.erfc(middle * thresholds).sum()) > wanted:
            low = middle
        else:
            high = middle
    return high


def over_chance(rates: Tensor, chance: float) -> Tensor:
    """Change rates over the layer's chance rate; where nothing changed, 0."""
    rates = as_double(rates)
    return rates / chance if chance else torch.zeros_like(rates)


def spread(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of the `total` highest of all `scores` each layer has.

    Args:
        scores: Of each layer, highest first, shape (candidates,); a layer gets at most as many.
        total: To be spread; all candidates are taken where there are fewer.
    """
    owners = torch.cat([torch.full((len(found),), i) for i, found in enumerate(scores.values())])
    order = torch.sort(torch.cat(list(scores.values())), descending=True, stable=True).indices[:total]
    return dict(zip(scores, torch.bincount(owners[order], minlength=len(scores)).tolist()))
