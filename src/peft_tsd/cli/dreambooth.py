"""Verbs on diffusion models. They need the extra `diffusion`, which `main` has looked for."""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from pathlib import Path

import diffusers
from transformers.utils import logging as transformers_logging

from .. import diffusion
from ..diffusion.recipe import SHORT, DreamBooth, load_recipe
from ..diffusion.subjects import Comparison
from ..diffusion.training import Result
from ..distributed.sharded import is_main_process
from ..errors import InputError
from ..recipes.reading import find_recipe, load_as
from ..runs.stopping import Interrupted
from .screen import DONE, INTERRUPTED, command_name, near, say_how_to_resume, screen
from .values import adapter_folder, numbers

METHODS = ("lora", "lora-tsd")
"""What is compared without being asked for."""


def train(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    _quiet()
    try:
        with screen():
            result = diffusion.train(recipe)
    except Interrupted as interrupted:
        say_how_to_resume(interrupted.folder)
        return 128 + interrupted.signal
    if is_main_process():
        print(_summary(result))
    return DONE


def compare(arguments: argparse.Namespace) -> int:
    """Train with several methods alike, and show what they draw on one page. Runs that are there are continued, or
    used as they are."""
    for option, given in (("--tasks", arguments.tasks), ("--vary", arguments.vary), ("--tune", arguments.tune)):
        if given:
            raise InputError(f"{option} {given!r} has no meaning for {arguments.recipe!r}; vary --methods or --ranks")
    if arguments.jobs != 1:
        raise InputError(f"--jobs={arguments.jobs} has no meaning for {arguments.recipe!r}; its runs share one GPU")
    out = Path(arguments.out or Path("comparisons") / find_recipe(arguments.recipe).stem).expanduser()
    page = out / "page"
    if page.exists():
        raise InputError(f"{str(page)!r} exists and is not overwritten; remove it, or name another folder with --out")
    own = load_recipe(arguments.recipe, arguments.overrides)
    runs = _runs(arguments, own, out)
    _quiet()
    try:
        with screen():
            results = [diffusion.train(run) for run in runs.values()]
            comparison = diffusion.compare_subjects(
                [result.folder.path for result in results],
                page,
                labels=list(runs),
                prompts=own.comparison.prompts,
                num_images=own.comparison.num_images,
                steps=own.validation.steps,
                guidance_scale=own.validation.guidance_scale,
                seed=own.validation.seed,
                clip=own.comparison.clip,
                dino=own.comparison.dino,
            )
    except Interrupted:
        print(f"interrupted; the same command continues, with what is done in {near(out)}", file=sys.stderr)
        return INTERRUPTED
    print(_comparison_summary(comparison))
    return DONE


def _runs(arguments: argparse.Namespace, own: DreamBooth, out: Path) -> dict[str, DreamBooth]:
    """The recipe of each run, by its label."""
    methods = arguments.methods.split(",") if arguments.methods is not None else METHODS
    ranks = numbers("--ranks", arguments.ranks)
    seeds = numbers("--seeds", arguments.seeds) or ()
    runs: dict[str, DreamBooth] = {}
    for method, rank, seed in itertools.product(methods, ranks or (own.adapter.r,), seeds):
        parts = [method, f"r {rank}" if ranks else "", f"seed {seed}" if len(seeds) > 1 else ""]
        label = ", ".join(filter(None, parts))
        folder = out / "runs" / label.replace(", ", "-").replace(" ", "")
        changed = {"method": method, "seed": seed, "output": str(folder), "resume": folder.exists()}
        alpha = rank * own.adapter.lora_alpha / own.adapter.r
        changed |= {"adapter.r": rank, "adapter.lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        runs[label] = load_as(DreamBooth, arguments.recipe, arguments.overrides, changed, SHORT)
    return runs


def export(arguments: argparse.Namespace) -> int:
    if arguments.gguf is not None:
        raise InputError("--gguf is for the adapters of language models; llama.cpp reads no other")
    adapter, out = adapter_folder(arguments.adapter), Path(arguments.out).expanduser()
    try:
        print(diffusion.export_diffusers(adapter, out, rank=arguments.rank, kohya=arguments.kohya))
    except (ValueError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from None
    return DONE


def _quiet() -> None:
    # A run has its own bars; these would show each component's.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _summary(result: Result) -> str:
    """What a finished run comes to."""
    folder, metrics = result.folder, result.metrics
    losses = metrics["fixed_loss"]
    lines = [
        "",
        f"{metrics['method']} on {metrics['model']}: {metrics['data']['photos']} photos, {metrics['steps']} steps",
        f"loss at fixed noises and timesteps: {losses['before']:.4f} -> {losses['after']:.4f}",
        f"{metrics['trainable_parameters']:,} parameters trained, {metrics['seconds_per_step']:.2f} s a step",
    ]
    change = metrics["phase_change"]
    if change:
        lines.append(f"directions identified after step {change['step']}, in {change['seconds']:.1f} s")
    if result.pipe is None:
        lines.append("the run had been finished before; nothing was done")
    lora = near(folder.adapter_lora)
    lines += [
        "",
        f"run folder   {near(folder.path)}",
        f"images       {near(folder.path / 'images')}",
        f"LoRA file    {lora}   pipe.load_lora_weights({lora!r})",
        "next:",
        f"  {command_name()} export {shlex.quote(near(folder.adapter))} OUT --rank 8",
    ]
    if metrics["method"] != "lora":
        other = f"{command_name()} train {shlex.quote(near(folder.recipe))} method=lora output=OTHER"
        lines.append(f"  {other}   # the baseline")
    return "\n".join(lines)


def _comparison_summary(comparison: Comparison) -> str:
    lines = []
    for subject in comparison.subjects:
        lines += ["", subject.words]
        for column in subject.columns:
            scores = "   ".join(f"{name} {value:.3f}" for name, value in column.scores.items())
            lines.append(f"  {column.label:24} {scores}".rstrip())
    lines += [f"not measured: {name}, {reason}" for name, reason in comparison.missing.items()]
    return "\n".join([*lines, "", f"page   {near(comparison.page)}"])
