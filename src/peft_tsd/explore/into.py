"""All of an exploration at once: measured, compared, and written into a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import one_line
from .errors import ExploreError
from .exploring import Plan, measure_all, prepare
from .measure import agreement, overlap
from .output import check_out, write
from .results import Agreement, Exploration, Overlap
from .trajectory import Trajectory


class Found(NamedTuple):
    """Everything that one call found."""

    explorations: list[Exploration]
    overlap: Overlap | None
    agreement: Agreement | None


def explore_into(
    out: str | os.PathLike[str],
    base: str,
    tuned: Sequence[str],
    *,
    num_directions: int = 8,
    eps: float = 1e-6,
    modules: Sequence[str] | None = None,
    trajectory: str | os.PathLike[str] | None = None,
    predicted: int = 8,
    true: int = 8,
    device: str | torch.device = "cpu",
) -> Found:
    """Explore models, and write the folder `out`.

    Args:
        out: The folder to make; it must not exist.
        base, tuned, num_directions, eps, modules, device: As `explore`.
        trajectory: A folder that `DirectionRecorder` wrote, compared with the first of `tuned`.
        predicted, true: As `agreement`.

    Raises:
        ExploreError: As `explore`, before anything long is done; nothing is written then.
        OSError: The folder cannot be written.
    """
    check_out(out)
    for option, size in (("predicted", predicted), ("true", true)):
        if size < 1:
            raise ExploreError(f"{option} must be a positive integer, the size of a set of directions; got {size}")
    plan = prepare(base, tuned, num_directions=num_directions, eps=eps, modules=modules, device=device)
    try:
        recorded = None if trajectory is None else Trajectory.read(trajectory)
        if recorded is not None:
            _check_recorded(recorded, plan)
        explorations = measure_all(plan, num_directions=num_directions, eps=eps, device=device, progress=True)
        found = Found(
            explorations,
            overlap(explorations) if len(explorations) > 1 else None,
            None if recorded is None else agreement(recorded, explorations[0], predicted=predicted, true=true),
        )
    except ValueError as error:
        raise ExploreError(one_line(error)) from None
    write(out, *found)
    return found


def _check_recorded(recorded: Trajectory, plan: Plan) -> None:
    shapes = {weight.name: weight.shape for weight in plan.weights}
    common = [name for name in recorded.weights if name in shapes]
    if not common:
        raise ExploreError(
            f"{recorded.folder} holds rates of {recorded.weights[0]} and {len(recorded.weights) - 1} more weights, "
            f"and none of them is measured here; give the base it was recorded on, and its modules"
        )
    for name in common:
        if shapes[name] != recorded.shapes[name]:
            raise ExploreError(
                f"{recorded.folder} was recorded on another base: its {name} is {recorded.shapes[name]}, and that of "
                f"{plan.base} {shapes[name]}"
            )
