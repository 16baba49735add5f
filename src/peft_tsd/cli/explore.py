"""`peft-tsd explore`."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..explore.into import explore_into
from ..explore.report import finding, meaning
from ..explore.results import Agreement, Exploration, Overlap, WeightChange
from ..files.adapters import CONFIG
from ..recipes.reading import parse_yaml
from .screen import DONE, near, screen
from .values import adapter_folder


def explore(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out).expanduser()
    base = arguments.base or _named_base(arguments.tuned[0])
    with screen():
        try:
            result = explore_into(
                out,
                base,
                arguments.tuned,
                num_directions=arguments.num_directions,
                eps=arguments.eps,
                modules=arguments.modules.split(",") if arguments.modules is not None else None,
                trajectory=arguments.trajectory,
                predicted=arguments.predicted,
                true=arguments.true,
                device=arguments.device,
            )
        except OSError as error:
            raise InputError(" ".join(str(error).split())) from None
    print("\n".join([*report_lines(*result), "", f"report   {near(out / 'report.html')}"]))
    return DONE


def _named_base(tuned: str) -> str:
    """The base model that a run's recipe, or an adapter's configuration, names.

    Raises:
        InputError: None does.
    """
    recipe, config = Path(tuned).expanduser() / "recipe.yaml", adapter_folder(tuned) / CONFIG
    found: Any = None
    try:
        if recipe.is_file():
            content = parse_yaml(recipe.read_text(encoding="utf-8"), str(recipe))
            found = content["model"]["name"]
        elif config.is_file():
            found = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError, OSError):
        found = None
    if not isinstance(found, str) or not found:
        raise InputError(f"{tuned!r} names no base model; give it before: peft-tsd explore BASE {tuned} --out DIR")
    return found


SHOWN_WEIGHTS = 5
"""Rows of the table of most changed weights."""

SHOWN_PAIRS = 6
"""Most pairs of models whose overlap is printed one by one."""


def report_lines(explorations: list[Exploration], shared: Overlap | None, agreed: Agreement | None) -> list[str]:
    """What was found, in a screenful."""
    lines: list[str] = []
    for one in explorations:
        lines += ["", f"{one.tuned} ({one.kind}), {len(one.weights)} weights changed", finding(one)]
        lines += [f"What this means: {meaning(one)}", ""] if one.weights else [""]
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
