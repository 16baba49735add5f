"""From the names of a base and of models fine-tuned from it to what their weights show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedModel

from ..directions.change import change_norm, check_matrix
from ..directions.spectrum import Spectrum
from ..errors import one_line
from ..files.adapters import CONFIG
from ..models.finding import Source, locate
from ..models.loading import load_config
from ..tuner.checking import check_config
from .changes import Changes, OfCheckpoint, open_adapter
from .errors import ExploreError, explore_errors
from .measure import check_settings, measure
from .results import Exploration, WeightChange
from .skeleton import Weight, build, select
from .weights import Checkpoint, fetch, open_checkpoint


@dataclass(frozen=True)
class Plan:
    """What is going to be measured. Everything given has been found and checked; no weight has been read.

    Attributes:
        base, tuned: As they were given.
        weights: The weights to measure, in the model's order.
        left_out: Other weights of the base, and why they are left out.
    """

    base: str
    tuned: tuple[str, ...]
    weights: tuple[Weight, ...]
    left_out: dict[str, str]
    checkpoint: Checkpoint
    changes: tuple[Changes, ...]


def explore(
    base: str,
    tuned: str | Sequence[str],
    *,
    num_directions: int = 8,
    eps: float = 1e-6,
    modules: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> list[Exploration]:
    """What fine-tuning changed in every weight of a model, along the weight's core directions.

        ```py
        >>> [found] = explore("HuggingFaceTB/SmolLM2-135M", "my-adapter")
        >>> found["model.layers.3.self_attn.q_proj"].directions
        ```

    Weights are read, compared and dropped one at a time: memory does not grow with the model.

    Args:
        base: The model before: a hub name, a local folder, a GGUF file, or either of the last two in an installed
            package (`package://NAME/PATH`).
        tuned: One or more models after: each a whole checkpoint, named like `base`, or an adapter of PEFT's by its
            folder (a run folder stands for its adapter) or hub name.
        num_directions: How many directions of each weight count as task-specific.
        eps: ε of the change rate, in the unit of σ.
        modules: Names of modules, or their endings, to measure; by default every Linear, Conv1D and Conv2d but the
            output head.
        device: Where the arithmetic is done, in float64.
        progress: Show a bar over the weights.

    Returns:
        One exploration for each of `tuned`, in their order.

    Raises:
        ExploreError: Something given is missing, damaged, of another architecture, or has no change to explore. All
            but damage inside a weight is found before the first weight is read.
    """
    return measure_all(
        prepare(base, tuned, num_directions=num_directions, eps=eps, modules=modules, device=device),
        num_directions=num_directions,
        eps=eps,
        device=device,
        progress=progress,
    )


@explore_errors()
def prepare(
    base: str,
    tuned: str | Sequence[str],
    *,
    num_directions: int = 8,
    eps: float = 1e-6,
    modules: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
) -> Plan:
    """Find and check everything that `explore` is going to read. Arguments and errors are `explore`'s."""
    names = (tuned,) if isinstance(tuned, str) else tuple(tuned)
    if not names:
        raise ExploreError("tuned is empty; give at least one fine-tuned model")
    try:
        check_settings(num_directions, eps)
        torch.empty(0, device=device)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise ExploreError(one_line(error)) from None
    source = locate(base, "BASE")
    if fetch(source, CONFIG, base) is not None and fetch(source, "config.json", base) is None:
        raise ExploreError(f"BASE={base!r} is an adapter; give the model it was trained on")
    config = _config(source, base)
    model = build(config, base)
    weights, left_out = select(model, modules)
    checkpoint = open_checkpoint(source, base, model)
    readable = tuple(weight for weight in weights if checkpoint.problem(weight) is None)
    if not readable:
        reasons = sorted({str(checkpoint.problem(weight)) for weight in weights})
        raise ExploreError(
            f"{base} has none of the weights of {type(model).__name__}: {_names(weights)}: "
            f"{reasons[0] if reasons else 'no Linear, Conv1D or Conv2d to measure'}"
        )
    left_out |= {weight.name: str(checkpoint.problem(weight)) for weight in weights if weight not in readable}
    changes = tuple(_open_tuned(name, config, model, readable) for name in names)
    return Plan(base, names, readable, left_out, checkpoint, changes)


