"""What is to hold on a device, a GPU above all: plain functions, which `tests/gpu` calls, and `benchmarks/gpu.py`
where there is no pytest.

Each takes the device's name and raises AssertionError where something does not hold.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model

from peft_tsd import advance, export_lora, identify_from_gradients
from support import tiny

METHODS = ("lora-dash", "lora-init", "lora-tsd")
SOURCES = ("weight", "gradient")
STEPS = 6


def adapted(device: str, method: str, source: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """A tiny Llama with an adapter, which draws the same on every device."""
    torch.manual_seed(0)
    changes = {"direction_source": source, "prelaunch_steps": 0 if source == "gradient" else 3}
    model = get_peft_model(tiny.llama().to(dtype), tiny.config(method, **changes))
    return model.to(device).train()


def train(model: Any, device: str, step: Callable[[Any, Any, torch.Tensor], None], forward: Any = None) -> list[float]:
    """Over the transition, or from directions of the gradient; `step` takes a model, its optimizer and a loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if model.peft_config["default"].needs_gradients:
        identify_from_gradients(model, [tiny.batch(10 + i, device) for i in range(3)], optimizer)
    losses = []
    for i in range(STEPS):
        loss = (model if forward is None else forward)(**tiny.batch(i, device)).loss
        step(model, optimizer, loss)
        losses.append(loss.item())
    assert all(0 < loss < 10 for loss in losses), f"losses {losses}"
    assert all(len(one.indices) for one in model.base_model.directions().values()), "no directions"
    return losses


def plain_step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
    loss.backward()
    optimizer.step()
    advance(model, optimizer)
    optimizer.zero_grad()


@torch.no_grad()
def logits(model: Any, device: str) -> torch.Tensor:
    return model.eval()(tiny.tokens().to(device)).logits.float()


def lives(device: str, method: str, source: str, dtype: torch.dtype = torch.float32) -> None:
    """Trained, saved, loaded, merged, taken out again and exported; in float32 as on the CPU."""
    model = adapted(device, method, source, dtype)
    losses = train(model, device, plain_step)
    if dtype == torch.float32:
        expected = train(adapted("cpu", method, source), "cpu", plain_step)
        torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    near = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.1}
    trained = logits(model, device)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/saved")
        export_lora(model, Path(folder) / "exported")
        for name in ("saved", "exported"):
            loaded = PeftModel.from_pretrained(tiny.llama().to(device, dtype), f"{folder}/{name}")
            torch.testing.assert_close(logits(loaded, device), trained, **near, msg=lambda t, n=name: f"{n}: {t}")
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close(logits(model, device), trained, **near)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, device), trained, **near)


def autocast(device: str, method: str, source: str) -> None:
    """bfloat16 by autocast, the weights in float32."""

    def forward(**given: Any) -> Any:
        with torch.autocast(device, torch.bfloat16):
            return model(**given)

    model = adapted(device, method, source)
    train(model, device, plain_step, forward)


def scaled(device: str, method: str, source: str) -> None:
    """float16 by autocast with a GradScaler, whose first step overflows and is not counted."""
    scaler = torch.amp.GradScaler(device, init_scale=2.0**60)
    model = adapted(device, method, source)
    left_out = []

    def forward(**given: Any) -> Any:
        with torch.autocast(device, torch.float16):
            return model(**given)

    def step(model: Any, optimizer: Any, loss: torch.Tensor) -> None:
        before = scaler.get_scale()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        left_out.append(scaler.get_scale() < before)
        if left_out[-1]:
            scaler.update(2.0**10)
        advance(model, optimizer)
        optimizer.zero_grad()

    train(model, device, step, forward)
    assert left_out[0], "no step overflowed"
    taken = {int(b) for name, b in model.named_buffers() if name.endswith(".step")}
    assert taken == {STEPS - sum(left_out)}, f"{taken} steps counted, {sum(left_out)} of {STEPS} left out"


def compiled(device: str, method: str, source: str) -> None:
    """One graph over the transition, with the losses of what is not compiled."""
    model = adapted(device, method, source)
    # Generating code for a CPU takes minutes.
    backend = "aot_eager" if device == "cpu" else "inductor"
    forward = torch.compile(model, backend=backend, fullgraph=source == "weight")
    losses = train(model, device, plain_step, forward)
    expected = train(adapted(device, method, source), device, plain_step)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-3, atol=1e-3)


def four_bit(device: str, method: str, source: str) -> None:
    """Weights of bitsandbytes in four bits, left as they are."""
    import bitsandbytes as bnb

    torch.manual_seed(0)
    base = tiny.llama()
    for name in tiny.LLAMA_TARGETS:
        for parent in list(base.modules()):
            linear = getattr(parent, name, None)
            if type(linear) is torch.nn.Linear:
                quantized = bnb.nn.Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
                )
                quantized.load_state_dict(linear.state_dict())
                setattr(parent, name, quantized)
    changes = {"direction_source": source, "prelaunch_steps": 0 if source == "gradient" else 3}
    model = get_peft_model(base.to(device), tiny.config(method, **changes)).train()
    train(model, device, plain_step)


CHECKS: dict[str, Callable[[str, str, str], None]] = {
    "float32": lives,
    "bfloat16": partial(lives, dtype=torch.bfloat16),
    "autocast": autocast,
    "GradScaler": scaled,
    "torch.compile": compiled,
    "4 bit": four_bit,
}
"""Given a device, a method and where its directions come from."""

NEEDS = {"4 bit": "bitsandbytes"}
"""The package that a check is left out without."""
