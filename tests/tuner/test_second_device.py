"""Everything an adapter goes through, on a device that is not the CPU, comes to what it comes to on the CPU.

The device is `support.second_device`: its values are on the CPU, and operations that mix the two are refused. So this
shows that each tensor is where it belongs. It cannot show what only a real accelerator can: its kernels and their
rounding, streams and errors that come late, which dtypes it supports, memory, and NCCL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_tsd import DashConfig, export_lora, identify_from_gradients
from peft_tsd.models import packed
from peft_tsd.tuner import stacked
from support import directions, peft_methods, tiny
from support.on_device import METHODS
from support.second_device import There, here, second_device


@contextmanager
def there(in_one_step: bool) -> Iterator[torch.device]:
    """The device. Weights on it are as plain as those on the CPU: they are not quantized, and may take the step in
    which the adapter is added to the base's output."""
    with (
        second_device() as device,
        patch.object(packed, "PLAIN", (*packed.PLAIN, There)),
        patch.object(stacked, "Tensor", There if in_one_step else torch.Tensor),
    ):
        yield device


def base(device):
    model = tiny.llama()
    model.model.layers = model.model.layers[:1]
    model.config.use_cache = False  # transformers' cache asks which device is free
    return model.to(device)


def logits(model, device) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens().to(device)).logits


def lived(config, device, folder) -> dict[str, Any]:
    """What an adapter comes to on a device: trained, saved, loaded, merged, taken out again and exported."""
    torch.manual_seed(0)
    model = peft_methods.quiet(get_peft_model, base(device), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    settings = config if isinstance(config, DashConfig) else model.peft_config["default"]
    first = []
    if settings.needs_gradients:
        first = tiny.train(model, settings.prelaunch_steps, optimizer=optimizer)
        identify_from_gradients(model, [tiny.batch(10 + i, device) for i in range(3)], optimizer)
    losses = [*first, *tiny.train(model, 6 - len(first), optimizer=optimizer, start=len(first))]
    assert all(p.device == device for p in (*model.parameters(), *model.buffers()))
    model.eval()
    found = {"losses": torch.tensor(losses), "trained": logits(model, device)}
    model.save_pretrained(str(folder / "saved"))
    loaded = PeftModel.from_pretrained(base(device), str(folder / "saved"), is_trainable=True).eval()
    assert all(p.device == device for p in (*loaded.parameters(), *loaded.buffers()))
    found["loaded"] = logits(loaded, device)
    found["going on"] = torch.tensor(tiny.train(loaded, 2, start=6))
    model.merge_adapter(safe_merge=True)
    found["merged"] = logits(model, device)
    model.unmerge_adapter()
    found["unmerged"] = logits(model, device)
    export_lora(model, folder / "exact")
    export_lora(model, folder / "smaller", rank=2)
    plain = PeftModel.from_pretrained(base(device), str(folder / "exact")).eval()
    found["exported"] = logits(plain, device)
    found["smaller"] = load_file(folder / "smaller" / "adapter_model.safetensors")
    found["directions"] = directions.of(model)
    return here(found)


def products(state: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Of a plain LoRA: a singular vector's sign is nobody's."""
    for name, a in sorted(state.items()):
        if "lora_A" in name:
            yield state[name.replace("lora_A", "lora_B")].double() @ a.double()


def assert_lives_alike(config, folder, *, in_one_step: bool = True) -> None:
    with there(in_one_step) as device:
        found = lived(config(), device, folder / "there")
    expected = lived(config(), torch.device("cpu"), folder / "here")
    directions.assert_same(found.pop("directions"), expected.pop("directions"))
    for one, other in zip(products(found.pop("smaller")), products(expected.pop("smaller"))):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
    for name in ("loaded", "merged", "unmerged", "exported"):
        torch.testing.assert_close(found[name], found["trained"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_directions_of_the_weight(method, tmp_path):
    assert_lives_alike(lambda: tiny.config(method), tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_directions_of_the_gradient_and_a_first_step(method, tmp_path):
    changes = {"direction_source": "gradient", "prelaunch_steps": 0, "first_step": True}
    assert_lives_alike(lambda: tiny.config(method, **changes), tmp_path)


def test_the_adapter_added_to_what_the_base_layer_gave(tmp_path):
    assert_lives_alike(lambda: tiny.config("lora-tsd"), tmp_path, in_one_step=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"prelaunch_steps": 0},
        {"prelaunch_steps": 2, "direction_source": "gradient"},
        {"prelaunch_steps": "auto", "prelaunch_min": 2, "prelaunch_max": 4},
        {"direction_budget": "global", "num_directions": 3, "dash_unit": "sigma"},
        {"dash_unit": "layer", "keep_prelaunch": False},
        {"selection": "random", "direction_source": "gradient", "prelaunch_steps": 0},
        {"init_reading": "orthonormal"},
    ],
    ids=str,
)
@pytest.mark.long
def test_settings(changes, tmp_path):
    assert_lives_alike(lambda: tiny.config("lora-tsd", **changes), tmp_path)


@pytest.mark.parametrize(
    ("inner", "source"),
    [
        (lambda: LoHaConfig(r=3, alpha=5, target_modules=tiny.LLAMA_TARGETS), "weight"),
        (lambda: LoraConfig(r=3, use_dora=True, target_modules=tiny.LLAMA_TARGETS), "gradient"),
    ],
    ids=["loha", "dora"],
)
def test_directions_beside_other_methods(inner, source, tmp_path):
    changes = {"direction_source": source, "prelaunch_steps": 3 if source == "weight" else 0}
    assert_lives_alike(lambda: DashConfig(peft=inner(), num_directions=5, dash_lr_ratio=20.0, **changes), tmp_path)


def test_dash_from_a_start_that_is_taken_out(tmp_path):
    assert_lives_alike(lambda: tiny.config("lora-dash", init_lora_weights="pissa"), tmp_path)


def test_the_device_refuses_what_an_accelerator_refuses():
    with second_device() as device:
        there, here_ = torch.ones(2, device=device), torch.ones(2)
        for mixed in (
            lambda: there + here_,
            lambda: torch.cat([there, here_]),
            lambda: here_.add_(there),
            lambda: here_[there.long()],
            lambda: torch.rand(2, device=device, generator=torch.Generator()),
        ):
            with pytest.raises(RuntimeError, match="same device|for generator"):
                mixed()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
        assert (there + torch.tensor(1.0)).tolist() == there[torch.tensor([0, 1])].mul(2).tolist() == [2.0, 2.0]
