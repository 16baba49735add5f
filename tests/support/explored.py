"""Explorations of made-up models: spectra and changes drawn at random, with a few directions that stand out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from peft_tsd.explore import Agreement, Exploration, Overlap, WeightChange

KINDS = {
    "self_attn.q_proj": (48, 48),
    "self_attn.v_proj": (16, 48),
    "mlp.down_proj": (48, 128),
}


def weight(
    name: str, layer: int | None, module: str, shape: tuple[int, int], rng: np.random.Generator, num: int = 8
) -> WeightChange:
    """A weight whose spectrum decays and whose `num` TSDs lean towards the small singular values."""
    k = min(shape)
    sigma = np.sort(rng.uniform(0.8, 1.2, k) * 12 * np.exp(-3 * np.arange(k) / k))[::-1]
    rates = np.abs(rng.normal(0, 0.004, k)) / np.sqrt(sigma)
    count = min(num, k)
    likely = np.linspace(0.05, 1, k) ** 2
    chosen = rng.choice(k, count, replace=False, p=likely / likely.sum())
    rates[chosen] += rng.gamma(2, 0.03, count)
    coordinates = rates * sigma * rng.choice([-1, 1], k)
    return WeightChange(
        name=name,
        layer=layer,
        module=module,
        shape=shape,
        sigma=sigma,
        coordinates=coordinates,
        rates=rates,
        directions=np.argsort(-rates, kind="stable")[:count],
        random=np.sort(rng.choice(k, count, replace=False)),
        change_norm=float(np.sqrt(np.square(coordinates).sum()) * rng.uniform(3, 6)),
        weight_norm=float(np.sqrt(np.square(sigma).sum())),
    )


def exploration(
    tuned: str = "tuned",
    seed: int = 0,
    num_layers: int = 4,
    shapes: Mapping[str, tuple[int, int]] = KINDS,
    kind: str = "LORA",
    num: int = 8,
) -> Exploration:
    """A model of `num_layers` layers with a weight of each kind, and an output head outside of any layer."""
    rng = np.random.default_rng(seed)
    weights = [
        weight(f"model.layers.{layer}.{module}", layer, module, shape, rng, num)
        for layer in range(num_layers)
        for module, shape in shapes.items()
    ]
    weights.append(weight("lm_head", None, "lm_head", (64, 48), rng, num))
    left_out = {f"model.layers.{layer}.input_layernorm": "not a matrix" for layer in range(num_layers)}
    left_out["model.embed_tokens"] = "unchanged"
    return Exploration("base", tuned, kind, num, 1e-6, tuple(weights), left_out)


def overlap(explorations: Sequence[Exploration]) -> Overlap:
    """The shared TSDs of models that have the same weights."""
    sets = [[set(weight.directions.tolist()) for weight in one.weights] for one in explorations]
    weights = explorations[0].weights
    shared = [[[len(a[w] & b[w]) / len(a[w]) for b in sets] for a in sets] for w in range(len(weights))]
    return Overlap(
        tuned=tuple(one.tuned for one in explorations),
        weights=tuple(weight.name for weight in weights),
        shared=np.array(shared),
        chance=np.array([len(weight.directions) / weight.k for weight in weights]),
        random_change=np.array([min(1.0, 2 * len(weight.directions) / weight.k) for weight in weights]),
    )


def agreement(one: Exploration, predicted: int = 16, seed: int = 0, num_steps: int = 10) -> Agreement:
    """Precision and recall that rise over training, for every weight of `one`."""
    rng = np.random.default_rng(seed)
    steps = 100 * np.arange(1, num_steps + 1)
    rise = 0.8 * (1 - np.exp(-steps / 250))[:, None]
    shape = (num_steps, len(one.weights))
    return Agreement(
        truth="the fully fine-tuned model",
        predicted=predicted,
        true=one.num_directions,
        steps=steps,
        weights=tuple(weight.name for weight in one.weights),
        precision=np.clip(rise + rng.normal(0, 0.05, shape), 0, 1),
        recall=np.clip(rise + rng.normal(0.08, 0.05, shape), 0, 1),
        chance=np.array([min(1.0, one.num_directions / weight.k) for weight in one.weights]),
        random_change=np.array([min(1.0, 2 * one.num_directions / weight.k) for weight in one.weights]),
    )
