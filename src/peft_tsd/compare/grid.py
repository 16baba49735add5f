"""Held-out loss over the learning rate: what tells a better method from a faster rate.

Where every run is done at every rate of a grid, with every seed, each task and group says three things: its loss at
each rate, the mean over the grid (what one gains who does not tune), and its loss at its best rate. The best rate is
that with the lowest mean, over the seeds that have run at every rate, of the loss on validation rows; where there are
none, of the held-out loss.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from .held_out import steps_to_reach
from .plan import LEARNING_RATE, Group
from .results import Interval, Paired, adjusted, group_of, interval, lora_beside, paired

Row = Mapping[str, Any]
BySeed = dict[int, Row]


class Against(NamedTuple):
    """A loss against LoRA's over the same seeds."""

    paired: Paired
    relative: Interval
    """The difference as a share of LoRA's loss, seed by seed."""


class AtRate(NamedTuple):
    """A group's runs at one rate."""

    rate: float
    loss: Interval | None
    """Held out, final; None where no run has finished."""
    against_lora: Against | None
    """LoRA's at the same rate."""
    steps: Interval | None
    """Those after which runs had the final loss of LoRA's run of the same seed and rate, over the steps after which
    that run itself had it; None where none had."""
    never: int
    """Runs that never had it."""
    failed: int
    """Runs that could not be finished, such as those that diverged."""


class Grid(NamedTuple):
    """A group's runs on one task, at all rates."""

    task: str | None
    group: Group
    """Without the rate."""
    rates: list[AtRate]
    """In ascending order."""
    mean: Interval | None
    """Of the mean over the grid, by seed; of seeds that have finished at every rate."""
    mean_against_lora: Against | None
    best_rate: float | None
    """Of the rates at which no run failed."""
    best: Interval | None
    """The held-out loss at that rate."""
    best_against_lora: Against | None
    """LoRA's at its own best rate."""
    curve: list[tuple[int, Interval]]
    """At the best rate: evaluations on the way, the loss by step."""


def grids(rows: Sequence[Row]) -> list[Grid]:
    """What rows of a comparison over learning rates say, task by task; empty where rates were not varied.

    p is adjusted over all tasks and groups, of each of the three kinds of tests by itself.
    """
    runs: dict[str | None, dict[Group, dict[float, BySeed]]] = {}
    for row in rows:
        group = group_of(row)
        if group.rate is not None:
            at = runs.setdefault(row["task"], {}).setdefault(group.without(LEARNING_RATE), {})
            at.setdefault(group.rate, {})[row["seed"]] = row
    found = [_grid(task, group, groups) for task, groups in runs.items() for group in groups]
    found = _with_adjusted(found, "mean_against_lora")
    found = _with_adjusted(found, "best_against_lora")
    return _with_adjusted_rates(found)


def _grid(task: str | None, group: Group, groups: Mapping[Group, dict[float, BySeed]]) -> Grid:
    own = groups[group]
    other = lora_beside(group, list(groups))
    lora = groups[other] if other is not None and other != group else {}
    best, lora_best = _best(own), _best(lora)
    mean, lora_mean = _means(own), _means(lora)
    losses = _losses(own[best]) if best is not None else {}
    return Grid(
        task=task,
        group=group,
        rates=[_at(rate, own[rate], lora.get(rate, {})) for rate in sorted(own)],
        mean=interval(list(mean.values())) if mean else None,
        mean_against_lora=_against(mean, lora_mean) if own.keys() == lora.keys() else None,
        best_rate=best,
        best=interval(list(losses.values())) if losses else None,
        best_against_lora=_against(losses, _losses(lora[lora_best])) if lora_best is not None else None,
        curve=_curve(own[best]) if best is not None else [],
    )


def _at(rate: float, own: BySeed, lora: BySeed) -> AtRate:
    losses = _losses(own)
    shares, never = [], 0
    for seed, row in own.items():
        goal = _losses(lora).get(seed)
        if seed not in losses or goal is None or not (row.get("evaluations") and lora[seed].get("evaluations")):
            continue
        steps, most = steps_to_reach(row, goal), steps_to_reach(lora[seed], goal)
        if steps is None:
            never += 1
        else:
            # The last evaluation may differ from the final loss by rounding.
            shares.append(steps / (lora[seed]["steps"] if most is None else most))
    return AtRate(
        rate=rate,
        loss=interval(list(losses.values())) if losses else None,
        against_lora=_against(losses, _losses(lora)),
        steps=interval(shares) if shares else None,
        never=never,
        failed=sum(row["status"] != "finished" for row in own.values()),
    )


def _losses(runs: BySeed) -> dict[int, float]:
    """The final held-out loss, by seed, of those that have finished."""
    done = {seed: row.get("held_out_loss") for seed, row in runs.items() if row["status"] == "finished"}
    return {seed: loss for seed, loss in sorted(done.items()) if loss is not None}


def _means(rates: Mapping[float, BySeed]) -> dict[int, float]:
    losses = [_losses(runs) for runs in rates.values()]
    return {seed: fmean(own[seed] for own in losses) for seed in sorted(_in_all(losses))}


def _in_all(rates: Sequence[Mapping[int, Any]]) -> set[int]:
    """The seeds that every rate has."""
    return set.intersection(*map(set, rates)) if rates else set()


