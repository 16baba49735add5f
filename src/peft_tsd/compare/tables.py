"""A comparison as a Markdown table, which is read in a terminal as well as on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .grid import Grid, by_task, grids, loss_table, steps_table
from .plan import Plan
from .results import HeldOut, Interval, Paired, Summary

SIGNIFICANT = 0.05


def document(
    plan: Plan,
    rows: Sequence[Mapping[str, Any]],
    tuned: Sequence[Mapping[str, Any]],
    summaries: Sequence[Summary],
    command: str,
) -> str:
    """The table of all methods, with what one needs to know to read and to repeat it."""
    parts = [table(summaries), legend(plan, rows, tuned)]
    if lost := held_out(summaries):
        parts += [markdown(*lost), HELD_OUT_LEGEND]
    for task, found_on in by_task(grids(rows)).items():
        parts += [f"## {task}"] if task else []
        parts += [markdown(*table) for table in grid_tables(found_on)]
        parts.append(GRID_LEGEND)
    if found := differences(summaries):
        parts.append(markdown(*found))
    parts.append(finding(summaries))
    if failed := [row for row in rows if row["status"] == "failed"]:
        parts.append("\n".join(f"Failed: {row['method']} (seed {row['seed']}): {row['error']}" for row in failed))
    if command:
        parts.append(f"```sh\n{command}\n```")
    return "\n\n".join(parts) + "\n"


def finding(summaries: Sequence[Summary]) -> str:
    """What the paired tests say, in words, the losing cases too."""
    tested = [(s, s.against_lora) for s in summaries if s.against_lora and s.against_lora.adjusted_p is not None]
    if not tested:
        nothing = "There is nothing to test: that takes LoRA, another method of its rank, and two seeds that differ."
        seen = [_beside_lora(s.group.label, s.held_out) for s in summaries if s.held_out and s.held_out.against_lora]
        return f"{nothing} Held-out loss: {'; '.join(seen)}." if seen else nothing
    clear = [(s, a) for s, a in tested if a.adjusted_p is not None and a.adjusted_p < SIGNIFICANT]
    parts = []
    for word, sign in (("better", 1), ("worse", -1)):
        found = [(s, a) for s, a in clear if a.difference.mean * sign > 0]
        if found:
            listed = ", ".join(f"{s.group.label} ({100 * a.difference.mean:+.1f})" for s, a in found)
            parts.append(f"{word} than LoRA of the same rank: {listed}")
    rest = len(tested) - len(clear)
    if rest:
        parts.append(f"{'all' if not clear else 'the other'} {rest} not distinguishable from LoRA with these seeds")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def _beside_lora(label: str, own: HeldOut) -> str:
    assert own.against_lora is not None
    loss, difference = own.loss.mean, own.against_lora.difference.mean
    share = difference / (loss - difference) if loss != difference else 0.0
    return f"{label} {loss:.3f}, {100 * abs(share):.1f} % {'below' if share < 0 else 'above'} LoRA's"


def table(summaries: Sequence[Summary]) -> str:
    """Scores in points (hundredths), with the 95 % confidence interval over seeds."""
    return markdown(*cells(summaries))


def cells(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]]:
    """The heads of the table and its lines, the first cell of each being the method."""
    columns = list(dict.fromkeys(name for summary in summaries for name in summary.scores))
    averaged = ["average"] if len(columns) > 1 else []
    heads = ["method", *columns, *averaged, "− LoRA", "p", "lr", "trained", "s/step", "MiB"]
    return heads, [_line(summary, columns, bool(averaged)) for summary in summaries]


HELD_OUT_LEGEND = (
    "The loss of the rows scored: over the tokens of the answers, the mean over tasks. “− LoRA” and p as above, of "
    "that loss: less is better. “steps to LoRA’s”: optimizer steps after which a run had the final loss of LoRA’s run "
    "of the same task and seed (in brackets how many runs never had it); it takes `evaluation.every`."
)


def held_out(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]] | None:
    """As `cells`, the final held-out losses; None where no run has one."""
    measured = [(summary.group.label, summary.held_out) for summary in summaries if summary.held_out]
    if not measured:
        return None
    return ["held-out loss", "final", "− LoRA", "p", "steps to LoRA’s"], [
        [
            label,
            _loss(own.loss),
            _loss(own.against_lora and own.against_lora.difference, sign=True),
            _p(own.against_lora),
            _steps(own),
        ]
        for label, own in measured
    ]


GRID_LEGEND = (
    "Final held-out losses over the learning rate, one task by itself. “mean”: over the rates, of seeds that finished "
    "at all. “best rate”: that with the lowest loss on validation rows (without such, of the rows scored), over the "
    "seeds that ran at every rate; “tuned”: the loss there, of all its seeds. “− LoRA”: relative to LoRA’s, over the "
    "same seeds, in “tuned” LoRA’s at its own best rate; p as above. “steps”: until LoRA’s final loss at the same "
    "rate and seed, 1 being as many as LoRA took."
)


def grid_tables(found: Sequence[Grid]) -> list[tuple[list[str], list[list[str]]]]:
    """As `cells`: the losses of one task over the rate, and the steps to LoRA's where runs were evaluated."""
    steps = steps_table(found)
    return [loss_table(found, _loss, _p), *([steps] if steps else [])]


