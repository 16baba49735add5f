"""How long should the pre-launch be?

    python benchmarks/prelaunch.py --data FOLDER --out runs/prelaunch                     # hours on a CPU
    python benchmarks/prelaunch.py --data FOLDER --out runs/prelaunch-tiny --size tiny    # minutes on one core

On two tasks (SmolLM2-135M on commonsense questions, MiniLM on CoLA), LoRA-Dash with its directions identified after
25, 50, 100, 200 and 400 steps, when they have settled (`prelaunch_steps: auto`), and from gradients before the first
step. All train for the same number of steps, on the same data in the same order. Beside each: how many of its
directions are among those of a pre-launch that lasts as long as the whole run, in the mean over layers; its loss (mean
of the last tenth of the steps) and score; and the seconds that finding the directions took, with the checks of an
automatic pre-launch, also over those of all training steps before. Means over seeds, with the range where there are
several. The checks' own part of the time before them includes factorizing the weights they look at, which the
transition then need not do. FOLDER holds `commonsense` (LLM-Adapters' form) and `glue` (GLUE's own files).

Runs are kept in `--out`: a finished one is not repeated, an interrupted one goes on. `--page FILE` writes the tables
as Markdown.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from peft_tsd import __version__, training
from peft_tsd.recipe import load_recipe
from peft_tsd.run_folder import RunFolder

TASKS = {
    "SmolLM2-135M, commonsense": ("smollm2-135m-commonsense", [], "commonsense"),
    "MiniLM, CoLA": ("minilm-glue", ["task=cola"], "glue"),
}
SIZES: dict[str, dict[str, Any]] = {
    "full": {"steps": 800, "fixed": [25, 50, 100, 200, 400], "seeds": [0, 1, 2], "overrides": []},
    "tiny": {
        "steps": 24,
        "fixed": [3, 6, 12],
        "seeds": [0],
        "overrides": [
            "directions.prelaunch_min=5",
            "directions.prelaunch_max=20",
            "training.batch_size=4",
            "data.test_size=8",
            "task.max_length=64",
            "optimizer.warmup_steps=0",
            "optimizer.warmup_ratio=0.1",
        ],
    },
}


def run(task: str, prelaunch: int | str, seed: int, size: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One run's metrics, and its directions by layer."""
    recipe, choices, data = TASKS[task]
    steps = size["steps"]
    folder = args.out / recipe / f"prelaunch-{prelaunch}-seed-{seed}"
    overrides = [
        *choices,
        *size["overrides"],
        f"data.folder={args.data / data}",
        f"data.train_size={steps * (4 if args.size == 'tiny' else 8)}",
        f"training.steps={steps}",
        f"training.save_every={max(1, steps // 4)}",
        "method=lora-dash",
        "evaluation.before=false",
        f"directions.prelaunch_steps={prelaunch}",
        f"seed={seed}",
        "data.seed=0",
        f"output={folder}",
        f"resume={'true' if folder.exists() else 'false'}",
    ]
    if recipe.startswith("smollm2"):
        overrides.append("task.scoring=likelihood")
    result = training.train(load_recipe(recipe, overrides))
    state = load_file(RunFolder(folder).adapter / "adapter_model.safetensors")
    found = {key: set(value.tolist()) for key, value in state.items() if key.endswith("lora_directions.indices")}
    return {"metrics": result.metrics, "directions": found}


def describe(one: dict[str, Any], truth: dict[str, set[int]]) -> dict[str, float]:
    metrics = one["metrics"]
    losses = [entry["loss"] for entry in metrics["loss"]]
    change = metrics["phase_change"]
    seconds = change["seconds"] + change.get("checks_seconds", 0.0)
    row = {
        "step": change["step"],
        "agreement": statistics.mean(len(one["directions"][key] & truth[key]) / len(truth[key]) for key in truth),
        "loss": statistics.mean(losses[-max(1, len(losses) // 10) :]),
        "score": metrics["score"]["after"],
        "seconds": seconds,
    }
    if change["step"]:
        row["part"] = seconds / (change["step"] * metrics["seconds_per_step"])
    if "checks_seconds" in change:
        row["checks part"] = change["checks_seconds"] / change["prelaunch_seconds"]
    return row


def shown(values: list[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(rows: dict[str, list[dict[str, float]]]) -> list[str]:
    lines = [
        "| directions identified | at step | among the longest's | loss | score | seconds | over the steps before |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, of_seeds in rows.items():
        cells = [
            shown([row[key] for row in of_seeds], digits)
            for key, digits in (("step", 0), ("agreement", 3), ("loss", 4), ("score", 4), ("seconds", 1))
        ]
        parts = [row["part"] for row in of_seeds if "part" in row]
        checks = [row["checks part"] for row in of_seeds if "checks part" in row]
        last = shown(parts, 3) if parts else "-"
        lines.append(f"| {name} | {' | '.join(cells)} | {last}{f'; checks {shown(checks, 4)}' if checks else ''} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder with commonsense and glue")
    parser.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--size", choices=list(SIZES), default="full")
    parser.add_argument("--task", action="append", choices=list(TASKS), help="only this; may be given again")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the size's own")
    parser.add_argument("--page", type=Path, help="write the tables here, as Markdown")
    args = parser.parse_args()
    size = SIZES[args.size]
    lines = [
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else f'{torch.get_num_threads()} CPU threads'}; "
        f"torch {torch.__version__}, peft-tsd {__version__}; {size['steps']} steps, "
        f"{len(args.seeds or size['seeds'])} seed(s)"
    ]
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for task in args.task or TASKS:
        rows: dict[str, list[dict[str, float]]] = {}
        for seed in args.seeds or size["seeds"]:
            longest = run(task, size["steps"] - 1, seed, size, args)
            contenders = {"gradients": 0, **{str(t): t for t in size["fixed"]}, "auto": "auto"}
            for name, prelaunch in contenders.items():
                one = run(task, prelaunch, seed, size, args)
                rows.setdefault(name, []).append(describe(one, longest["directions"]))
            rows.setdefault("at the end: LoRA", []).append(describe(longest, longest["directions"]))
        results[task] = rows
        lines += ["", f"## {task}", "", *table(rows)]
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    if args.page:
        args.page.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
