"""What was asked of the default before it was measured, and what was found: a table of docs/results.md.

Of one variant against LoRA, and PEFT's LoRA-GA, at the same rank; see results.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from peft_tsd.compare.grid import Against, Grid, by_task, grids, rate_text, relative_text, steps_text
from peft_tsd.compare.plan import LEARNING_RATE
from peft_tsd.compare.results import interval
from peft_tsd.compare.tables import markdown, p_text

Row = Mapping[str, Any]

CUSTOMARY = (2e-4, 1e-3)
"""Learning rates that LoRA is customarily trained at."""


def targets(rows: Sequence[Row], variant: str) -> str:
    """The table of targets for a variant, task by task.

    Args:
        rows: Of a section, all of one rank; those of LoRA, LoRA-GA and the variant are looked at.
        variant: Its name.
    """
    shown = [row for row in rows if row["variant"] in ("lora", variant, "lora-ga")]
    measured = {row["variation"][LEARNING_RATE] for row in shown if row["variant"] == "lora-ga"}
    found = [grid for grid in grids([r for r in shown if r["variant"] != "lora-ga"]) if grid.group.variant == variant]
    common = [row for row in shown if row["variation"][LEARNING_RATE] in measured]
    lines = [
        _line("tuned, on no task worse than LoRA (95 %)", found, _tuned, lambda each: not any(map(_is_worse, each))),
        _line("tuned, on one task 3 % below LoRA with p < 0.05", found, _tuned, _is_ahead),
        _line(_over_rates(found), found, _mean, lambda each: all(one.relative.mean <= -0.05 for one in each)),
        *(_steps_line(found, rate) for rate in sorted({at.rate for grid in found for at in grid.rates})
          if CUSTOMARY[0] <= rate <= CUSTOMARY[1]),
        _line("tuned, level with PEFT’s LoRA-GA or better (95 %)", against_lora_ga(common, variant), lambda one: one,
              lambda each: not any(map(_is_worse, each))),
        _memory_line(common, variant),
    ]  # fmt: skip
    tasks = list(by_task(found))
    title = f"### What was asked of `{variant}`, and what was found"
    return f"{title}\n\n{markdown(['asked', *map(str, tasks), 'met'], lines)}"


def _line(
    asked: str, found: Sequence[Any], of: Callable[[Any], Against | None], met: Callable[[Sequence[Against]], bool]
) -> list[str]:
    each = [of(one) for one in found]
    known = [one for one in each if one is not None]
    verdict = "yes" if len(known) == len(each) and met(known) else "no"
    if any(one.relative.half is None for one in known):
        verdict += ", one seed"
    return [asked, *("" if one is None else _text(one) for one in each), verdict]


def _text(against: Against) -> str:
    test = against.paired
    p = "" if test.p is None else f", p {p_text(test.p)}"
    adjusted = "" if test.adjusted_p is None else f" ({p_text(test.adjusted_p)} adjusted)"
    return f"{relative_text(against.relative)}{p}{adjusted}"


def _tuned(grid: Grid) -> Against | None:
    return grid.best_against_lora


def _mean(grid: Grid) -> Against | None:
    return grid.mean_against_lora


def _is_worse(against: Against) -> bool:
    relative = against.relative
    return relative.mean > 0 and (relative.half is None or relative.mean > relative.half)


def _is_ahead(each: Sequence[Against]) -> bool:
    """By p as it is: that one task is asked for, not which, is what the adjusted one beside it allows for."""
    return any(one.relative.mean <= -0.03 and (one.paired.p or 1) < 0.05 for one in each)


def _over_rates(found: Sequence[Grid]) -> str:
    rates = sorted({at.rate for grid in found for at in grid.rates})
    return f"mean over rates of {rate_text(rates[0])} to {rate_text(rates[-1])}, 5 % below LoRA"


def _steps_line(found: Sequence[Grid], rate: float) -> list[str]:
    each = [one for grid in found for one in grid.rates if one.rate == rate]
    met = len(each) == len(found) and all(one.steps and one.steps.mean <= 0.75 and not one.never for one in each)
    texts = [next((steps_text(one) for one in grid.rates if one.rate == rate), "") for grid in found]
    return [f"at {rate_text(rate)}, 0.75 of LoRA’s steps to its final loss", *texts, "yes" if met else "no"]


def against_lora_ga(rows: Sequence[Row], variant: str) -> list[Against | None]:
    """The variant against LoRA-GA, each at its own best rate, over the seeds that both have there."""
    # As if LoRA-GA were LoRA: then the grid's own comparison is that with it.
    renamed = [{**row, "variant": "lora", "method": "lora"} for row in rows if row["variant"] == "lora-ga"]
    found = grids([*renamed, *(row for row in rows if row["variant"] == variant)])
    return [grid.best_against_lora for grid in found if grid.group.variant == variant]


def _memory_line(rows: Sequence[Row], variant: str) -> list[str]:
    texts, met = [], True
    for task in dict.fromkeys(row["task"] for row in rows):
        peak = {
            name: [row["peak_memory_bytes"] for row in rows if row["task"] == task and row["variant"] == name
                   and row.get("peak_memory_bytes")]
            for name in (variant, "lora-ga")
        }  # fmt: skip
        own, theirs = (interval([one / 2**20 for one in peak[name]]).mean for name in (variant, "lora-ga"))
        texts.append(f"{own:,.0f} for {theirs:,.0f} MiB")
        met = met and own < theirs
    return ["less memory than LoRA-GA, and no base weight changed", *texts, "yes" if met else "no"]
