"""What more does a comparison say than its table?

    peft-tsd compare RECIPE ... --out FOLDER
    python benchmarks/comparison.py FOLDER

Reads FOLDER, and says, of every task:

- the loss at the end (mean over the last tenth of the steps) of each seed of every setting;
- of each method that ran with directions and without (`dora` and `dora-dash`): both scores and losses, the differences
  by seed with half of their 95 % confidence intervals, p of a paired t-test (not adjusted for the number of tests),
  and what a step takes with directions over without;
- where `directions.prelaunch_steps` varied: the step at which the directions were identified, and how many are those
  of the longest pre-launch of the same seed (in the mean over layers); the seconds that finding them took, also over
  those of all steps before, with the checks' own part where the pre-launch was automatic. Means over seeds, with the
  range. 0 stands for directions from gradients.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file
from scipy import stats

from peft_tsd.compare.plan import Cell, Group
from peft_tsd.compare.results import group_of, interval
from peft_tsd.compare.tables import markdown
from peft_tsd.runs.folder import RunFolder

PRELAUNCH = "directions.prelaunch_steps"

Row = dict[str, Any]
Settings = dict[Group, dict[int, Row]]
"""The rows of a task: by setting, by seed."""


def last_loss(row: Row) -> float:
    losses = [loss for _, loss in row["loss"]]
    return fmean(losses[-max(1, len(losses) // 10) :])


def losses(settings: Settings) -> Iterator[list[str]]:
    for group, rows in settings.items():
        if all(row["loss"] for row in rows.values()):
            yield [group.label, " ".join(f"{last_loss(row):.2f}" for row in rows.values())]


def pairs(settings: Settings) -> Iterator[list[str]]:
    for group, rows in settings.items():
        alone = settings.get(group._replace(method=group.method.removesuffix("-dash")), rows)
        seeds = [seed for seed in rows if seed in alone]
        if alone is rows or len(seeds) < 2:
            continue
        before, after = [[100 * own[seed]["score"] for seed in seeds] for own in (alone, rows)]
        loss, loss_after = [[last_loss(own[seed]) for seed in seeds] for own in (alone, rows)]
        seconds, seconds_after = [fmean(own[seed]["seconds_per_step"] for seed in seeds) for own in (alone, rows)]
        yield [
            group.label,
            f"{fmean(before):.1f}",
            f"{fmean(after):.1f}",
            difference(before, after, 1),
            f"{stats.ttest_rel(after, before).pvalue:.2g}",
            f"{fmean(loss):.3f}",
            f"{fmean(loss_after):.3f}",
            difference(loss, loss_after, 3),
            f"{seconds_after / seconds:.2f}",
        ]


def difference(before: Sequence[float], after: Sequence[float], digits: int) -> str:
    mean, half = interval([b - a for a, b in zip(before, after)])
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def prelaunches(settings: Settings, task: str | None, folder: Path) -> Iterator[list[str]]:
    varied = {group: rows for group, rows in settings.items() if PRELAUNCH in dict(group.variation)}
    longest: dict[tuple[Any, ...], Row] = {}
    for group, rows in varied.items():
        for seed, row in rows.items():
            known = longest.get(key := (*others(group), seed), row)
            longest[key] = max(known, row, key=lambda one: one["phase_change"]["step"])
    truth = {key: directions(row, task, folder) for key, row in longest.items()}
    for group, rows in varied.items():
        found = [(row["phase_change"], directions(row, task, folder), row, seed) for seed, row in rows.items()]
        same = [agreement(own, truth[(*others(group), seed)]) for _, own, _, seed in found]
        seconds = [change["seconds"] + change.get("checks_seconds", 0.0) for change, *_ in found]
        before = [change["step"] * row["seconds_per_step"] for change, _, row, _ in found]
        checks = [
            change["checks_seconds"] / change["prelaunch_seconds"]
            for change, *_ in found
            if "checks_seconds" in change
        ]
        yield [
            group.label,
            spread([change["step"] for change, *_ in found], 0),
            spread(same, 2),
            spread(seconds, 1),
            spread([own / steps for own, steps in zip(seconds, before) if steps], 3),
            spread(checks, 3),
        ]


def others(group: Group) -> Group:
    """What varied besides the length of the pre-launch."""
    return group._replace(variation=tuple(pair for pair in group.variation if pair[0] != PRELAUNCH))


def directions(row: Row, task: str | None, folder: Path) -> dict[str, set[int]]:
    """A run's directions, by layer."""
    run = RunFolder(folder / "runs" / Cell(task, *group_of(row), row["seed"]).path)
    state = load_file(run.adapter / "adapter_model.safetensors")
    return {key: set(value.tolist()) for key, value in state.items() if key.endswith("_directions.indices")}


def agreement(own: dict[str, set[int]], truth: dict[str, set[int]]) -> float:
    return fmean(len(own[key] & truth[key]) / len(truth[key]) for key in truth)


def spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return f"{fmean(values):.{digits}f}" + ("" if low == high else f" ({low} to {high})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of a comparison, its --out")
    folder = parser.parse_args().folder
    results = folder / "results.json"
    if not results.is_file():
        parser.error(f"{results} is not there; make it with: peft-tsd compare RECIPE --out {folder}")
    tasks: dict[str | None, Settings] = {}
    for row in json.loads(results.read_text(encoding="utf-8"))["runs"]:
        if row["status"] == "finished":
            tasks.setdefault(row["task"], {}).setdefault(group_of(row), {})[row["seed"]] = row
    for task, settings in tasks.items():
        tables = {
            ("setting", "loss at the end, by seed"): list(losses(settings)),
            ("with directions", "alone", "with", "- alone", "p", "loss alone", "with", "- alone", "step"): list(
                pairs(settings)
            ),
            ("pre-launch", "ended at", "of the longest's", "seconds", "over steps before", "checks"): list(
                prelaunches(settings, task, folder)
            ),
        }
        for heads, lines in tables.items():
            if lines:
                print(*([task] if task else []), markdown(heads, lines), sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