def differences(summaries: Sequence[Summary]) -> tuple[list[str], list[list[str]]] | None:
    """As `cells`, the differences from LoRA by task; None where there is but one, or no LoRA."""
    compared = [summary for summary in summaries if summary.differences]
    columns = list(dict.fromkeys(name for summary in compared for name in summary.differences))
    if len(columns) < 2:
        return None
    return ["− LoRA, by task", *columns], [
        [summary.group.label, *(_points(summary.differences.get(name), sign=True) for name in columns)]
        for summary in compared
    ]


def _line(summary: Summary, columns: Sequence[str], averaged: bool) -> list[str]:
    trains = summary.trainable_parameters > 0
    return [
        summary.group.label,
        *(_points(summary.scores.get(name)) for name in columns),
        *([_points(summary.average)] if averaged else []),
        _points(summary.against_lora and summary.against_lora.difference, sign=True),
        _p(summary.against_lora),
        " ".join(f"{rate:g}" for rate in summary.learning_rates) if trains else "",
        f"{summary.trainable_parameters:,}",
        f"{summary.seconds_per_step:.2f}" if trains else "",
        f"{summary.peak_memory_bytes / 2**20:,.0f}" if summary.peak_memory_bytes else "",
    ]


def legend(plan: Plan, rows: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]]) -> str:
    """What the columns are, what was done, and on what machine."""
    done = [row for row in rows if row["status"] == "finished"]
    if not done:
        return "No run has finished."
    seeds = sorted({row["seed"] for row in done})
    steps = sorted({row["steps"] for row in done if row["steps"]})
    hours = sum(row["seconds"] for row in [*done, *tuned] if row["status"] == "finished") / 3600
    text = (
        f"{', '.join(sorted({row['metric'] for row in done}))}, in hundredths: mean ± half of the 95 % confidence "
        f"interval over {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'} ({', '.join(map(str, seeds))}). "
        "“− LoRA”: difference from LoRA of the same rank over the same seeds, on the average over tasks; p: paired "
        "t-test, adjusted for the number of such tests (false discovery rate). lr: learning rates. trained: numbers "
        "trained, with a classifier’s head. MiB: the largest peak of memory of a run’s process. "
        f"{len(done)} runs of {' or '.join(map(str, steps)) or 0} steps"
    )
    if plan.tuning:
        text += (
            f", and {len(tuned)} that chose {plan.tuning.key} of {', '.join(map(str, plan.tuning.values))} by "
            f"{plan.validation_size} rows held out of training, for each method and task"
        )
    missing = len(plan.cells()) - len(rows)
    if missing:
        text += f"; {missing} runs are still to be done"
    machine, versions = done[0]["machine"], done[0]["versions"]
    return (
        f"{text}. {hours:.1f} hours of runs on {machine['device']} ({machine['cpus']} CPUs, {machine['threads']} "
        f"threads a run), {', '.join(f'{name} {number}' for name, number in versions.items())}."
    )


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with aligned columns; the first is text, the others are numbers."""
    # A rule of one colon, without a dash, would be no table.
    widths = [max(2, *map(len, column)) for column in zip(heads, *lines)]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return f"| {' | '.join(padded)} |"

    rule = f"| {'-' * widths[0]} | {' | '.join('-' * (width - 1) + ':' for width in widths[1:])} |"
    return "\n".join([line(heads), rule, *map(line, lines)])


def _points(value: Interval | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{100 * value.mean:+.1f}" if sign else f"{100 * value.mean:.1f}"
    return mean if value.half is None else f"{mean} ± {100 * value.half:.1f}"


def _loss(value: Interval | None, *, sign: bool = False) -> str:
    if value is None:
        return ""
    mean = f"{value.mean:{'+' if sign else ''}.3f}"
    return mean if value.half is None else f"{mean} ± {value.half:.3f}"


def _steps(own: HeldOut) -> str:
    parts = []
    if own.steps is not None:
        parts.append(f"{own.steps.mean:.0f}" + ("" if own.steps.half is None else f" ± {own.steps.half:.0f}"))
    if own.never:
        parts.append(f"({own.never} never)")
    return " ".join(parts)


def _p(against: Paired | None) -> str:
    if against is None or against.adjusted_p is None:
        return ""
    return p_text(against.adjusted_p)


def p_text(p: float) -> str:
    """Three digits of a p."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
