"""A comparison as one HTML file that opens offline: what came out, the table, and the curves behind it."""

from __future__ import annotations

import html
from collections.abc import Collection, Mapping, Sequence
from importlib.resources import files
from statistics import fmean
from string import Template
from typing import Any

from ..errors import InputError
from ..pages.shell import assemble
from .grid import Grid, by_task, grids
from .plan import LEARNING_RATE, METHODS, MORE_METHODS, Group, Plan
from .results import Interval, Summary, by_group, group_of
from .tables import cells, differences, finding, grid_tables, held_out, legend

# Okabe and Ito's colours, which stay apart for colour-blind readers; a method has one, and a rank a kind of line.
_COLOURS = ("#7f7f7f", "#000000", "#0072b2", "#56b4e9", "#cc79a7", "#b8860b", "#d55e00", "#009e73", "#9b30c9")

_MORE_COLOURS = (
    "#8c564b",
    "#17a2b8",
    "#6b8e23",
    "#2f4f9f",
    "#8b6508",
    "#5c3a31",
    "#0e6f7d",
    "#4b6318",
    "#a0522d",
    "#4682b4",
)

_LINES = ("solid", "dash", "dot", "dashdot", "longdash")


def check_installed() -> None:
    """Refuse, before anything long, to go on without what draws the page and computes the statistics.

    Raises:
        InputError: plotly or SciPy is not installed.
    """
    try:
        import plotly.offline  # noqa: F401
        import scipy.stats  # noqa: F401
    except ModuleNotFoundError as error:
        raise InputError(f"compare needs the package {error.name}: pip install 'peft-tsd[compare]'") from None


def render(
    plan: Plan,
    rows: Sequence[Mapping[str, Any]],
    tuned: Sequence[Mapping[str, Any]],
    summaries: Sequence[Summary],
    command: str,
) -> str:
    """The text of the page."""
    from plotly.offline import get_plotlyjs

    page = files("peft_tsd.compare") / "page"
    title = f"{plan.recipe}: {len(summaries)} settings compared"
    shown = [cells(summaries), held_out(summaries), differences(summaries)]
    for own in by_task(grids(rows)).values():
        shown += grid_tables(own)
    body = Template((page / "page.html").read_text("utf-8")).substitute(
        title=html.escape(title),
        finding=html.escape(finding(summaries)),
        table="".join(_table(*one) for one in shown if one),
        legend=html.escape(legend(plan, rows, tuned)),
        command=html.escape(command),
    )
    return assemble(
        title=title,
        style=(page / "page.css").read_text("utf-8"),
        body=body,
        data=_charts(plan, rows, tuned, summaries),
        scripts=(get_plotlyjs(), (page / "page.js").read_text("utf-8")),
    )


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join(
        f'<tr><th scope="row">{html.escape(line[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _charts(
    plan: Plan,
    rows: Sequence[Mapping[str, Any]],
    tuned: Sequence[Mapping[str, Any]],
    summaries: Sequence[Summary],
) -> list[dict[str, Any]]:
    """Plotly figures with their captions, in the order of the page."""
    charts = []
    trained = [s for s in summaries if s.trainable_parameters]
    if len(plan.ranks) > 1:
        charts.append(_chart("Score by rank", "rank r", "score, points", _by_rank(trained, plan), type="category"))
    for task, own_grids in by_task(grids(rows)).items():
        charts.append(
            {
                "caption": "Final held-out loss by learning rate" + (f": {task}" if task else ""),
                "data": [_over_rates(grid, plan) for grid in own_grids],
                "layout": {
                    "xaxis": {"title": {"text": "learning rate"}, "type": "log"},
                    "yaxis": {"title": {"text": "loss, mean over seeds"}},
                },
            }
        )
    best = {(grid.task, grid.group, grid.best_rate) for grid in grids(rows)}
    for key in sorted({key for s in trained for key, _ in s.group.variation}):
        lines = _by_value(trained, key, plan)
        charts.append(_chart(f"Score by {key}", key, "score, points", lines, type="category"))
    # Of a grid of rates, the best of each group alone.
    done = [row for row in rows if row["status"] == "finished" and row["loss"] and _is_shown(row, best)]
    for task in dict.fromkeys(row["task"] for row in done):
        own = [row for row in done if row["task"] == task]
        name = f"Training loss: {task}" if task else "Training loss"
        charts.append(_chart(name, "step", "loss, mean over seeds", _losses(own, plan)))
        if any(row.get("evaluations") for row in own):
            name = f"Held-out loss: {task}" if task else "Held-out loss"
            charts.append(_chart(name, "step", "loss, mean over seeds", _held_out(own, plan)))
    if plan.tuning:
        for task in dict.fromkeys(row["task"] for row in tuned):
            own = [row for row in tuned if row["task"] == task and row["status"] == "finished"]
            has_loss = all(row.get("held_out_loss") is not None for row in own)
            what, unit = ("Loss of", "loss") if has_loss else ("Score on", "score, points")
            name = f"{what} validation rows by {plan.tuning.key}" + (f": {task}" if task else "")
            lines = _tuned(own, plan, "held_out_loss" if has_loss else "score", 1 if has_loss else 100)
            charts.append(_chart(name, plan.tuning.key, unit, lines, type="category"))
    return charts


