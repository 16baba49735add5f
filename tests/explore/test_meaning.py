"""What the report says that its finding means: the own number, that of a random change, and what follows."""

from dataclasses import replace

import numpy as np
import pytest

from peft_tsd.explore import Exploration
from peft_tsd.explore.report import _facts, meaning
from support import explored


@pytest.fixture(scope="module")
def models():
    return [explored.exploration("runs/one")]


def strong(models, own: float, random: float, **changes):
    """An exploration whose TSDs carry `own` of the rates, those of its random change `random`."""

    class Fixed(Exploration):
        def random_change(self, seed=0):
            return replace(self, weights=tuple(map(carrying(random), self.weights)))

    def carrying(part):
        def of(weight):
            rates = np.full(weight.k, (1 - part) / (weight.k - 8))
            rates[weight.directions] = part / 8
            return replace(weight, rates=rates)

        return of

    one = models[0]
    weights = tuple(map(carrying(own), one.weights))
    return Fixed(one.base, one.tuned, one.kind, 8, one.eps, weights, {}, **changes)


@pytest.mark.parametrize(
    ("own", "random", "so"),
    [
        (0.61, 0.35, ": what lies beyond that is the task’s. In size"),
        (0.37, 0.35, ": that is what these weights show under any change, and says little of the task. In"),
        (0.02, 0.015, ": that is what these weights show under any change, and says little of the task. In"),
        (0.20, 0.35, ": fine-tuning spread its change more evenly than chance would. In size"),
    ],
)
def test_what_it_means(models, own, random, so):
    said = meaning(strong(models, own, random))
    start = (
        f"{100 * own:.2g}% of the relative change lies in 8 directions a weight, where a random change of the same "
    )
    assert said.startswith(start + f"size shows {100 * random:.2g}%")
    assert so in said


@pytest.mark.parametrize("method", ["lora-dash", "lora-tsd", "lora-init"])
def test_an_adapter_trained_along_its_directions_is_noted(models, method):
    said = meaning(strong(models, 0.99, 0.35, along=method, direction_source="weight"))
    assert said.startswith("99% of the relative change")
    assert f"{method} chose such directions early and was trained along them" in said
    assert "the task’s" not in said
    said = meaning(strong(models, 0.36, 0.35, along=method, direction_source="gradient"))
    assert "says little of the task" in said
    assert f"{method} was trained along directions of the gradient" in said


def test_what_the_best_directions_hold_is_said(models):
    one = models[0]
    known = [replace(weight, best_energy=0.25, gradient_energy=0.125) for weight in one.weights]
    assert "the best as many of ΔW itself 25%, those of the gradient that it was trained along 12%." in meaning(
        replace(one, weights=tuple(known))
    )
    assert meaning(replace(one, weights=())) == ""


def test_the_largest_rate_is_explained(models):
    one = models[0]
    weight = one.weights[0]
    sigma, rates = weight.sigma.copy(), weight.rates.copy()
    sigma[-1], rates[-1] = 1e-5, 11700.0
    strange = replace(one, weights=(replace(weight, sigma=sigma, rates=rates),))
    facts = _facts(strange, strange.random_change())
    [said] = [text for value, text in facts if value == "11,700"]
    assert said.startswith(f"times its σ is the largest change of a direction, in {weight.name}, where σ is 1e-05")
    assert said.endswith("a tiny σ makes any change look large")


def test_the_own_number_comes_first(models):
    one = models[0]
    own, random = (
        100 * np.mean([weight.choices()["tsd"].rate for weight in found.weights])
        for found in (one, one.random_change())
    )
    value, said = _facts(one, one.random_change())[0]
    assert value == f"{own:.0f}%"
    assert f"{random:.0f}%" in said
