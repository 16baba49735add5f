"""What a run has come to, in a few lines."""

from __future__ import annotations

import shlex
from typing import Any

from ..tuner.table import Directions
from .screen import command_name, near


def summary(result: Any) -> str:
    folder, metrics = result.folder, result.metrics
    score, loss = metrics["score"], metrics["loss"]
    before = f"{score['before']:.3f} -> " if "before" in score else ""
    majority = f" (the most frequent label alone: {score['majority']:.3f})" if "majority" in score else ""
    lines = [
        "",
        f"{score['metric']} of {score['questions']} unseen questions: {before}{score['after']:.3f}{majority}",
        *_by_task(score),
        f"trained: {metrics['trainable_parameters']:,} of {metrics['total_parameters']:,} parameters, "
        f"{metrics['seconds_per_step']:.2f} s a step",
    ]
    if loss:
        lines.append(f"loss: {loss[0]['loss']:.3f} at step 1, {loss[-1]['loss']:.3f} at step {loss[-1]['step']}")
    if metrics.get("best_step"):
        early = "stopped early, and " if metrics["stopped_early"] else ""
        lines.append(f"{early}taken from step {metrics['best_step']}, where the held-out loss was lowest")
    change = metrics["phase_change"]
    if change:
        lines.append(f"directions identified after step {change['step']}, in {change['seconds']:.1f} s")
    if result.model is None:
        lines.append("the run had been finished before; nothing was done")
    elif change:
        directions = result.model.directions()
        most = sorted(directions, key=lambda name: -float(directions[name].rates[:1].sum()))[:5]
        shown = Directions({name: directions[name] for name in most}, directions.prelaunch_steps)
        lines += ["", "most changed layers:", str(shown)]
    lines += ["", f"run folder   {near(folder.path)}"]
    kept = {
        "adapter": folder.adapter,
        "plain LoRA": folder.adapter if metrics["method"] == "lora" else folder.adapter_lora,
        "model": folder.model,
    }
    there = {name: path for name, path in kept.items() if path.exists()}
    lines += [f"{name:12} {near(path)}" for name, path in there.items()]
    if there:
        lines += ["next:", f"  {command_name()} evaluate {shlex.quote(near(list(there.values())[-1]))}"]
    if folder.adapter_lora.exists():
        lines += [
            f"  {command_name()} export {shlex.quote(near(folder.adapter))} OUT --rank 8",
            f"  {command_name()} train {shlex.quote(near(folder.recipe))} method=lora output=OTHER   # the baseline",
        ]
    return "\n".join(lines).rstrip()


def _by_task(score: dict[str, Any]) -> list[str]:
    """A line a task of a suite, and what was left out."""
    lines = []
    for name, task in score.get("tasks", {}).items():
        values = [
            f"{metric} {task['before'][metric]:.3f} -> {value:.3f}" if "before" in task else f"{metric} {value:.3f}"
            for metric, value in task["after"].items()
        ]
        lines.append(f"  {name:16} {task['questions']:6} questions   {', '.join(values)}")
    if score.get("left_out"):
        lines.append(f"  left out, no data: {', '.join(score['left_out'])}")
    return lines
