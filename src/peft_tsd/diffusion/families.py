"""The families of pipelines that can be taught a subject, and all in which they differ.

A family is known by the pipeline class that a model's model_index.json names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import RecipeError

Embeddings = dict[str, Tensor]
"""What the text encoders say of some prompts, by the denoiser's name for it; the first axis is the prompt's."""


class PipelineFamily(NamedTuple):
    """One family."""

    name: str
    pipeline: str
    """The class in diffusers."""
    denoiser: Literal["unet", "transformer"]
    text_encoders: tuple[str, ...]
    """Those that can carry an adapter."""
    flow: bool
    """Trained by rectified flow rather than by denoising diffusion."""
    encode: Callable[[Any, Sequence[str], torch.device], Embeddings]
    """Called with pipeline, prompts and device."""
    denoise: Callable[[Any, Tensor, Tensor, Embeddings, Tensor], Tensor]
    """Called with denoiser, noisy latents (n, c, h, w), timesteps (n,), embeddings and time ids (n, 6)."""


def family_of(pipeline: str, given: str) -> PipelineFamily:
    """The family of a pipeline class.

    Raises:
        RecipeError: None has it; `given` is what the user named.
    """
    for family in FAMILIES:
        if family.pipeline == pipeline:
            return family
    known = ", ".join(f"{family.pipeline} ({family.name})" for family in FAMILIES)
    raise RecipeError(f"model.name={given!r} is a {pipeline}, which cannot be trained here; known: {known}")


def _encode_sd15(pipe: Any, prompts: Sequence[str], device: torch.device) -> Embeddings:
    embeddings, _ = pipe.encode_prompt(list(prompts), device, 1, False)
    return {"encoder_hidden_states": embeddings}


def _denoise_sd15(
    denoiser: Any, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, time_ids: Tensor
) -> Tensor:
    predicted: Tensor = denoiser(latents, timesteps, **embeddings, return_dict=False)[0]
    return predicted


def _encode_sdxl(pipe: Any, prompts: Sequence[str], device: torch.device) -> Embeddings:
    embeddings, _, pooled, _ = pipe.encode_prompt(
        list(prompts), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeddings, "text_embeds": pooled}


def _denoise_sdxl(
    denoiser: Any, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, time_ids: Tensor
) -> Tensor:
    predicted: Tensor = denoiser(
        latents,
        timesteps,
        encoder_hidden_states=embeddings["encoder_hidden_states"],
        added_cond_kwargs={"text_embeds": embeddings["text_embeds"], "time_ids": time_ids},
        return_dict=False,
    )[0]
    return predicted


def _encode_sd3(pipe: Any, prompts: Sequence[str], device: torch.device) -> Embeddings:
    embeddings, _, pooled, _ = pipe.encode_prompt(
        list(prompts), None, None, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}


def _denoise_sd3(
    denoiser: Any, latents: Tensor, timesteps: Tensor, embeddings: Embeddings, time_ids: Tensor
) -> Tensor:
    predicted: Tensor = denoiser(hidden_states=latents, timestep=timesteps, **embeddings, return_dict=False)[0]
    return predicted


FAMILIES = (
    PipelineFamily("SD 1.5", "StableDiffusionPipeline", "unet", ("text_encoder",), False, _encode_sd15, _denoise_sd15),
    PipelineFamily(
        "SDXL",
        "StableDiffusionXLPipeline",
        "unet",
        ("text_encoder", "text_encoder_2"),
        False,
        _encode_sdxl,
        _denoise_sdxl,
    ),
    # Its third encoder, T5, stays as it is.
    PipelineFamily(
        "SD3",
        "StableDiffusion3Pipeline",
        "transformer",
        ("text_encoder", "text_encoder_2"),
        True,
        _encode_sd3,
        _denoise_sd3,
    ),
)
