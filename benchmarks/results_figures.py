"""The figures of docs/results.md that follow from rows: see results.py.

The same rows give the same bytes, with matplotlib of constraints.txt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from peft_tsd.compare.grid import Grid, by_task, grids

# Okabe and Ito's colours, which stay apart for colour-blind readers; black is LoRA's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#7f7f7f")

LINES = ("-", "--", ":")

TICKS = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
"""Of a decade of loss: a figure spans about one."""

STYLE = {"svg.hashsalt": "peft-tsd", "svg.fonttype": "none", "font.size": 9}


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> list[str]:
    """Draw the figures of a file of rows, and return their names."""
    tasks = by_task(grids(rows))
    drawn = []
    if tasks:
        drawn.append(_figure(tasks, folder / f"{name}-rates.svg", "learning rate", _over_rates))
    if any(grid.curve for found in tasks.values() for grid in found):
        drawn.append(_figure(tasks, folder / f"{name}-curves.svg", "step", _over_steps))
    return drawn


def _figure(tasks: Mapping[str | None, Sequence[Grid]], path: Path, x: str, points: Any) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(tasks), 4.4), layout="constrained")
        axes = figure.subplots(1, len(tasks), squeeze=False)[0]
        styles = _styles([grid.group.label for found in tasks.values() for grid in found])
        for axis, (task, found) in zip(axes, tasks.items()):
            shown = []
            for grid in found:
                at, means, halves = points(grid)
                shown += means
                if at:
                    axis.errorbar(at, means, halves, label=grid.group.label, capsize=2, lw=1.2, ms=3, marker="o",
                                  **styles[grid.group.label])  # fmt: skip
            axis.set(title=task or "", xlabel=x, ylabel="held-out loss", yscale="log")
            if shown:
                # By the means: an interval of two seeds would press them together.
                axis.set_ylim(min(shown) / 1.3, max(shown) * 1.3)
            axis.yaxis.set_major_locator(LogLocator(subs=TICKS))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_locator(NullLocator())
            if x == "learning rate":
                axis.set_xscale("log")
            axis.grid(alpha=0.25)
        handles = {label: h for axis in axes for h, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(
            handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 3 * len(tasks) - 1)
        )
        figure.savefig(path, metadata={"Date": None})
    # Lines end in spaces here and there, which checks before a commit would take away.
    path.write_text("\n".join(line.rstrip() for line in path.read_text("utf-8").splitlines()) + "\n", "utf-8")
    return path.name


def _styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    others = [label for label in dict.fromkeys(labels) if label.split()[0] != "lora"]
    found = {
        label: {"color": COLOURS[i % len(COLOURS)], "ls": LINES[i // len(COLOURS) % len(LINES)]}
        for i, label in enumerate(others)
    }
    return {**{label: {"color": "#000000", "ls": "-"} for label in labels}, **found}


def _over_rates(grid: Grid) -> tuple[list[float], list[float], list[float]]:
    at = [(one.rate, one.loss) for one in grid.rates if one.loss is not None]
    return [x for x, _ in at], [loss.mean for _, loss in at], [loss.half or 0.0 for _, loss in at]


def _over_steps(grid: Grid) -> tuple[list[int], list[float], list[float]]:
    steps, losses = [x for x, _ in grid.curve], [loss for _, loss in grid.curve]
    return steps, [loss.mean for loss in losses], [loss.half or 0.0 for loss in losses]
