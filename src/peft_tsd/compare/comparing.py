"""A comparison from its plan to its files.

runs/…          a run folder a run (see `runs.folder`), without the checkpoints once it has finished
tune/…          those that chose a setting, scored on rows held out of training
results.json    one row a run with all its settings, and what they came to
results.md      the table
report.html     the table and the curves, in one file that opens offline
runs.log        what the runs printed; those of a comparison that joins another, in runs-MACHINE-NUMBER.log

Several may be at work in one folder, and share out the runs (`sharing`).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError
from ..files.whole import write_text
from ..language.preparing import check
from ..runs.folder import RunFolder
from .grid import grids
from .plan import Cell, Plan
from .report import check_installed, render
from .results import Summary, failed_row, row_of, summarize
from .running import Run, Stopped, finished, run_all
from .sharing import at_work, writing
from .tables import document


class Comparison(NamedTuple):
    """What a comparison came to."""

    rows: list[dict[str, Any]]
    """One a run: those that were finished, and those that failed."""
    tuned: list[dict[str, Any]]
    """The same of the runs that chose a setting."""
    summaries: list[Summary]
    document: str
    """The table and what belongs to it, in Markdown."""


def compare(plan: Plan, out: Path, *, jobs: int = 1, command: str = "") -> Comparison:
    """Do what is left of a comparison, and write what all of it came to.

    Others may do the same in the same folder at the same time: each run is done by one of them, and all wait for all.

    Args:
        plan: From `make_plan`.
        out: Its folder; what lies there of the same plan, or of a smaller one, is used and not done again.
        jobs: Runs at a time, each on a GPU of its own where there are as many.
        command: What the user typed, for the results.

    Raises:
        InputError: A run cannot be carried out, or `out` holds one with other settings; nothing was started.
        Stopped: By Ctrl-C; the results of what is done were written.
    """
    check_installed()
    if jobs < 1:
        raise InputError(f"--jobs must be 1 or more; got {jobs}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return _compare(plan, out, jobs, command)
    except OSError as error:
        raise InputError(f"--out={str(out)!r} cannot be written: {error}; name another folder") from None


def _compare(plan: Plan, out: Path, jobs: int, command: str) -> Comparison:
    tuning = plan.tuning
    trials = [(cell, value) for cell in plan.tuned_cells() for value in (tuning.values if tuning else ())]
    trial_runs = [
        Run(
            f"{cell.path}/{value}",
            plan.recipe_of(cell, str(out / "tune" / cell.path / str(value)), value, validate=True),
        )
        for cell, value in trials
    ]
    cells = plan.cells()
    all_runs = [*trial_runs, *_runs(plan, out, cells, {})]
    _check(plan, out, all_runs)
    errors: dict[str, str] = {}
    best: dict[Cell, Any] = {}
    runs: list[Run] = []
    # Machines that share the folder may have it under other paths.
    whole = out.absolute()
    settings = {
        Path(run.recipe.output).relative_to(whole).as_posix(): run.recipe.model_dump(mode="json") for run in all_runs
    }
    with at_work(out, settings) as joins:
        log = out / (f"runs-{platform.node()}-{os.getpid()}.log" if joins else "runs.log")
        try:
            if trial_runs:
                errors |= run_all(trial_runs, at_once=jobs, log=log, title="tuning")
                best = _best(trials, trial_runs, errors)
            runs = _runs(plan, out, cells, best)
            errors |= run_all(runs, at_once=jobs, log=log, title="comparing")
        except Stopped:
            _write(plan, out, cells, runs, trials, trial_runs, errors, command)
            raise
        return _write(plan, out, cells, runs, trials, trial_runs, errors, command)


def _runs(plan: Plan, out: Path, cells: Sequence[Cell], best: dict[Cell, Any]) -> list[Run]:
    return [
        Run(cell.path, plan.recipe_of(cell, str(out / "runs" / cell.path), best.get(plan.tuned_cell(cell))))
        for cell in cells
    ]


def _check(plan: Plan, out: Path, runs: Sequence[Run]) -> None:
    """Refuse, before anything starts, what could not be carried out."""
    new = [run.recipe for run in runs if not RunFolder(run.recipe.output).path.exists()]
    # A seed changes nothing that could be refused.
    check(list({recipe.model_copy(update={"seed": 0, "output": ""}).to_yaml(): recipe for recipe in new}.values()))


def _best(trials: Sequence[tuple[Cell, Any]], runs: Sequence[Run], errors: dict[str, str]) -> dict[Cell, Any]:
    """The value with the lowest loss on the validation rows, for each tuned cell: a score of so few rows has ties."""
    losses: dict[Cell, dict[Any, float]] = {}
    for (cell, value), run in zip(trials, runs):
        metrics = finished(run)
        if metrics is not None:
            # Runs that an older version has finished have a score alone.
            score = metrics["score"]
            losses.setdefault(cell, {})[value] = score.get("loss", -score["after"])
    for (cell, _), run in zip(trials, runs):
        if cell not in losses:
            raise InputError(f"--tune: no value works for {cell.path}: {errors[run.name]}")
    return {cell: min(own, key=own.__getitem__) for cell, own in losses.items()}


def _write(
    plan: Plan,
    out: Path,
    cells: Sequence[Cell],
    runs: Sequence[Run],
    trials: Sequence[tuple[Cell, Any]],
    trial_runs: Sequence[Run],
    errors: dict[str, str],
    command: str,
) -> Comparison:
    tuned = [
        {"value": value, **row}
        for (_, value), row in zip(trials, _rows([c for c, _ in trials], trial_runs, errors))
        if row
    ]
    rows = [row for row in _rows(cells, runs, errors) if row]
    summaries = summarize(rows)
    text = document(plan, rows, tuned, summaries, command)
    content = {
        "command": command,
        "plan": plan._asdict(),
        "runs": rows,
        "tuned": tuned,
        "summary": [summary._asdict() for summary in summaries],
        "grid": [grid._asdict() for grid in grids(rows)],
    }
    page = render(plan, rows, tuned, summaries, command)
    with writing(out):
        write_text(out / "results.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        write_text(out / "results.md", text)
        write_text(out / "report.html", page)
    return Comparison(rows, tuned, summaries, text)


def _rows(cells: Sequence[Cell], runs: Sequence[Run], errors: dict[str, str]) -> list[dict[str, Any] | None]:
    """A row for each run, None for one that was not done."""
    found: list[dict[str, Any] | None] = []
    for cell, run in zip(cells, runs):
        metrics, recipe = finished(run), run.recipe.model_dump()
        # Where the results lie is no setting of theirs.
        del recipe["output"]
        if metrics is not None:
            shutil.rmtree(RunFolder(run.recipe.output).checkpoints, ignore_errors=True)
            found.append(row_of(cell, metrics, recipe))
        else:
            found.append(failed_row(cell, errors[run.name], recipe) if run.name in errors else None)
    return found
