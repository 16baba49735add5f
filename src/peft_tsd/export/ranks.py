"""One rank for all layers of an export, filled up with zeros: servers read one.

llama.cpp scales each tensor by `lora_alpha` over that tensor's own rank, SGLang sizes its memory by the `r` of the
configuration alone, and neither reads a `rank_pattern`; vLLM takes ranks up to the next of 8, 16, 32, 64, ...; servers
that pad to multiples of 16 change the scaling of what is none. So every layer gets the same rank, with scaling 1: 8,
or a multiple of 16, which a server that rounds up would have made of it anyway. What is filled in are rows of zeros in
A and columns of zeros in B: the product stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ..files.adapters import PREFIX

_A, _B = ".lora_A.weight", ".lora_B.weight"


class OneRank(NamedTuple):
    """The factors of a LoRA whose layers all have the same rank."""

    state: dict[str, Tensor]
    """The tensors, under the names they had."""
    rank: int
    """The rank that all layers have now."""
    ranks: dict[str, int]
    """The rank that each had, by its name in the base model."""


def served_rank(rank: int) -> int:
    """The least rank, not below `rank`, that servers take as it is: 8, or a multiple of 16."""
    return 8 if rank <= 8 else -(-rank // 16) * 16


def of_one_rank(state: Mapping[str, Tensor], at_least: int | None = None) -> OneRank:
    """A LoRA's tensors with zeros up to the rank that servers take.

    Args:
        state: Named as PEFT names them: A (r, in) or (r, in, kh, kw), B (out, r) or (out, r, 1, 1), each layer with an
            r of its own, and whatever else there is. At least one layer.
        at_least: A rank that the result shall have even if no layer needs it, rounded up as any other.
    """
    ranks = {key.removesuffix(_A): tensor.shape[0] for key, tensor in state.items() if key.endswith(_A)}
    rank = served_rank(max(*ranks.values(), at_least or 1))
    filled = dict(state)
    for layer, own in ranks.items():
        if own < rank:
            a, b = state[layer + _A], state[layer + _B]
            filled[layer + _A] = torch.cat([a, a.new_zeros(rank - own, *a.shape[1:])])
            filled[layer + _B] = torch.cat([b, b.new_zeros(b.shape[0], rank - own, *b.shape[2:])], dim=1)
    return OneRank(filled, rank, {layer.removeprefix(PREFIX): own for layer, own in ranks.items()})
