"""Everything about a DreamBooth run that can be refused before a weight is read: on shapes alone."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from ..errors import RecipeError, check_choice
from ..runs.disk import check_disk
from ..runs.folder import RunFolder
from ..runs.log import log
from ..runs.machine import environment
from ..runs.processes import check_shared_out, launched
from .adapters import Adapters, make_adapters
from .memory import Need, check_memory, free_memory, step_need
from .objective import Objective, objective_of
from .photos import Photos, read_photos
from .pipeline import PipelineSource, load_skeleton, locate
from .recipe import DreamBooth


class Job(NamedTuple):
    """A recipe that was found possible, and what was learned on the way."""

    recipe: DreamBooth
    source: PipelineSource
    photos: Photos
    prior: Photos | None
    """Those of `prior.folder`."""
    objective: Objective
    need: Need


def prepare(recipe: DreamBooth) -> Job:
    """Find out that a recipe can be carried out, without reading or fetching a weight."""
    folder = RunFolder(recipe.output)
    if not recipe.resume:
        folder.check_free()
    else:
        folder.check_resumable(recipe)
    for key, example in (("folder", "FOLDER"), ("prompt", "'a photo of sks backpack'")):
        if not getattr(recipe.data, key):
            raise RecipeError(f"data.{key} is missing; give data.{key}={example}")
    check_choice("optimizer.name", recipe.optimizer.name, [name.value for name in OptimizerNames])
    check_choice("optimizer.schedule", recipe.optimizer.schedule, [name.value for name in SchedulerType])
    if recipe.model.dtype == "float16" and not torch.cuda.is_available():
        raise RecipeError("model.dtype=float16 needs a GPU to train on; give model.dtype=bfloat16 or float32")
    _check_processes(recipe)
    photos = read_photos(str(recipe.data.folder), recipe.data.resolution, "data.folder")
    prior = None
    if recipe.prior.folder is not None:
        prior = read_photos(recipe.prior.folder, recipe.data.resolution, "prior.folder")
    source = locate(recipe.model)
    skeleton = load_skeleton(source)
    _check_resolution(recipe, source, skeleton)
    objective = objective_of(skeleton.scheduler, source.family.flow, recipe.training.min_snr_gamma)
    adapters = make_adapters(skeleton, source.family, recipe, low_cpu_mem_usage=True)
    trained = sum(p.numel() for model in adapters.values() for p in model.parameters() if p.requires_grad)
    check_disk(recipe, folder, trained, recipe.training.steps)
    need = _step_need(recipe, source, skeleton, adapters)
    free = free_memory()
    if free is not None:
        training = recipe.training
        check_memory(need, free, training.batch_size, recipe.data.resolution, training.gradient_checkpointing)
    return Job(recipe, source, photos, prior, objective, need)


def _check_processes(recipe: DreamBooth) -> None:
    size, rows = recipe.training.batch_size, _rows(recipe)
    beside = f" of the subject and as many of the class: these {rows}" if rows > size else ""
    check_shared_out(rows, f"training.batch_size={size}{beside}")
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise RecipeError(
                f"Accelerate is configured for {name}, and each process has a diffusion model whole; configure it for "
                "MULTI_GPU, or start with torchrun"
            )


def _rows(recipe: DreamBooth) -> int:
    """Of a batch."""
    return recipe.training.batch_size * (1 if recipe.prior.prompt is None else 2)


def _check_resolution(recipe: DreamBooth, source: PipelineSource, pipe: Any) -> None:
    patch = getattr(getattr(pipe, source.family.denoiser).config, "patch_size", None) or 1
    unit = pipe.vae_scale_factor * patch
    if recipe.data.resolution % unit:
        near = max(unit, round(recipe.data.resolution / unit) * unit)
        raise RecipeError(
            f"data.resolution={recipe.data.resolution} is no multiple of {unit}, as this model needs; give {near}"
        )


def _step_need(recipe: DreamBooth, source: PipelineSource, pipe: Any, adapters: Adapters) -> Need:
    """What a step takes, found by taking one on shapes; whatever does not fit together fails in it."""
    family, meta, dtype = source.family, torch.device("meta"), getattr(torch, recipe.model.dtype)
    side = recipe.data.resolution // pipe.vae_scale_factor
    rows = _rows(recipe) // launched()
    denoiser = getattr(pipe, family.denoiser)
    enable_checkpointing(recipe, denoiser.train())
    models = [denoiser, *(getattr(pipe, name) for name in adapters if name != family.denoiser)]
    for model in models:
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def forward() -> torch.Tensor:
        embeddings = family.encode(pipe, [str(recipe.data.prompt)], meta)
        return family.denoise(
            denoiser,
            torch.empty(rows, pipe.vae.config.latent_channels, side, side, device=meta, dtype=dtype),
            torch.empty(rows, device=meta, dtype=torch.long),
            {key: x.to(dtype).expand(rows, *x.shape[1:]) for key, x in embeddings.items()},
            torch.empty(rows, 6, device=meta, dtype=dtype),
        )

    try:
        return step_need(models, forward, dtype)
    except (RuntimeError, ValueError, TypeError) as error:
        raise RecipeError(
            f"the components of model.name={recipe.model.name!r} do not fit each other at "
            f"data.resolution={recipe.data.resolution}: {' '.join(str(error).split())[:300]}"
        ) from None


def enable_checkpointing(recipe: DreamBooth, denoiser: Any) -> None:
    if recipe.training.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()


def say_what_is_there(job: Job) -> None:
    log.info("%d photos: %s", len(job.photos.photos), ", ".join(photo.name for photo in job.photos.photos))
    for photos in filter(None, (job.photos, job.prior)):
        if photos.left_out:
            log.info("left out, no photos: %s", ", ".join(photos.left_out))
    smallest = min(min(photo.original_size) for photo in job.photos.photos)
    if smallest < job.recipe.data.resolution:
        log.info("the smallest photo is %d pixels wide or high and is enlarged", smallest)
    log.info("a step needs about %.2f GiB", job.need.total / 2**30)


def facts_of(job: Job) -> dict[str, Any]:
    """What a run is, for whoever reads its metrics later."""
    data: dict[str, Any] = {"photos": len(job.photos.photos), "sha256": job.photos.sha256}
    if job.prior is not None:
        data["prior"] = {"photos": len(job.prior.photos), "sha256": job.prior.sha256}
    return {
        "model": job.recipe.model.name,
        "pipeline": job.source.family.pipeline,
        "method": job.recipe.method,
        "seed": job.recipe.seed,
        "data": data,
        "left_out": job.photos.left_out,
        "needed_memory_bytes": job.need._asdict(),
        **environment("diffusers"),
    }