def _chart(caption: str, x: str, y: str, traces: list[dict[str, Any]], **x_axis: Any) -> dict[str, Any]:
    layout = {"xaxis": {"title": {"text": x}, **x_axis}, "yaxis": {"title": {"text": y}}}
    return {"caption": caption, "data": traces, "layout": layout}


def _is_shown(row: Mapping[str, Any], best: Collection[tuple[Any, ...]]) -> bool:
    group = group_of(row)
    return group.rate is None or (row["task"], group.without(LEARNING_RATE), group.rate) in best


def _over_rates(grid: Grid, plan: Plan) -> dict[str, Any]:
    at = [one for one in grid.rates if one.loss]
    losses = [one.loss for one in at if one.loss]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": grid.group.label,
        "x": [one.rate for one in at],
        "y": [loss.mean for loss in losses],
        "error_y": {"type": "data", "array": [loss.half or 0 for loss in losses], "thickness": 1},
        "line": {"color": _colour(grid.group, plan), "dash": _line(grid.group.rank, plan)},
    }


def _by_rank(summaries: Sequence[Summary], plan: Plan) -> list[dict[str, Any]]:
    lines: dict[Group, list[Summary]] = {}
    for summary in summaries:
        if summary.group.rank is not None:
            lines.setdefault(summary.group._replace(rank=None), []).append(summary)
    return [
        _scores(group, plan, [str(s.group.rank) for s in own], [s.average for s in own])
        for group, own in lines.items()
    ]


def _by_value(summaries: Sequence[Summary], key: str, plan: Plan) -> list[dict[str, Any]]:
    lines: dict[Group, list[Summary]] = {}
    for summary in summaries:
        if key in dict(summary.group.variation):
            lines.setdefault(summary.group.without(key), []).append(summary)
    return [
        _scores(group, plan, [str(dict(s.group.variation)[key]) for s in own], [s.average for s in own])
        for group, own in lines.items()
    ]


def _scores(group: Group, plan: Plan, x: list[str], values: Sequence[Interval]) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": group.label,
        "x": x,
        "y": [100 * value.mean for value in values],
        "error_y": {"type": "data", "array": [100 * (value.half or 0) for value in values], "thickness": 1},
        "line": {"color": _colour(group, plan)},
    }


def _losses(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    traces = []
    for group, own in by_group(rows).items():
        steps = [step for step, _ in own[0]["loss"]]
        losses = [fmean(row["loss"][i][1] for row in own if i < len(row["loss"])) for i in range(len(steps))]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": group.label,
                "x": steps,
                "y": _smooth(losses),
                "line": {"color": _colour(group, plan), "dash": _line(group.rank, plan), "width": 1.5},
            }
        )
    return traces


def _held_out(rows: Sequence[Mapping[str, Any]], plan: Plan) -> list[dict[str, Any]]:
    """The losses of evaluations during training, where all of a group's runs were evaluated at the same steps."""
    evaluated = by_group(row for row in rows if row.get("evaluations"))
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": group.label,
            "x": [one["step"] for one in own[0]["evaluations"]],
            "y": [fmean(losses) for losses in zip(*([one["loss"] for one in row["evaluations"]] for row in own))],
            "line": {"color": _colour(group, plan), "dash": _line(group.rank, plan), "width": 1.5},
        }
        for group, own in evaluated.items()
    ]


def _smooth(values: Sequence[float]) -> list[float]:
    """A running mean over a twentieth of the curve."""
    width = max(1, len(values) // 20)
    return [fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _tuned(rows: Sequence[Mapping[str, Any]], plan: Plan, what: str, scale: float) -> list[dict[str, Any]]:
    return [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": group.label,
            "x": [str(row["value"]) for row in own],
            "y": [scale * row[what] for row in own],
            "line": {"color": _colour(group, plan), "dash": _line(group.rank, plan)},
        }
        for group, own in by_group(rows).items()
    ]


def _colour(group: Group, plan: Plan) -> str:
    """A method's own, or that of a variant by its place among them."""
    if group.variant is None:
        return dict(zip(METHODS + MORE_METHODS, _COLOURS + _MORE_COLOURS))[group.method]
    # Black is LoRA's.
    colours = [*_COLOURS[2:], *_MORE_COLOURS]
    others = [variant.name for variant in plan.variants if variant.name != "lora"]
    return _COLOURS[1] if group.name == "lora" else colours[others.index(group.variant) % len(colours)]


def _line(rank: int | None, plan: Plan) -> str:
    return _LINES[plan.ranks.index(rank) % len(_LINES)] if rank in plan.ranks else _LINES[0]
