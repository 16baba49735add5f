"""Measuring one weight against dense float64 numpy; overlap and agreement against sets counted by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_tsd.directions.change import change_norm
from peft_tsd.explore import Exploration, Trajectory, agreement, measure, overlap
from peft_tsd.explore.measure import place, random_directions
from peft_tsd.explore.trajectory import step_name, write_index
from support import reference

shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))


def matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense_reference(weight, delta, eps=1e-6):
    u, sigma, v = reference.svd(weight)
    coordinates = np.einsum("oi,od,di->i", u, delta.numpy(), v)
    return sigma, coordinates, reference.change_rates(weight, delta, eps)


@given(shapes, st.integers(0, 99), st.integers(1, 15))
def test_dense_change_is_the_brute_force(shape, seed, num):
    weight, delta = matrix(*shape, seed=seed), matrix(*shape, seed=seed + 1)
    found = measure("a.1.b", weight, delta, num_directions=num)
    sigma, coordinates, rates = dense_reference(weight, delta)
    np.testing.assert_allclose(found.sigma, sigma, rtol=1e-6)
    np.testing.assert_allclose(found.coordinates, coordinates, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.rates, rates, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.rates[found.directions], np.sort(rates)[::-1][:num], rtol=1e-4, atol=1e-6)
    assert found.change_norm == pytest.approx(float(delta.norm()))
    assert found.weight_norm == pytest.approx(float(weight.norm()))
    assert found.shape == shape
    assert found.core <= 1 + 1e-9


@given(shapes, st.integers(1, 5), st.integers(0, 99))
def test_low_rank_change_is_its_dense_form(shape, r, seed):
    weight, b, a = matrix(*shape, seed=seed), matrix(shape[0], r, seed=seed + 1), matrix(r, shape[1], seed=seed + 2)
    low_rank = measure("w", weight, (b, a, -1.7))
    dense = measure("w", weight, -1.7 * b @ a)
    np.testing.assert_allclose(low_rank.coordinates, dense.coordinates, rtol=1e-5, atol=1e-6)
    assert low_rank.change_norm == pytest.approx(dense.change_norm)


def test_norm_of_factors_that_nearly_cancel():
    b, a = matrix(20, 3), matrix(3, 30, seed=1)
    small = 1e-9 * matrix(3, 30, seed=2)
    stacked = (torch.cat([b, -b], 1), torch.cat([a + small, a]), 1.0)
    assert change_norm(stacked) == pytest.approx(float((b @ small).norm()), rel=1e-5)


def test_random_directions_are_the_weights_own():
    drawn = random_directions("model.layers.0.q_proj", 50, 8)
    assert drawn.tolist() == [47, 0, 2, 7, 31, 24, 45, 44]  # in this process as in any other
    assert drawn.tolist() != random_directions("model.layers.1.q_proj", 50, 8).tolist()
    assert sorted(random_directions("w", 3, 8).tolist()) == [0, 1, 2]


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (10, 10)])
@pytest.mark.parametrize("low_rank", [False, True])
def test_what_the_best_and_the_given_directions_hold(shape, low_rank):
    torch.manual_seed(0)
    weight = torch.randn(*shape)
    factors = (torch.randn(shape[0], 4), torch.randn(4, shape[1]), -0.5)
    dense = (factors[2] * factors[0] @ factors[1] if low_rank else torch.randn(*shape)).double()
    u, v = (torch.linalg.qr(torch.randn(size, 5)).Q for size in shape)  # of which as many count as of the others
    found = measure("w", weight, factors if low_rank else dense.float(), num_directions=3, gradient=(u, v))
    energies = torch.linalg.svdvals(dense).square()
    assert found.best_energy == pytest.approx(float(energies[:3].sum() / energies.sum()), rel=1e-6)
    along = sum(float(u[:, j].double() @ dense @ v[:, j].double()) ** 2 for j in range(3))
    assert found.gradient_energy == pytest.approx(along / float(energies.sum()), rel=1e-5)
    # No choice of core directions holds more than the best.
    assert found.best_energy >= max(share.energy for share in found.choices().values())
    assert measure("w", weight, dense.float()).gradient_energy is None


def test_place():
    assert place("model.layers.3.self_attn.q_proj") == (3, "self_attn.q_proj")
    assert place("down_blocks.0.attentions.1.to_q") == (0, "attentions.1.to_q")
    assert place("0.weight_in") == (0, "weight_in")
    assert place("classifier") == (None, "classifier")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_directions": 0}, "num_directions must be a positive integer; got 0"),
        ({"eps": 0.0}, "eps must be positive and finite; got 0.0"),
        ({"delta": torch.ones(3, 4)}, r"must have the weight's shape \(4, 3\); got \(3, 4\)"),
        ({"delta": torch.full((4, 3), torch.nan)}, "holds 12 NaN or Inf"),
    ],
)
def test_bad_input(change, message):
    given = {"weight": torch.ones(4, 3), "delta": torch.ones(4, 3), **change}
    with pytest.raises(ValueError, match=message):
        measure("w", given.pop("weight"), given.pop("delta"), **given)


def exploration(tuned: str, deltas: dict[str, torch.Tensor], num_directions: int = 2) -> Exploration:
    """Of diagonal weights, whose core directions are the axes."""
    weights = []
    for name, delta in deltas.items():
        k = len(delta)
        weights.append(measure(name, torch.arange(k, 0.0, -1).diag(), delta.diag(), num_directions=num_directions))
    return Exploration("base", tuned, "checkpoint", num_directions, 1e-6, tuple(weights), {})


def test_a_random_change_shows_what_dense_gaussian_changes_show():
    torch.manual_seed(0)
    weight = torch.linalg.qr(torch.randn(50, 30)).Q * torch.logspace(1, -1, 30)
    dense = [measure("w", weight, torch.randn(50, 30) * 0.1, num_directions=3) for _ in range(300)]
    one = Exploration("base", "tuned", "checkpoint", 3, 1e-6, (dense[0],), {})
    drawn = [one.random_change(seed).weights[0] for seed in range(300)]
    assert {weight.change_norm for weight in drawn} == {dense[0].change_norm}
    assert one.random_change(1).weights[0].rates.tolist() == drawn[1].rates.tolist()
    for quantity, tolerance in (
        (lambda w: w.gini, 0.02),
        (lambda w: w.choices()["tsd"].rate, 0.02),
        (lambda w: w.choices()["tsd"].energy, 0.001),
        (lambda w: w.positions.mean(), 0.02),
        (lambda w: w.core, 0.002),
    ):
        assert np.mean([quantity(w) for w in drawn]) == pytest.approx(
            np.mean([quantity(w) for w in dense]), abs=tolerance
        )


def test_overlap_counts_shared_directions():
    one = exploration("one", {"a": torch.tensor([0.0, 5, 5, 0]), "b": torch.ones(4)})
    two = exploration("two", {"a": torch.tensor([0.0, 0, 5, 5])})
    found = overlap([one, two])
    assert found.tuned == ("one", "two")
    assert found.weights == ("a",)
    assert found.shared.tolist() == [[[1.0, 0.5], [0.5, 1.0]]]
    assert found.chance.tolist() == [0.5]
    first, second = (set(one.random_change(seed).weights[0].directions.tolist()) for seed in (0, 1))
    assert found.random_change.tolist() == [len(first & second) / 2]


def test_overlap_refuses_what_cannot_be_compared():
    one = exploration("one", {"a": torch.ones(4)})
    with pytest.raises(ValueError, match="two or more explorations; got 1"):
        overlap([one])
    with pytest.raises(ValueError, match=r"different num_directions cannot be compared; got \[2, 3\]"):
        overlap([one, exploration("two", {"a": torch.ones(4)}, num_directions=3)])
    with pytest.raises(ValueError, match="a has 4 and 5 directions"):
        overlap([one, exploration("two", {"a": torch.ones(5)})])


def trajectory(folder, rows: dict[int, list[float]]) -> Trajectory:
    write_index(folder, {"a": (4, 4)}, {"a": float(torch.arange(1.0, 5).norm())}, 1e-6)
    for step, rates in rows.items():
        save_file({"a": torch.tensor(rates)}, folder / step_name(step))
    return Trajectory.read(folder)


def test_agreement_counts_hits(tmp_path):
    rates = {10: [0.0, 0, 0, 0], 20: [4.0, 3, 2, 1], 30: [1.0, 2, 3, 4], 1000000: [0.0, 0, 9, 8]}
    run = trajectory(tmp_path, rates)
    assert run.steps.tolist() == [10, 20, 30, 1000000]
    itself = agreement(run, predicted=3, true=2)
    assert itself.truth == "the end of the run (step 1000000)"
    assert itself.precision[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert itself.recall[:, 0].tolist() == pytest.approx([0, 1 / 2, 1, 1])
    assert itself.chance.tolist() == [0.5]
    tuned = exploration("tuned", {"a": torch.tensor([8.0, 6, 0, 0]), "other": torch.ones(3)})
    against = agreement(run, tuned, predicted=2, true=2)
    assert against.truth == "tuned"
    assert against.weights == ("a",)
    assert against.precision[:, 0].tolist() == [0, 1, 0, 0]
    (random,) = (weight for weight in tuned.random_change().weights if weight.name == "a")
    assert against.random_change.tolist() == [len({0, 1} & set(np.argsort(-random.rates)[:2])) / 2]
    assert itself.random_change is None


def test_agreement_refuses_another_base(tmp_path):
    run = trajectory(tmp_path, {10: [1.0, 2, 3, 4]})
    with pytest.raises(ValueError, match="no changed weight in common"):
        agreement(run, exploration("tuned", {"b": torch.ones(4)}))
    with pytest.raises(ValueError, match="not of one base model: its weight a has norm"):
        agreement(run, exploration("tuned", {"a": torch.ones(5)}))
    with pytest.raises(ValueError, match="predicted must be a positive integer"):
        agreement(run, predicted=0)
