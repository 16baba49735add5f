"""The objectives beside their formulas in float64."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from peft_tsd.diffusion.objective import Diffusion, RectifiedFlow, objective_of, weighted_loss
from peft_tsd.errors import RecipeError

TIMES = torch.tensor([0, 10, 500, 999])


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 2, 3, 3, generator=generator), torch.randn(4, 2, 3, 3, generator=generator)


def cumulative_alphas() -> np.ndarray:
    """ᾱ of Stable Diffusion's schedule: β evenly spaced in √β."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def scheduler(**options):
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_diffusion(batch, prediction, gamma):
    x, noise = batch
    objective = Diffusion(scheduler(prediction_type=prediction), gamma)
    abar = cumulative_alphas()[TIMES.numpy()]
    a, b = (torch.tensor(v).view(4, 1, 1, 1) for v in (np.sqrt(abar), np.sqrt(1 - abar)))
    noisy, times = objective.noised(x, noise, TIMES)
    torch.testing.assert_close(noisy.double(), a * x.double() + b * noise.double(), rtol=1e-4, atol=1e-5)
    assert torch.equal(times, TIMES)
    wanted = noise.double() if prediction == "epsilon" else a * noise.double() - b * x.double()
    torch.testing.assert_close(objective.target(x, noise, TIMES).double(), wanted, rtol=1e-4, atol=1e-5)
    snr = abar / (1 - abar)
    weights = np.ones(4)
    if gamma:
        weights = np.minimum(snr, gamma) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(objective.weights(TIMES).double(), torch.tensor(weights), rtol=1e-3, atol=1e-6)


def test_rectified_flow(batch):
    x, noise = batch
    drawing = FlowMatchEulerDiscreteScheduler(shift=3.0)
    drawing.set_timesteps(5)  # as after an image was drawn
    objective = RectifiedFlow(drawing)
    assert objective.num_timesteps == 1000
    noisy, times = objective.noised(x, noise, TIMES)
    even = (1000 - TIMES.double().numpy()) / 1000
    sigma = 3 * even / (1 + 2 * even)
    shaped = torch.tensor(sigma).view(4, 1, 1, 1)
    torch.testing.assert_close(
        noisy.double(), (1 - shaped) * x.double() + shaped * noise.double(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(times.double(), torch.tensor(1000 * sigma), rtol=1e-4, atol=1e-3)
    # The velocity of the straight line from the image to the noise.
    assert torch.equal(objective.target(x, noise, TIMES), noise - x)
    assert objective.weights(TIMES).tolist() == [1, 1, 1, 1]


def test_what_is_drawn():
    uniform = Diffusion(scheduler(), None).draw(20000, torch.Generator().manual_seed(0)).numpy()
    assert (uniform.min(), uniform.max()) == (0, 999)
    assert abs(uniform.mean() - 499.5) < 10
    flow = RectifiedFlow(FlowMatchEulerDiscreteScheduler()).draw(20000, torch.Generator().manual_seed(0)).numpy()
    # Logit-normal: half of them between the quartiles of a normal distribution, through the sigmoid.
    low, high = (1000 / (1 + math.exp(-z)) for z in (-0.6745, 0.6745))
    assert abs(np.mean((low <= flow) & (flow <= high)) - 0.5) < 0.02
    assert flow.max() <= 999


def test_rows_count_by_their_weights():
    predicted, target = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    weights = torch.tensor([0.5, 0.25, 2.0])
    slow = sum(float(w) * float(((p - t) ** 2).mean()) for w, p, t in zip(weights, predicted, target))
    assert float(weighted_loss(predicted, target, weights)) == pytest.approx(slow, rel=1e-5)


def test_what_cannot_be_trained_is_refused():
    with pytest.raises(RecipeError, match="prediction_type='sample'"):
        objective_of(DDPMScheduler(prediction_type="sample"), flow=False, min_snr_gamma=None)
    with pytest.raises(RecipeError, match="min_snr_gamma=5.0 has no meaning"):
        objective_of(FlowMatchEulerDiscreteScheduler(), flow=True, min_snr_gamma=5.0)
