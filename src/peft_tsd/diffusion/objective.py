"""What the denoiser is trained to predict, and how much each timestep counts.

Both objectives have the same four verbs. A timestep is given by its index, from 0, in the scheduler's own tables.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Generator, Tensor

from ..errors import RecipeError


class Diffusion:
    """Denoising diffusion: ε, or the velocity v, from x_t = √ᾱ_t·x + √(1 − ᾱ_t)·ε (Ho et al., arXiv 2006.11239).

    With `min_snr_gamma` a timestep counts min(SNR, γ)/SNR for ε and min(SNR, γ)/(SNR + 1) for v (Hang et al., arXiv
    2303.09556).

    Raises:
        RecipeError: The model predicts something else.
    """

    def __init__(self, scheduler: Any, min_snr_gamma: float | None) -> None:
        self._scheduler = DDPMScheduler.from_config(scheduler.config)
        self._gamma = min_snr_gamma
        self._predicts = self._scheduler.config.prediction_type
        if self._predicts not in ("epsilon", "v_prediction"):
            raise RecipeError(
                f"the model's scheduler has prediction_type={self._predicts!r}; only epsilon and v_prediction can be "
                "trained here"
            )
        self.num_timesteps: int = self._scheduler.config.num_train_timesteps

    def draw(self, num: int, generator: Generator) -> Tensor:
        """Random timesteps, shape (num,): uniform."""
        return torch.randint(self.num_timesteps, (num,), generator=generator)

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents with noise, and the timesteps as the denoiser knows them."""
        noisy: Tensor = self._scheduler.add_noise(latents, noise, timesteps)
        return noisy, timesteps

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What is to be predicted."""
        if self._predicts == "epsilon":
            return noise
        velocity: Tensor = self._scheduler.get_velocity(latents, noise, timesteps)
        return velocity

    def weights(self, timesteps: Tensor) -> Tensor:
        """How much each counts, shape as `timesteps`."""
        if self._gamma is None:
            return torch.ones(timesteps.shape, device=timesteps.device)
        snr: Tensor = compute_snr(self._scheduler, timesteps).float()
        return snr.clamp(max=self._gamma) / (snr if self._predicts == "epsilon" else snr + 1)


class RectifiedFlow:
    """Rectified flow: ε − x from x_σ = (1 − σ)·x + σ·ε, timesteps logit-normal (Esser et al., arXiv 2403.03206)."""

    def __init__(self, scheduler: Any) -> None:
        # A new one: drawing an image replaces the tables of the pipeline's own by its few steps.
        whole = type(scheduler).from_config(scheduler.config)
        self._sigmas: Tensor = whole.sigmas
        self._timesteps: Tensor = whole.timesteps
        self.num_timesteps = len(self._timesteps)

    def draw(self, num: int, generator: Generator) -> Tensor:
        """Random timesteps, shape (num,): logit-normal, the middle ones most."""
        where: Tensor = compute_density_for_timestep_sampling("logit_normal", num, 0.0, 1.0, generator=generator)
        return (where * self.num_timesteps).long()

    def noised(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """The latents with noise, and the timesteps as the denoiser knows them."""
        index = timesteps.cpu()
        sigma = self._sigmas[index].to(latents).view(-1, 1, 1, 1)
        return (1 - sigma) * latents + sigma * noise, self._timesteps[index].to(latents.device)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What is to be predicted."""
        return noise - latents

    def weights(self, timesteps: Tensor) -> Tensor:
        """How much each counts, shape as `timesteps`: all alike."""
        return torch.ones(timesteps.shape, device=timesteps.device)


Objective = Diffusion | RectifiedFlow


def objective_of(scheduler: Any, flow: bool, min_snr_gamma: float | None) -> Objective:
    """The objective of a model with this scheduler.

    Raises:
        RecipeError: The two do not go together.
    """
    if not flow:
        return Diffusion(scheduler, min_snr_gamma)
    if min_snr_gamma is not None:
        raise RecipeError(
            f"training.min_snr_gamma={min_snr_gamma!r} has no meaning for a rectified-flow model; remove it"
        )
    return RectifiedFlow(scheduler)


def weighted_loss(predicted: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """The sum over the batch of each row's weight, shape (n,), times its mean squared error, in float32."""
    errors = (predicted.float() - target.float()).square().flatten(1).mean(1)
    return (weights * errors).sum()