def measure_all(
    plan: Plan, *, num_directions: int, eps: float, device: str | torch.device = "cpu", progress: bool = False
) -> list[Exploration]:
    """Read and measure everything planned. Arguments and errors are `explore`'s."""
    found: list[list[WeightChange]] = [[] for _ in plan.tuned]
    left_out = [dict(plan.left_out) for _ in plan.tuned]
    for weight in tqdm(plan.weights, desc="Exploring", unit="weight", disable=not progress):
        problems = [changes.problem(weight) for changes in plan.changes]
        for reasons, problem in zip(left_out, problems):
            if problem is not None:
                reasons[weight.name] = problem
        if all(problems):
            continue
        base = plan.checkpoint.read(weight).to(device)
        _check(base, f"{plan.base}: {weight.name}")
        spectrum: Spectrum | None = None
        for i, (tuned, changes, problem) in enumerate(zip(plan.tuned, plan.changes, problems)):
            if problem is not None:
                continue
            delta = changes.of(weight, base)
            for part in delta[:2] if isinstance(delta, tuple) else (delta,):
                _check(part, f"{tuned}: the change of {weight.name}")
            if change_norm(delta) == 0:
                left_out[i][weight.name] = "unchanged"
                continue
            # One factorization serves all models, and none is made where nothing changed.
            spectrum = spectrum or Spectrum(base)
            gradient = changes.along.gradient(weight) if changes.along else None
            found[i].append(
                measure(
                    weight.name,
                    base,
                    delta,
                    num_directions=num_directions,
                    eps=eps,
                    spectrum=spectrum,
                    gradient=gradient and (gradient[0].to(base.device), gradient[1].to(base.device)),
                )
            )
    return [
        Exploration(
            plan.base,
            tuned,
            changes.kind,
            num_directions,
            eps,
            tuple(weights),
            reasons,
            *((changes.along.method, changes.along.source) if changes.along else ()),
        )
        for tuned, changes, weights, reasons in zip(plan.tuned, plan.changes, found, left_out)
    ]


def _open_tuned(
    name: str, base_config: PretrainedConfig, model: PreTrainedModel, weights: Sequence[Weight]
) -> Changes:
    source = locate(name, "TUNED")
    inner = Path(source.name) / "adapter"
    if (inner / CONFIG).is_file():  # a run folder stands for its adapter
        source = Source(str(inner), source.options)
    changes: Changes
    adapter = None if "gguf_file" in source.options else fetch(source, CONFIG, name)
    if adapter is not None:
        changes = open_adapter(source, check_config(adapter.parent), name, model, weights)
    else:
        tuned_config = _config(source, name)
        if tuned_config.model_type != base_config.model_type:
            raise ExploreError(
                f"{name} is a {tuned_config.model_type} model and the base a {base_config.model_type} one; give "
                "models that were fine-tuned from the base"
            )
        changes = OfCheckpoint(open_checkpoint(source, name, model))
    problems = [changes.problem(weight) for weight in weights]
    if all(problems):
        raise ExploreError(f"{name} has no change of any of {_names(weights)}: the first is {problems[0]}")
    return changes


def _config(source: Source, name: str) -> PretrainedConfig:
    config = load_config(source)
    if "gguf_file" not in source.options and getattr(config, "quantization_config", None):
        raise ExploreError(f"{name} is stored quantized; give the model before it was quantized, or its GGUF file")
    return config


def _check(matrix: Tensor, name: str) -> None:
    try:
        check_matrix(matrix, name)
    except (ValueError, TypeError) as error:
        raise ExploreError(one_line(error)) from None


def _names(weights: Sequence[Weight]) -> str:
    shown = ", ".join(weight.name for weight in weights[:2])
    return shown + (f" and {len(weights) - 2} more" if len(weights) > 2 else "")
