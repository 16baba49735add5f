"""The card of a run: what was trained, on what, how it scored, and how to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import InputError, one_line
from ..files.adapters import CONFIG
from .recipe import Recipe

PIPELINES = {"classify": "text-classification", "glue": "text-classification"}
"""By family; the others write."""


def card_of(recipe: Recipe, metrics: dict[str, Any], name: str, folder: Path, native: str) -> ModelCard:
    """The card of a repository.

    Args:
        recipe: Of the run.
        metrics: Of the run, which is finished.
        name: Of the repository.
        folder: Its files; where there is a native adapter beside a plain LoRA, it lies in `native`.
    """
    base = _shown(recipe.model.name)
    title = name.rpartition("/")[2]
    whole = not (folder / CONFIG).is_file()
    pipeline = PIPELINES.get(recipe.task.family, "text-generation")
    data = ModelCardData(
        model_name=title,
        base_model=base if _is_hub_name(base) else None,
        library_name="transformers" if whole else "peft",
        pipeline_tag=pipeline,
        datasets=[recipe.data.name] if recipe.data.name and _is_hub_name(recipe.data.name) else None,
        tags=sorted({"peft-tsd", recipe.method, *(() if whole else ("lora",))}),
        eval_results=_results(recipe, metrics, pipeline),
    )
    parts = [
        f"# {title}",
        f"`{base}`, fine-tuned with **{recipe.method}** "
        "([task-specific directions](https://arxiv.org/abs/2409.01035)) by the package peft-tsd.",
        "## What was trained",
        _table(_trained(recipe, metrics)),
        "## How it scored",
        _table(_scored(metrics)),
        f"On {metrics['score']['questions']} rows that were not trained on."
        + (
            " They were chosen by: the adapter is that of the lowest held-out loss."
            if metrics.get("best_step")
            else ""
        ),
        "## How to load it",
        _loading(name, base, folder, native, whole),
        "## How it was made",
        "```sh\npip install 'peft-tsd[train]'\npeft-tsd train recipe.yaml output=run\n```",
        "with " + ", ".join(f"{package} {version}" for package, version in metrics["versions"].items()) + ".",
    ]
    return ModelCard(f"---\n{data}\n---\n\n" + "\n\n".join(parts) + "\n")


def _trained(recipe: Recipe, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    adapter, training, data = recipe.adapter, recipe.training, metrics["data"]
    rows = [("method", recipe.method)]
    if recipe.method != "full":
        targets = adapter.target_modules
        shown = targets if isinstance(targets, str) else ", ".join(targets or ["PEFT's choice"])
        rows += [("rank, alpha", f"{adapter.r}, {adapter.lora_alpha}"), ("modules", shown)]
    change = metrics["phase_change"]
    if change:
        rows.append(("directions", f"identified after step {change['step']}, in {change['layers']} layers"))
    rows += [
        ("parameters trained", f"{metrics['trainable_parameters']:,} of {metrics['total_parameters']:,}"),
        ("data", f"{_source(recipe)}, {data['train']:,} rows (sha256 {data['sha256'][:12]})"),
        ("task", recipe.task.family),
        ("steps", f"{metrics['steps']:,} of {training.batch_size * training.gradient_accumulation}"),
        ("optimizer", f"{recipe.optimizer.name}, {recipe.optimizer.learning_rate:g}, {recipe.optimizer.schedule}"),
        ("seed", str(recipe.seed)),
    ]
    return rows


def _scored(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    score = metrics["score"]
    before = f"{score['before']:.4f} before, " if "before" in score else ""
    rows = [(score["metric"], f"{before}{score['after']:.4f} after")]
    for task, found in score.get("tasks", {}).items():
        rows.append((task, ", ".join(f"{metric} {value:.4f}" for metric, value in found["after"].items())))
    if score.get("loss") is not None:
        rows.append(("held-out loss", f"{score['loss']:.4f}"))
    return rows


def _results(recipe: Recipe, metrics: dict[str, Any], pipeline: str) -> list[EvalResult]:
    source, score = _source(recipe), metrics["score"]
    return [
        EvalResult(
            task_type=pipeline,
            dataset_type=source.partition(" ")[0],
            dataset_name=source,
            metric_type=score["metric"],
            metric_value=round(score["after"], 4),
        )
    ]


def _loading(name: str, base: str, folder: Path, native: str, whole: bool) -> str:
    if whole:
        return f'```py\nfrom transformers import AutoModel\n\nmodel = AutoModel.from_pretrained("{name}")\n```'
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    plain = config["peft_type"] == "LORA"
    lines = ["```py", *([] if plain else ["import peft_tsd"]), "from peft import PeftModel", ""]
    lines += [f'model = PeftModel.from_pretrained(base, "{name}")  # base: {base}', "```"]
    text = "\n".join(lines)
    if plain:
        text = f"A plain LoRA of rank {config['r']}, which needs nothing but PEFT:\n\n{text}"
    else:
        text = f"An adapter of the package peft-tsd, which has to be imported:\n\n{text}"
    if (folder / native).is_dir():
        lines = ["```py", "import peft_tsd", "from peft import PeftModel", ""]
        lines += [f'model = PeftModel.from_pretrained(base, "{name}", subfolder="{native}")', "```"]
        text += f"\n\nThe native adapter, which trains on, lies in `{native}/`:\n\n" + "\n".join(lines)
    return text


def _source(recipe: Recipe) -> str:
    data = recipe.data
    if data.generator is not None:
        return f"reasoning-gym {data.generator}"
    if data.name is not None:
        return _shown(data.name)
    return f"{recipe.task.family} {', '.join(data.tasks or ())}".strip()


def _shown(name: str) -> str:
    """A name without where it lies on this machine."""
    return Path(name).name if Path(name).is_absolute() else name


def check_name(name: str) -> None:
    """Refuse what cannot be the name of a repository.

    Raises:
        InputError: With the hub's reason.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"{name!r} cannot be a repository's name: {one_line(error)}") from None


def _is_hub_name(name: str) -> bool:
    try:
        check_name(name)
    except InputError:
        return False
    return not name.endswith((".json", ".jsonl", ".csv", ".tsv", ".parquet", ".gguf")) and name.count("/") == 1


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(
        ["| | |", "| --- | --- |", *(f"| {key} | {value.replace('|', '&#124;')} |" for key, value in rows)]
    )
