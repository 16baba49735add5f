"""How long should the pre-launch be?

    peft-tsd compare RECIPE --methods lora,lora-dash --vary directions.prelaunch_steps=0,25,100,400,auto --out FOLDER
    python benchmarks/prelaunch.py FOLDER

Reads a comparison's folder and says of every task, method and length of the pre-launch: the step at which the
directions were identified, and how many are those of the longest fixed pre-launch of the same seed (in the mean
over layers); the loss (mean of the last tenth of the steps) and the score less LoRA's; the seconds that finding the
directions took, also over those of all steps before, with the checks' own part where the pre-launch was automatic.
Means over seeds, with the range. 0 stands for directions from gradients.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from peft_tsd.compare.plan import Cell

KEY = "directions.prelaunch_steps"


def directions(row: dict[str, Any], folder: Path) -> dict[str, set[int]]:
    """A run's directions, by layer."""
    cell = Cell(row["task"], row["method"], row["rank"], tuple(row["variation"].items()), row["seed"])
    state = load_file(folder / "runs" / cell.path / "adapter" / "adapter_model.safetensors")
    return {key: set(value.tolist()) for key, value in state.items() if key.endswith("_directions.indices")}


def describe(
    row: dict[str, Any], found: dict[str, set[int]], truth: dict[str, set[int]], lora: float
) -> dict[str, float | None]:
    change = row["phase_change"]
    losses = [loss for _, loss in row["loss"]]
    seconds = change["seconds"] + change.get("checks_seconds", 0.0)
    before = change["step"] * row["seconds_per_step"]
    return {
        "step": change["step"],
        "agreement": statistics.mean(len(found[key] & truth[key]) / len(truth[key]) for key in truth),
        "loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "score": 100 * (row["score"] - lora),
        "seconds": seconds,
        "part": seconds / before if before else None,
        "checks": change["checks_seconds"] / change["prelaunch_seconds"] if "checks_seconds" in change else None,
    }


def shown(rows: list[dict[str, float | None]], key: str, digits: int, sign: str = "") -> str:
    values = [row[key] for row in rows if row[key] is not None]
    if not values:
        return ""
    form = f"{sign}.{digits}f"
    text = f"{statistics.mean(values):{form}}"
    return text if len(values) == 1 else f"{text} ({min(values):{form}} to {max(values):{form}})"


def table(task: str | None, method: str, rows: list[dict[str, Any]], folder: Path) -> list[str]:
    """One table: a method on a task."""
    of_task = [row for row in rows if row["task"] == task]
    own = [row for row in of_task if row["method"] == method and KEY in row["variation"]]
    lora = {row["seed"]: row["score"] for row in of_task if row["method"] == "lora"}
    values = list(dict.fromkeys(row["variation"][KEY] for row in own))
    longest = max(value for value in values if value != "auto")
    truth = {row["seed"]: directions(row, folder) for row in own if row["variation"][KEY] == longest}
    lines = [
        f"{method}{f' on {task}' if task else ''}, {own[0]['steps']} steps, {len(truth)} seed(s)",
        "",
        f"| pre-launch | ended at step | among those of {longest} | loss | score - LoRA | seconds | over steps before "
        "| checks |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for value in values:
        found = [
            describe(row, directions(row, folder), truth[row["seed"]], lora[row["seed"]])
            for row in own
            if row["variation"][KEY] == value
        ]
        cells = [
            shown(found, "step", 0),
            shown(found, "agreement", 2),
            shown(found, "loss", 4),
            shown(found, "score", 1, "+"),
            shown(found, "seconds", 1),
            shown(found, "part", 3),
            shown(found, "checks", 4),
        ]
        lines.append(f"| {value} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"a comparison that varied {KEY}")
    folder = parser.parse_args().folder
    rows = [
        row
        for row in json.loads((folder / "results.json").read_text(encoding="utf-8"))["runs"]
        if row["status"] == "finished"
    ]
    kinds = dict.fromkeys((row["task"], row["method"]) for row in rows if KEY in row["variation"])
    if not kinds:
        parser.error(f"{folder} has no finished run that varied {KEY}; compare with --vary {KEY}=25,100,auto.")
    for task, method in kinds:
        print("\n".join(table(task, method, rows, folder)), end="\n\n")


if __name__ == "__main__":
    main()
