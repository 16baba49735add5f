"""LoRA-TSD's start lies along its directions: ΔW is of rank r + max(r, s), and the start is taken out to the bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn

from peft_tsd import export_lora
from peft_tsd.tuner.held import join, joined_coefficients
from peft_tsd.tuner.phase import adapted_layers
from support import reference, tiny
from support.layers import LAYERS, One


@given(
    st.integers(0, 10**6),
    st.integers(1, 5),
    st.integers(0, 5),
    st.integers(0, 5),
    st.sets(st.integers(0, 4)),
    st.floats(0.1, 4),
)
def test_joined_columns_are_the_dense_sum_of_both(seed, r, slots, used, empty, scaling):
    """Directions and a start along them, each of them possibly with fewer columns than it might have."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u, v = (torch.linalg.qr(random(size, 6)).Q for size in (8, 7))
    root = torch.tensor([0.0 if j in empty else float(random(1).abs() + 0.1) for j in range(r)]).double()
    b0, a0 = u[:, :r] * root, torch.where(root > 0, root, 1)[:, None] * v[:, :r].mT
    along = (torch.arange(slots) < used).double()
    dash_u, dash_v, delta_sigma = u[:, :slots] * along, v[:, :slots].mT * along[:, None], random(slots)
    expected = dash_u @ torch.diag(delta_sigma) @ dash_v - scaling * b0 @ a0
    joined = join(dash_u, dash_v, a0, b0)
    assert joined.u.shape == (8, max(r, slots))
    c = joined_coefficients(delta_sigma, joined.to_unit, joined.taken, scaling)
    torch.testing.assert_close(joined.u @ torch.diag(c) @ joined.v, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("r", "num_directions"), [(2, 5), (4, 4), (6, 3)])
@pytest.mark.parametrize("kind", ["tall", "conv1d", "conv2d"])
def test_the_change_is_that_of_the_definition_at_the_exact_rank(kind, r, num_directions, tmp_path):
    """Against the SVD of W and dense products: s·B·A + Σ_j (Δσ_j − [j < r]·σ_j) u_j v_jᵀ."""
    torch.manual_seed(0)
    layer, shape = LAYERS[kind]()
    settings = {"r": r, "num_directions": num_directions, "target_modules": ["layer"], "keep_prelaunch": False}
    model = get_peft_model(One(layer).double(), tiny.config(**settings))
    x = torch.randn(shape, dtype=torch.float64)
    tiny.train(model, 6, inputs=x)
    layer = adapted_layers(model, "default")["layer"]
    found = model.directions()["layer"]
    assert len(found.delta_sigma) == found.u.shape[1] == found.v.shape[1] == num_directions
    u, sigma, v = map(torch.from_numpy, reference.svd(layer.weight_matrix()))
    a, b = (f["default"].weight.detach().flatten(1) for f in (layer.lora_A, layer.lora_B))
    expected = layer.scaling["default"] * b @ a
    for j, i in enumerate(found.indices.tolist()):
        moved = float(found.delta_sigma[j]) if j < num_directions else 0.0
        expected = expected + (moved - (j < r) * sigma[i]) * torch.outer(u[:, i], v[:, i])
    factors = layer.factors("default")
    assert len(factors.down()) == r + max(r, num_directions)
    # The start was written in float32.
    torch.testing.assert_close((factors.up() @ factors.down()).detach(), expected, rtol=1e-5, atol=1e-5)
    report = export_lora(model, tmp_path / "lora")
    assert report.ranks == {"layer": r + max(r, num_directions)}


def test_at_rank_8_with_8_directions_an_export_fits_servers_of_rank_16(tmp_path):
    model = get_peft_model(tiny.llama(), tiny.config(r=8, num_directions=8, keep_prelaunch=False))
    tiny.train(model, 5)
    out = model.eval()(tiny.tokens()).logits
    report = export_lora(model, tmp_path / "lora")
    assert report.rank == 16
    assert set(report.ranks.values()) == {16}
    plain = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    torch.testing.assert_close(plain(tiny.tokens()).logits, out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("changes", [{}, {"use_rslora": True}, {"lora_alpha": 7}])
def test_the_start_is_taken_out_to_the_last_bit_in_every_precision(dtype, changes):
    """Each row and column that is taken out has the rounding of that of A and B: the layer starts at W."""
    torch.manual_seed(0)
    base = One(nn.Linear(24, 20)).to(dtype)
    config = tiny.config(target_modules=["layer"], keep_prelaunch=False, **changes)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    # Not Adam, whose usual ε float16 cannot hold.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tiny.train(model, 3, inputs=torch.randn(5, 24).to(dtype), optimizer=optimizer)
    assert model.phase() == "dash"
    layer = adapted_layers(model, "default")["layer"]
    factors = layer.factors("default")
    r, down, up = len(factors.a), factors.down().double(), factors.up().double()
    assert down.norm() > 1
    assert torch.equal(up[:, :r] @ down[:r], -(up[:, r : 2 * r] @ down[r : 2 * r]))
    assert not down[2 * r :].any()


def test_scalars_that_a_budget_leaves_out_stay_zero_beside_a_start():
    """Of a global budget a layer may get fewer directions than r: its start is taken out, and no more is learned."""
    model = get_peft_model(tiny.llama(), tiny.config(direction_budget="global", num_directions=2, max_directions=7))
    tiny.train(model, 7)
    few = 0
    for name, layer in adapted_layers(model, "default").items():
        got = len(model.directions()[name].delta_sigma)
        theta = layer.scalars("default").weight
        assert theta[:got].all()
        assert not theta[got:].any()
        assert int(layer.fixed("default").taken.sum()) == 4
        few += got < 4
    assert few


def test_every_unit_is_that_of_the_direction(tmp_path):
    """Δσ along a column that is part of the start, too, in the unit and the strength that the settings say."""
    torch.manual_seed(0)
    model = get_peft_model(One(nn.Linear(9, 14)).double(), tiny.config(target_modules=["layer"], dash_unit="sigma"))
    x = torch.randn(4, 9, dtype=torch.float64)
    tiny.train(model, 3, inputs=x)
    layer = adapted_layers(model, "default")["layer"]
    before, found = layer.get_delta_weight("default"), model.directions()["layer"]
    with torch.no_grad():
        layer.scalars("default").weight.copy_(torch.arange(1.0, 6) / 10)
    moved = (layer.get_delta_weight("default") - before).detach()
    u, _, v = map(torch.from_numpy, reference.svd(layer.weight_matrix()))
    for j, i in enumerate(found.indices.tolist()):
        along = float(u[:, i] @ moved @ v[:, i])
        assert along == pytest.approx(20 * float(found.sigma[j]) * (j + 1) / 10, rel=1e-5)
