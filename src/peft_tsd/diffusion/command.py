"""What the command line does with DreamBooth recipes, and says of it."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import diffusers
import torch
from peft import get_peft_model
from transformers.utils import logging as transformers_logging

from ..errors import RecipeError
from ..loading import check_target_modules
from ..methods import adapter_config
from ..recipe import load_as
from ..recipe_check import packaged_config
from .compare import Comparison, compare_subjects
from .recipe import SHORT, DreamBooth, load_recipe
from .training import Result, train


def run(recipe: str, overrides: Sequence[str], screen: Callable[[], AbstractContextManager[None]]) -> Result:
    """Train as a recipe says.

    Args:
        recipe: A file, or the name of a shipped one.
        overrides: `key=value` each.
        screen: Where the run is shown.
    """
    loaded = load_recipe(recipe, overrides)
    _quiet()
    with screen():
        return train(loaded)


def _quiet() -> None:
    # A run has its own bars; these would show each component's.
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def summary(result: Result, program: str, near: Callable[[Path], str]) -> str:
    """What a finished run comes to.

    Args:
        result: The run.
        program: How this program is called.
        near: A path as one would type it.
    """
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
        f"  {program} export {shlex.quote(near(folder.adapter))} OUT --rank 8",
    ]
    if metrics["method"] != "lora":
        other = f"{program} train {shlex.quote(near(folder.recipe))} method=lora output=OTHER"
        lines.append(f"  {other}   # the baseline")
    return "\n".join(lines)


METHODS = ("lora", "lora-tsd")
"""What is compared without being asked for."""


def compare(
    recipe: str,
    overrides: Sequence[str],
    out: Path,
    *,
    methods: Sequence[str] | None,
    ranks: Sequence[int] | None,
    seeds: Sequence[int],
    screen: Callable[[], AbstractContextManager[None]],
) -> Comparison:
    """Train with several methods alike, and show what they draw on one page.

    Args:
        recipe: A file, or the name of a shipped one.
        overrides: For every run.
        out: The folder of the runs and the page; runs that are there are continued, or used as they are.
        methods: Their names; `METHODS` without any.
        ranks: LoRA's r, its α in proportion; the recipe's without any.
        seeds: Of the runs.
        screen: Where the runs are shown.

    Raises:
        RecipeError: A run cannot be carried out, or the page is there already.
        Interrupted: The user stopped a run; the same call continues.
    """
    page = out / "page"
    if page.exists():
        raise RecipeError(f"{str(page)!r} exists and is not overwritten; remove it, or name another folder with --out")
    own = load_recipe(recipe, overrides)
    loaded: dict[str, DreamBooth] = {}
    for method, rank, seed in itertools.product(methods or METHODS, ranks or (own.adapter.r,), seeds):
        parts = [method, f"r {rank}" if ranks else "", f"seed {seed}" if len(seeds) > 1 else ""]
        label = ", ".join(filter(None, parts))
        folder = out / "runs" / label.replace(", ", "-").replace(" ", "")
        changed = {"method": method, "seed": seed, "output": str(folder), "resume": folder.exists()}
        alpha = rank * own.adapter.lora_alpha / own.adapter.r
        changed |= {"adapter.r": rank, "adapter.lora_alpha": int(alpha) if alpha == int(alpha) else alpha}
        loaded[label] = load_as(DreamBooth, recipe, overrides, changed, SHORT)
    _quiet()
    with screen():
        results = [train(one) for one in loaded.values()]
        return compare_subjects(
            [result.folder.path for result in results],
            page,
            labels=list(loaded),
            prompts=own.comparison.prompts,
            num_images=own.comparison.num_images,
            steps=own.validation.steps,
            guidance_scale=own.validation.guidance_scale,
            seed=own.validation.seed,
            clip=own.comparison.clip,
            dino=own.comparison.dino,
        )


def comparison_summary(comparison: Comparison, near: Callable[[Path], str]) -> str:
    """What a comparison comes to.

    Args:
        comparison: What was found.
        near: A path as one would type it.
    """
    lines = []
    for subject in comparison.subjects:
        lines += ["", subject.words]
        for column in subject.columns:
            scores = "   ".join(f"{name} {value:.3f}" for name, value in column.scores.items())
            lines.append(f"  {column.label:24} {scores}".rstrip())
    lines += [f"not measured: {name}, {reason}" for name, reason in comparison.missing.items()]
    return "\n".join([*lines, "", f"page   {near(comparison.page)}"])


def check_recipe_model(recipe: DreamBooth) -> dict[str, int]:
    """Numbers a recipe trains in the denoiser, by part, counted without its weights.

    Raises:
        RecipeError: The package has no configuration of the model, or the adapter does not fit it.
    """
    skeleton = denoiser_skeleton(recipe.model.name)
    check_target_modules(recipe.adapter.target_modules, skeleton)
    config = adapter_config(recipe, None, recipe.training.steps)
    assert config is not None  # every method of this kind of recipe has one
    adapted = get_peft_model(skeleton, config, low_cpu_mem_usage=True)
    parts: dict[str, int] = {}
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            part = "Δσ" if "lora_dash" in name else "LoRA"
            parts[part] = parts.get(part, 0) + parameter.numel()
    return parts


def denoiser_skeleton(model: str) -> Any:
    """The denoiser of a shipped recipe's model, on the meta device, from the configuration in the package.

    Raises:
        RecipeError: There is none.
    """
    content = packaged_config(model, denoiser=True)
    with torch.device("meta"):
        return getattr(diffusers, content["class"]).from_config(content["config"])