def _best(rates: Mapping[float, BySeed]) -> float | None:
    whole = {rate: runs for rate, runs in rates.items() if runs and len(_losses(runs)) == len(runs)}
    # A seed that ran at some rates alone would favour those where it is easy, or the others.
    shared = _in_all(list(whole.values()))

    def chosen_by(rate: float) -> float:
        runs = {seed: row for seed, row in whole[rate].items() if seed in shared or not shared}
        losses = [row.get("validation_loss") for row in runs.values()]
        return fmean(_losses(runs).values() if None in losses else losses)  # type: ignore[arg-type]

    return min(whole, key=chosen_by, default=None)


def _curve(runs: BySeed) -> list[tuple[int, Interval]]:
    """The means over seeds, where all were evaluated at the same steps."""
    curves = [row["evaluations"] for row in runs.values() if row.get("evaluations")]
    points = list(zip(*curves))
    if not curves or any(len({one["step"] for one in point}) > 1 for point in points):
        return []
    return [(int(point[0]["step"]), interval([one["loss"] for one in point])) for point in points]


def _against(own: Mapping[int, float], lora: Mapping[int, float]) -> Against | None:
    seeds = sorted(own.keys() & lora.keys())
    if not seeds:
        return None
    difference, p = paired(own, lora)
    return Against(Paired(difference, p, None), interval([own[seed] / lora[seed] - 1 for seed in seeds]))


def _with_adjusted(found: Sequence[Grid], field: str) -> list[Grid]:
    tests: dict[int, Against] = {i: getattr(grid, field) for i, grid in enumerate(found) if getattr(grid, field)}
    changed: dict[int, dict[str, Any]] = {i: {field: test} for i, test in _adjusted(tests).items()}
    return [grid._replace(**changed.get(i, {})) for i, grid in enumerate(found)]


def _with_adjusted_rates(found: Sequence[Grid]) -> list[Grid]:
    tests = {(i, j): at.against_lora for i, grid in enumerate(found) for j, at in enumerate(grid.rates)}
    done = _adjusted({key: test for key, test in tests.items() if test is not None})

    def rates(i: int, grid: Grid) -> list[AtRate]:
        return [at._replace(against_lora=done.get((i, j))) for j, at in enumerate(grid.rates)]

    return [grid._replace(rates=rates(i, grid)) for i, grid in enumerate(found)]


def _adjusted(tests: Mapping[Any, Against]) -> dict[Any, Against]:
    values = adjusted({key: test.paired.p for key, test in tests.items() if test.paired.p is not None})

    def whole(key: Any) -> Against:
        return tests[key]._replace(paired=tests[key].paired._replace(adjusted_p=values.get(key)))

    return {key: whole(key) for key in tests}


def by_task(found: Sequence[Grid]) -> dict[str | None, list[Grid]]:
    """In the order of the first of each task."""
    tasks: dict[str | None, list[Grid]] = {}
    for grid in found:
        tasks.setdefault(grid.task, []).append(grid)
    return tasks


Cells = tuple[list[str], list[list[str]]]
"""The heads of a table, and its lines."""


def loss_table(found: Sequence[Grid], loss: Callable[[Interval], str], p: Callable[[Paired], str]) -> Cells:
    """The losses of one task: at each rate, over the grid, and at the best rate."""
    rates = sorted({at.rate for grid in found for at in grid.rates})
    heads = ["held-out loss", *map(rate_text, rates), "mean", "− LoRA", "p", "best rate", "tuned", "− LoRA", "p"]
    lines = []
    for grid in found:
        at = {one.rate: one for one in grid.rates}
        lines.append(
            [
                grid.group.label,
                *(_at_text(at.get(rate), loss) for rate in rates),
                loss(grid.mean) if grid.mean else "",
                *_against_text(grid.mean_against_lora, p),
                rate_text(grid.best_rate) if grid.best_rate is not None else "",
                loss(grid.best) if grid.best else "",
                *_against_text(grid.best_against_lora, p),
            ]
        )
    return heads, lines


def steps_table(found: Sequence[Grid]) -> Cells | None:
    """The steps of one task to LoRA's final loss, over LoRA's own; None where runs were not evaluated on the way."""
    rates = sorted({at.rate for grid in found for at in grid.rates})
    lines = []
    for grid in found:
        at = {one.rate: one for one in grid.rates}
        texts = [steps_text(at[rate]) if rate in at else "" for rate in rates]
        if any(texts):
            lines.append([grid.group.label, *texts])
    return (["steps to LoRA’s final loss, over LoRA’s", *map(rate_text, rates)], lines) if lines else None


def rate_text(rate: float) -> str:
    """As one types it: 1e-3, not 0.001."""
    digits, _, power = f"{rate:e}".partition("e")
    return f"{float(digits):g}e{int(power)}"


def _at_text(at: AtRate | None, loss: Callable[[Interval], str]) -> str:
    if at is None:
        return ""
    parts = [loss(at.loss)] if at.loss else []
    return " ".join([*parts, *([f"({at.failed} failed)"] if at.failed else [])])


def _against_text(against: Against | None, p: Callable[[Paired], str]) -> list[str]:
    if against is None:
        return ["", ""]
    return [relative_text(against.relative), p(against.paired)]


def relative_text(share: Interval) -> str:
    """A difference as a share of LoRA's loss, in per cent."""
    half = "" if share.half is None else f" ± {100 * share.half:.1f}"
    return f"{100 * share.mean:+.1f}{half} %"


def steps_text(at: AtRate) -> str:
    """The steps to LoRA's final loss over its own, and how many runs never had it."""
    half = "" if at.steps is None or at.steps.half is None else f" ± {at.steps.half:.2f}"
    parts = [] if at.steps is None else [f"{at.steps.mean:.2f}{half}"]
    return " ".join([*parts, *([f"({at.never} never)"] if at.never else [])])
