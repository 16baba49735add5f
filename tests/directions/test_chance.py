"""A global budget: where the directions go, and that what no layer got has no effect."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from peft_tsd import export_lora
from peft_tsd.directions.chance import chance_rate, over_chance, spread
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny

lists = st.lists(st.floats(0, 100), min_size=1, max_size=9).map(lambda found: sorted(found, reverse=True))


@given(st.lists(lists, min_size=1, max_size=6), st.integers(0, 40))
def test_a_budget_goes_to_the_highest_scores_of_all_layers(layers, total):
    scores = {str(i): torch.tensor(found, dtype=torch.float64) for i, found in enumerate(layers)}
    counts = spread(scores, total)
    pooled = sorted((value for found in layers for value in found), reverse=True)
    assert sum(counts.values()) == min(total, len(pooled))
    taken = sorted((value for name, found in scores.items() for value in found[: counts[name]].tolist()), reverse=True)
    assert taken == pooled[: len(taken)]


@given(st.integers(10, 60), st.floats(0, 3), st.floats(1e-3, 10), st.integers(1, 4), st.integers(0, 2**31))
def test_the_chance_rate_is_exceeded_by_so_many_directions_of_random_changes(k, decades, entry, num, seed):
    sigma = torch.logspace(1, 1 - decades, k, dtype=torch.float64)
    chance = chance_rate(sigma, entry, num, 1e-6)
    draws = entry * torch.randn(4000, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    exceeded = (draws.abs() / (sigma + 1e-6) > chance).sum(1).double().mean()
    assert exceeded == pytest.approx(num, rel=0.15)
    assert chance_rate(sigma, 3 * entry, num, 1e-6) == pytest.approx(3 * chance)


def test_nothing_changed_stands_out_nowhere():
    chance = chance_rate(torch.ones(4, dtype=torch.float64), 0.0, 2, 1e-6)
    assert over_chance(torch.zeros(4), chance).tolist() == [0] * 4


def test_random_changes_give_every_layer_about_the_same():
    """Whatever its spectrum: raw rates would give all to the layers of tiny singular values."""
    generator = torch.Generator().manual_seed(0)
    num, k, layers = 8, 200, 40
    sigmas = [torch.logspace(1, 1 - i % 4, k, dtype=torch.float64) for i in range(layers)]
    scores, raw = {}, {}
    for i, sigma in enumerate(sigmas):
        entry = 0.1 + i
        rates = entry * torch.randn(k, dtype=torch.float64, generator=generator).abs() / (sigma + 1e-6)
        raw[str(i)] = rates.sort(descending=True).values[: 4 * num]
        scores[str(i)] = over_chance(raw[str(i)], chance_rate(sigma, entry, num, 1e-6))
    by_spectrum = [
        [sum(n for name, n in spread(found, num * layers).items() if int(name) % 4 == kind) for kind in range(4)]
        for found in (scores, raw)
    ]
    assert all(60 <= count <= 100 for count in by_spectrum[0])  # 80 each on average
    assert max(by_spectrum[1]) > 200


def adapted(method: str = "lora-dash", **changes):
    model = get_peft_model(tiny.llama(), tiny.config(method, direction_budget="global", num_directions=3, **changes))
    with torch.no_grad():
        # A task that moved one direction of one layer beyond all chance.
        layer = adapted_layers(model, "default")["model.layers.1.mlp.down_proj"]
        u, sigma, v = reference.svd(layer.weight_matrix())
        for i in range(4):
            layer.lora_A["default"].weight[i] = torch.from_numpy(v[:, i]) * 5
            layer.lora_B["default"].weight[:, i] = torch.from_numpy(u[:, i]) * sigma[i] * 50
    return model


def test_the_layer_that_stands_out_gets_more_and_the_total_is_kept():
    model = adapted()
    slots = {name: len(layer.lora_dash["default"].weight) for name, layer in adapted_layers(model, "default").items()}
    assert set(slots.values()) == {12}
    tiny.train(model, 6, lr=1e-3)
    found = model.directions()
    counts = {name: len(one.delta_sigma) for name, one in found.items()}
    assert sum(counts.values()) == 3 * 6
    assert counts["model.layers.1.mlp.down_proj"] >= 4
    assert {0, 1, 2, 3} <= set(found["model.layers.1.mlp.down_proj"].indices.tolist())
    for name, one in found.items():
        assert len(one.indices) == len(one.rates) == one.u.shape[1] == one.v.shape[1] == counts[name]
        theta = adapted_layers(model, "default")[name].lora_dash["default"].weight
        assert theta[: counts[name]].all()
        assert not theta[counts[name] :].any()
    assert str(found).count("model.layers.") == 6


def test_the_cap_holds():
    model = adapted(max_directions=4)
    tiny.train(model, 3, lr=1e-3)
    counts = [len(one.delta_sigma) for one in model.directions().values()]
    assert max(counts) == 4
    assert sum(counts) == 18


def test_a_layer_can_get_none(tmp_path):
    model = adapted(max_directions=18)
    for layer in list(adapted_layers(model, "default").values())[:2]:
        # Zero, and without a gradient: nothing of these stands out.
        layer.lora_A["default"].weight.data.zero_()
    tiny.train(model, 2, lr=0.0)
    first = adapted_layers(model, "default")["model.layers.0.self_attn.q_proj"]
    first.lora_A["default"].weight.data.zero_()
    tiny.train(model, 3)
    assert model.phase() == "dash"
    counts = [len(one.delta_sigma) for one in model.directions().values()]
    assert counts[0] == 0
    assert sum(counts) == 18
    assert "- " in str(model.directions())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert loaded.phase() == "dash"
    assert str(loaded.directions()) == str(model.directions())


@pytest.mark.parametrize("method", ["lora-dash", "lora-tsd"])
def test_the_export_drops_what_no_layer_got(method, tmp_path):
    model = adapted(method)
    tiny.train(model, 6)
    model.eval()
    report = export_lora(model, tmp_path / "lora")
    lora = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    ids = tiny.tokens()
    with torch.no_grad():
        expected, got = model(ids).logits, lora(ids).logits
    assert ((got - expected).norm() / expected.norm()).item() <= 1e-5
    start = kept = 4 if method == "lora-tsd" else 0  # the start lies along the first directions
    for name, one in model.directions().items():
        assert report.ranks[name] == 4 + max(len(one.delta_sigma), start) + kept
