"""The text of docs/results.md that follows from rows: see results.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from peft_tsd.compare.grid import Cells, by_task, grids, rate_text
from peft_tsd.compare.plan import LEARNING_RATE
from peft_tsd.compare.results import group_of, interval
from peft_tsd.compare.tables import GRID_LEGEND, grid_tables, markdown
from results_targets import targets

Row = Mapping[str, Any]


def section(content: Mapping[str, Any], name: str, figures: Sequence[str]) -> str:
    """One file of rows: what was done, its figures, and its tables, task by task."""
    rows = content["rows"]
    parts = [f"## {content['title']}", *([content["about"]] if content["about"] else [])]
    if content["targets"]:
        parts.append(targets(rows, content["targets"]))
    if content["recipe"]:
        parts.append("```sh\n" + "\n".join(_commands(content["recipe"], content["variants"], rows)) + "\n```")
    parts.append(_done(content, name))
    parts += [f"![{_caption(figure)}]({figure})" for figure in figures]
    parts.append(markdown(["variant", "method", "differs in"], _variants(content["variants"])))
    for task, found in by_task(grids(rows)).items():
        parts.append(f"### {content['title']}: {task}" if task else "### Held-out loss")
        best = {grid.group: grid.best_rate for grid in found}
        parts += [markdown(*table) for table in (*grid_tables(found), _scores(rows, task, best)) if table[1]]
    parts.append(GRID_LEGEND)
    parts.append(markdown(*_costs(rows)))
    parts.append(
        "“start”: seconds before the first step and at a transition, over the seconds of a step of the same run, the "
        "median over runs; “MiB”: the largest peak of memory of a run. What a step takes beside LoRA’s, alone on a "
        "machine, is in [benchmarks](../benchmarks/README.md)."
    )
    return "\n\n".join(parts)


def _commands(recipe: str, variants: Mapping[str, Mapping[str, Any]], rows: Sequence[Row]) -> list[str]:
    """What makes the rows, in as few commands as their rates and seeds allow."""
    rates: dict[tuple[Any, ...], set[float]] = {}
    for row in rows:
        key = (row["task"], row["rank"], group_of(row).name, row["seed"])
        rates.setdefault(key, set()).add(row["variation"][LEARNING_RATE])
    seeds: dict[tuple[Any, ...], list[str]] = {}
    for (task, rank, variant, seed), found in rates.items():
        given = ",".join(map(rate_text, sorted(found)))
        seeds.setdefault((task, rank, given, variant), []).append(str(seed))
    together: dict[tuple[Any, ...], list[str]] = {}
    for (task, rank, given, variant), numbers in seeds.items():
        together.setdefault((task, rank, given, ",".join(numbers)), []).append(variant)
    own = {variant["adapter"]["r"] for variant in variants.values() if "adapter" in variant}
    is_own = {rank for _, rank, _, _ in together if rank is not None} <= own
    return [
        f"peft-tsd compare {recipe} --tasks {task} --variants {','.join(names)} --rates {given} --seeds {numbers}"
        + ("" if is_own or rank is None else f" --ranks {rank}")
        for (task, rank, given, numbers), names in together.items()
    ]


def _done(content: Mapping[str, Any], name: str) -> str:
    rows = content["rows"]
    done = [row for row in rows if row["status"] == "finished"]
    seeds = sorted({row["seed"] for row in done})
    hours = sum(row["seconds"] for row in done) / 3600
    setups = {
        f"{one['machine']['device']} ({one['machine']['cpus']} CPUs), "
        + ", ".join(f"{package} {number}" for package, number in one["versions"].items())
        for one in content["setups"]
    }
    text = (
        f"{len(done)} runs of {' or '.join(map(str, sorted({row['steps'] for row in done})))} steps, seeds "
        f"{', '.join(map(str, seeds))}, {hours:.1f} hours, on {'; '.join(sorted(setups))}. Rows: "
        f"`benchmarks/results/{name}.json`."
    )
    failed = len(rows) - len(done)
    return f"{text} {failed} runs failed, such as diverged." if failed else text


def _caption(figure: str) -> str:
    what = "during training, at each one's best rate" if "curves" in figure else "over the learning rate"
    return f"Held-out loss {what}, means over seeds with 95 % intervals, cut at the frame"


def _variants(variants: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """What each is, against the settings that most have."""
    parts = ("adapter", "directions", "start")
    flat = {
        name: {f"{part}.{key}": value for part in parts for key, value in own.get(part, {}).items()}
        for name, own in variants.items()
    }
    usual: dict[str, Any] = {}
    for key in dict.fromkeys(key for own in flat.values() for key in own):
        texts = [repr(own[key]) for own in flat.values() if key in own]
        usual[key] = max(dict.fromkeys(texts), key=texts.count)
    return [
        [
            name,
            variants[name]["method"],
            ", ".join(f"{k.partition('.')[2]}={v}" for k, v in own.items() if repr(v) != usual[k]) or "–",
        ]
        for name, own in flat.items()
    ]


def _scores(rows: Sequence[Row], task: str | None, best: Mapping[Any, float | None]) -> Cells:
    """The metric at each one's best rate."""
    lines, metrics = [], set()
    for group, rate in best.items():
        own = [
            row
            for row in rows
            if row["task"] == task and row["status"] == "finished" and group_of(row).rate == rate
            and group_of(row).without(LEARNING_RATE) == group
        ]  # fmt: skip
        if own:
            metrics |= {row["metric"] for row in own}
            mean, half = interval([100 * row["score"] for row in own])
            lines.append([group.label, f"{mean:.1f}" + ("" if half is None else f" ± {half:.1f}")])
    return [f"{' or '.join(sorted(metrics))} at the best rate, in hundredths", "mean"], lines


def _costs(rows: Sequence[Row]) -> Cells:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "finished":
            groups.setdefault(group_of(row).without(LEARNING_RATE).label, []).append(row)
    lines = []
    for label, own in groups.items():
        memory = [row["peak_memory_bytes"] for row in own if row.get("peak_memory_bytes")]
        starts = [
            (row["start_seconds"] + row.get("transition_seconds", 0.0)) / row["seconds_per_step"]
            for row in own
            if "start_seconds" in row
        ]
        lines.append(
            [
                label,
                f"{own[0]['trainable_parameters']:,}",
                f"{median(starts):.1f}" if starts else "",
                f"{max(memory) / 2**20:,.0f}" if memory else "",
            ]
        )
    return ["cost", "trained", "start, in steps", "MiB"], lines
