"""A start can always learn: of A and B, one is not zero."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_tsd import TsdConfig
from peft_tsd.tuner.phase import adapted_layers
from support import tiny

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(1))


def layer_with(kind: str) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.Linear(16, 12)
    with torch.no_grad():
        if kind == "zero":
            layer.weight.zero_()
        elif kind == "of rank 2":
            layer.weight.copy_(torch.randn(12, 2) @ torch.randn(2, 16))
        elif kind == "padded":
            layer.weight[5:] = 0
        elif kind == "nearly zero":
            layer.weight.mul_(1e-12)
    return nn.Sequential(layer)


KINDS = ["zero", "of rank 2", "padded", "nearly zero"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("method", "reading"), [("lora-init", "svd"), ("lora-tsd", "svd"), ("lora-tsd", "orthonormal")]
)
def test_a_start_from_directions_learns_on_any_weight(kind, method, reading):
    config = TsdConfig(
        method=method,
        init_reading=reading,
        keep_prelaunch=False,
        r=6,
        prelaunch_steps=2,
        num_directions=6,
        target_modules=["0"],
    )
    model = get_peft_model(layer_with(kind), config)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-1)
    target = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))

    def step():
        (model(X) - target).square().mean().backward()

    from peft_tsd import advance

    for _ in range(2):
        step()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, optimizer)
    assert model.phase() == "dash"
    layer = adapted_layers(model, "default")["0"]
    # The start is the base itself, whatever its weight.
    assert torch.allclose(model(X), layer.base_layer(X), atol=1e-5)
    step()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    moved = torch.maximum(a.grad.norm(dim=1), b.grad.norm(dim=0))
    assert (moved > 1e-4).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["pissa", "olora", "pissa_niter_4"])
def test_a_start_of_pefts_learns_on_any_weight(kind, start):
    config = TsdConfig(method="lora-dash", init_lora_weights=start, r=6, prelaunch_steps=2, target_modules=["0"])
    model = get_peft_model(layer_with(kind), config)
    layer = adapted_layers(model, "default")["0"]
    assert torch.allclose(model(X), layer.base_layer(X), atol=1e-5)
    model(X).sub(1).square().mean().backward()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert (torch.maximum(a.grad.norm(dim=1), b.grad.norm(dim=0)) > 1e-6).all()


def test_zero_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    nn.init.zeros_(model[0].weight)
    config = TsdConfig(method="lora-init", init_reading="svd", r=3, prelaunch_steps=1, target_modules=["0"])
    model = get_peft_model(model, config)
    x = torch.randn(2, 4, 5, 5)
    tiny.train(model, 1, inputs=x)
    assert model.phase() == "dash"
    losses = tiny.train(model, 20, inputs=x)
    assert losses[-1] < losses[0]
