"""From finished runs to what they say: means over seeds, their confidence, and a paired test against LoRA."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

from .held_out import steps_to_others
from .plan import LEARNING_RATE, Cell, Group

Key = TypeVar("Key")

CONFIDENCE = 0.95

CURVE_POINTS = 200
"""Most points of a loss curve that are kept; each is a mean over as many steps as that takes."""


class Interval(NamedTuple):
    """A mean over seeds, with half the width of its 95 % confidence interval (Student's t)."""

    mean: float
    half: float | None
    """None for a single value."""


class Paired(NamedTuple):
    """A difference from LoRA over the same seeds."""

    difference: Interval
    p: float | None
    """Of a two-sided paired t-test; None where it is not defined."""
    adjusted_p: float | None
    """The same, adjusted for the number of such tests (Benjamini and Hochberg's false discovery rate)."""


class HeldOut(NamedTuple):
    """What a method's runs came to by their held-out loss."""

    loss: Interval
    """Final, over seeds; of each the mean over tasks."""
    against_lora: Paired | None
    """The difference from LoRA's; None as in `Summary`."""
    steps: Interval | None
    """Steps after which runs had the final loss of LoRA's run of the same task and seed; None where none had, or runs
    were not evaluated on the way."""
    never: int
    """Runs that never had it."""


class Summary(NamedTuple):
    """What the runs of one method, rank and variation came to."""

    group: Group
    scores: dict[str, Interval]
    """By column: a task's own metric."""
    average: Interval
    """Over tasks, by seed."""
    against_lora: Paired | None
    """None for LoRA itself, and where there is no LoRA of that rank."""
    differences: dict[str, Interval]
    """By column: the difference from the same LoRA over the same seeds; empty where there is none."""
    held_out: HeldOut | None
    """None where no run has a held-out loss: those of an older version."""
    learning_rates: list[float]
    trainable_parameters: int
    seconds_per_step: float
    peak_memory_bytes: int | None
    runs: int
    failed: int


def row_of(cell: Cell, metrics: Mapping[str, Any], recipe: Mapping[str, Any]) -> dict[str, Any]:
    """One run as a row of results.json."""
    score = metrics["score"]
    # A recipe's own data are one task, which has no name but in a choice of tasks.
    tasks = {name: task["after"] for name, task in score.get("tasks", {}).items()}
    return {
        **_identity(cell),
        "status": "finished",
        "metric": score["metric"],
        "score": score["after"],
        "scores": tasks or {cell.task or "test": {score["metric"]: score["after"]}},
        "held_out_loss": score.get("loss"),
        "validation_loss": score.get("validation_loss"),
        "evaluations": metrics.get("evaluations", []),
        "questions": score["questions"],
        "left_out": score.get("left_out", []),
        "learning_rate": recipe["optimizer"]["learning_rate"],
        "trainable_parameters": metrics["trainable_parameters"],
        "total_parameters": metrics["total_parameters"],
        "steps": metrics["steps"],
        "seconds_per_step": metrics["seconds_per_step"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "seconds": metrics["seconds"],
        "start_seconds": metrics.get("start_seconds"),
        "phase_change": metrics["phase_change"],
        "loss": _curve(metrics["loss"]),
        "data": metrics["data"],
        "versions": metrics["versions"],
        "machine": metrics["machine"],
        "recipe": recipe,
    }


def failed_row(cell: Cell, error: str, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A run that could not be finished, such as one that diverged."""
    return {**_identity(cell), "status": "failed", "error": error, "recipe": recipe}


def _identity(cell: Cell) -> dict[str, Any]:
    return {**cell._asdict(), "variation": dict(cell.variation)}


def _curve(losses: Sequence[Mapping[str, float]]) -> list[tuple[int, float]]:
    size = math.ceil(len(losses) / CURVE_POINTS) or 1
    parts = [losses[start : start + size] for start in range(0, len(losses), size)]
    return [(int(part[-1]["step"]), fmean(entry["loss"] for entry in part)) for part in parts]


def group_of(row: Mapping[str, Any]) -> Group:
    """What a row is compared as."""
    return Group(row["method"], row["rank"], tuple(row["variation"].items()), row.get("variant"))


def lora_beside(group: Group, others: Collection[Group]) -> Group | None:
    """The LoRA that a group is compared with: of the same rank, and of the same variation where LoRA has such.

    Of variants it is the one that is called `lora`, of the same rank where there is one.
    """
    named = [other for other in others if other.name == "lora"]
    alike = [other for other in named if other.rank == group.rank] or (named if group.variant else [])
    rate = tuple(pair for pair in group.variation if pair[0] == LEARNING_RATE)
    for variation in ((), rate, group.variation):
        for other in alike:
            if other.variation == variation:
                return other
    return None


def by_group(rows: Iterable[Mapping[str, Any]]) -> dict[Group, list[Mapping[str, Any]]]:
    """Rows by what they are compared as, in the order of the first of each."""
    groups: dict[Group, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def summarize(rows: Sequence[Mapping[str, Any]]) -> list[Summary]:
    """What the rows say, group by group, in the order of their first rows.

    The average of a seed is the mean over tasks of what each task's run scored; a seed counts where all of the
    group's tasks have finished.
    """
    groups = by_group(rows)
    tasks = {row["task"] for row in rows}
    averages = {group: _averages(own, tasks, "score") for group, own in groups.items()}
    columns = {group: _columns(own) for group, own in groups.items()}
    losses = {group: _averages(own, tasks, "held_out_loss") for group, own in groups.items()}
    tests: dict[Group, tuple[Interval, float | None]] = {}
    loss_tests: dict[Group, tuple[Interval, float | None]] = {}
    loras: dict[Group, Group] = {}
    differences: dict[Group, dict[str, Interval]] = {}
    for group, own in averages.items():
        lora = lora_beside(group, [other for other in averages if averages[other]])
        if group.name != "lora" and lora and own.keys() & averages[lora].keys():
            tests[group] = paired(own, averages[lora])
            loras[group] = lora
            if losses[group].keys() & losses[lora].keys():
                loss_tests[group] = paired(losses[group], losses[lora])
            differences[group] = {
                name: _difference(scores, columns[lora][name])
                for name, scores in columns[group].items()
                if scores.keys() & columns[lora].get(name, {}).keys()
            }
    adjusted_scores = adjusted({group: p for group, (_, p) in tests.items() if p is not None})
    adjusted_losses = adjusted({group: p for group, (_, p) in loss_tests.items() if p is not None})

    def held_out(group: Group) -> HeldOut | None:
        if not losses[group]:
            return None
        against = loss_tests.get(group)
        steps, never = steps_to_others(groups[group], groups[loras[group]]) if group in loras else ([], 0)
        return HeldOut(
            loss=interval(list(losses[group].values())),
            against_lora=Paired(*against, adjusted_losses.get(group)) if against else None,
            steps=interval(steps) if steps else None,
            never=never,
        )

    found = []
    for group, own_rows in groups.items():
        done = [row for row in own_rows if row["status"] == "finished"]
        if not averages[group]:
            continue
        against = tests.get(group)
        memory = [row["peak_memory_bytes"] for row in done if row["peak_memory_bytes"]]
        found.append(
            Summary(
                group=group,
                scores={name: interval(list(scores.values())) for name, scores in columns[group].items()},
                average=interval(list(averages[group].values())),
                against_lora=Paired(*against, adjusted_scores.get(group)) if against else None,
                differences=differences.get(group, {}),
                held_out=held_out(group),
                learning_rates=list(dict.fromkeys(row["learning_rate"] for row in done)),
                trainable_parameters=max(row["trainable_parameters"] for row in done),
                seconds_per_step=fmean(row["seconds_per_step"] for row in done),
                peak_memory_bytes=max(memory) if memory else None,
                runs=len(done),
                failed=len(own_rows) - len(done),
            )
        )
    return found


def _averages(rows: Sequence[Mapping[str, Any]], tasks: set[str | None], key: str) -> dict[int, float]:
    """The mean over tasks of a number, by seed; of seeds all of whose tasks have it."""
    by_seed: dict[int, list[float]] = {}
    for row in rows:
        if row["status"] == "finished" and row.get(key) is not None:
            by_seed.setdefault(row["seed"], []).append(row[key])
    return {seed: fmean(own) for seed, own in sorted(by_seed.items()) if len(own) == len(tasks)}


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, float]]:
    """By column and seed."""
    columns: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["status"] == "finished":
            for name, metrics in row["scores"].items():
                columns.setdefault(name, {})[row["seed"]] = metrics[row["metric"]]
    return columns


def interval(values: Sequence[float]) -> Interval:
    """Mean and confidence of values that vary by seed."""
    from scipy import stats

    if len(values) < 2:
        return Interval(fmean(values), None)
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1) * stats.sem(values)
    return Interval(fmean(values), float(half))


def _difference(own: Mapping[int, float], lora: Mapping[int, float]) -> Interval:
    return interval([own[seed] - lora[seed] for seed in sorted(own.keys() & lora.keys())])


def paired(own: Mapping[int, float], lora: Mapping[int, float]) -> tuple[Interval, float | None]:
    """The difference of two numbers by seed, and p of a paired t-test; None where it is not defined."""
    from scipy import stats

    seeds = sorted(own.keys() & lora.keys())
    difference = _difference(own, lora)
    if not difference.half:
        return difference, None
    return difference, float(stats.ttest_rel([own[s] for s in seeds], [lora[s] for s in seeds]).pvalue)


def adjusted(p: Mapping[Key, float]) -> dict[Key, float]:
    """p of several tests, adjusted for their number (Benjamini and Hochberg's false discovery rate)."""
    from scipy import stats

    return dict(zip(p, map(float, stats.false_discovery_control(list(p.values()))))) if p else {}
