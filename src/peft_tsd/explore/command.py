"""What `peft-tsd explore` does: check everything, measure, write the folder, and say in short what was found."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch

from ..errors import one_line
from .errors import ExploreError
from .exploring import Plan, measure_all, prepare
from .measure import agreement, overlap
from .output import check_out, write
from .report import finding
from .results import Agreement, Exploration, Overlap, WeightChange
from .trajectory import Trajectory

SHOWN_WEIGHTS = 5
"""Rows of the table of most changed weights."""

SHOWN_PAIRS = 6
"""Most pairs of models whose overlap is printed one by one."""


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


def report_lines(explorations: list[Exploration], shared: Overlap | None, agreed: Agreement | None) -> list[str]:
    """What was found, in a screenful."""
    lines: list[str] = []
    for one in explorations:
        lines += ["", f"{one.tuned} ({one.kind}), {len(one.weights)} weights changed", finding(one), ""]
        lines += _table(one)
        lines += [f"left out: {count} {reason}" for reason, count in Counter(one.left_out.values()).most_common()]
    if shared is not None:
        lines += ["", *_overlap_lines(shared)]
    if agreed is not None:
        lines += ["", *_agreement_lines(agreed)]
    return lines


def _table(one: Exploration) -> list[str]:
    if not one.weights:
        return []

    def relative(weight: WeightChange) -> float:
        return weight.change_norm / weight.weight_norm if weight.weight_norm else float("inf")

    rows = [("most changed weights", "‖ΔW‖/‖W‖", "of", "directions, highest change rate first", "rate", "share")]
    for weight in sorted(one.weights, key=relative, reverse=True)[:SHOWN_WEIGHTS]:
        indices = " ".join(str(i) for i in weight.directions[:8].tolist())
        rows.append(
            (
                weight.name,
                f"{relative(weight):.2g}",
                str(weight.k),
                indices + (" ..." if len(weight.directions) > 8 else ""),
                f"{weight.rates.max():.2g}",
                f"{weight.choices()['tsd'].rate:.0%}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [*lines, "rate: of the first direction; share: of all change rates, in the task-specific directions."]


def _overlap_lines(shared: Overlap) -> list[str]:
    if not shared.weights:
        return ["No weight was changed in all models: their task-specific directions cannot be compared."]
    chance = f"two random sets {shared.chance.mean():.1%}, two random changes {shared.random_change.mean():.1%}"
    pairs = list(combinations(range(len(shared.tuned)), 2))
    mean = sum(shared.shared[:, a, b].mean() for a, b in pairs) / len(pairs)
    lines = [
        f"task-specific directions shared by two models: {mean:.1%} ({chance}), over {len(shared.weights)} weights"
    ]
    if 1 < len(pairs) <= SHOWN_PAIRS:
        for a, b in pairs:
            lines.append(f"  {shared.shared[:, a, b].mean():.1%}  {shared.tuned[a]}, {shared.tuned[b]}")
    return lines


def _agreement_lines(agreed: Agreement) -> list[str]:
    lines = [
        f"the {agreed.predicted} directions predicted at each step, against the {agreed.true} true ones of "
        f"{agreed.truth}, over {len(agreed.weights)} weights:",
        f"  by chance   precision {agreed.chance.mean():.2f}",
    ]
    if agreed.random_change is not None:
        lines.append(f"  by a random change of the weights   precision {agreed.random_change.mean():.2f}")
    for t in sorted({0, len(agreed.steps) // 2, len(agreed.steps) - 1}):
        precision, recall = agreed.precision[t].mean(), agreed.recall[t].mean()
        lines.append(f"  step {agreed.steps[t]:<6} precision {precision:.2f}, recall {recall:.2f}")
    return lines


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
