"""How many directions each layer gets of a budget for the whole model.

Change rates of different layers cannot be compared as they are: ΔW/σ is high wherever a weight has tiny singular
values, whether the task moved them or not. So each rate is divided by what a random change of the same norm would show
in its layer (`directions.chance_rate`): the rate that num_directions of the layer would exceed by chance. Under random
changes every layer gets about num_directions then; more go where rates stand out from chance.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def over_chance(rates: Tensor, chance: float) -> Tensor:
    """Change rates over the layer's chance rate; where nothing changed, 0."""
    return rates.double() / chance if chance else torch.zeros_like(rates, dtype=torch.float64)


def spread(scores: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """How many of the `total` highest of all `scores` each layer has.

    Args:
        scores: Of each layer, highest first, shape (candidates,); a layer gets at most as many.
        total: To be spread; all candidates are taken where there are fewer.
    """
    owners = torch.cat([torch.full((len(found),), i) for i, found in enumerate(scores.values())])
    order = torch.sort(torch.cat(list(scores.values())), descending=True, stable=True).indices[:total]
    return dict(zip(scores, torch.bincount(owners[order], minlength=len(scores)).tolist()))
