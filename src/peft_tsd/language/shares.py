"""Rows that are scored by several processes: each takes its share, and all get the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from ..distributed.passes import in_step, moves_as_one
from ..distributed.sharded import world
from ..runs.stopping import side_by_side

T = TypeVar("T")


def shares(rows: Sequence[Any], model: nn.Module) -> list[list[Any]]:
    """The rows of each process, by its rank: every so-manieth, so that long ones and short ones come to all.

    There is one share alone, which every process takes, of a model that moves as one.
    """
    if moves_as_one(model):
        return [list(rows)]
    _, size = world()
    return [list(rows[rank::size]) for rank in range(size)]


def own_share(rows: Sequence[Any], model: nn.Module) -> list[Any]:
    """This process's."""
    by_rank = shares(rows, model)
    return by_rank[world()[0] % len(by_rank)]


def shared_out(rows: Sequence[Any], work: Callable[[list[Any]], T], model: nn.Module) -> list[T]:
    """What `work` gives for the share of each process, by its rank; every process gets all of it.

    Args:
        rows: The same in every process. There may be none for some.
        work: It may be stopped in one process before it is in another: all are then stopped here.
        model: What it computes with, which may be sharded.
    """
    found = side_by_side(lambda: work(own_share(rows, model)), in_step(model))
    return found[: len(shares((), model))]
