"""What a step is said to need, beside what it takes."""

import pytest
import torch
from peft import get_peft_model

pytest.importorskip("diffusers")

from peft_tsd import TsdConfig
from peft_tsd.cli.main import main
from peft_tsd.diffusion.memory import Need, check_memory, step_need
from peft_tsd.errors import RecipeError
from peft_tsd.tuner.layer import TsdLayer
from support import tiny_diffusion

SIDE, BATCH = 32, 4


def forward(model, device):
    return model(
        torch.zeros(BATCH, 4, SIDE, SIDE, device=device),
        torch.zeros(BATCH, device=device, dtype=torch.long),
        encoder_hidden_states=torch.zeros(BATCH, 77, tiny_diffusion.TEXT_SIZE, device=device),
        return_dict=False,
    )[0]


def adapted(device):
    with torch.device(device):
        model = tiny_diffusion.unet(cross_attention_dim=tiny_diffusion.TEXT_SIZE, attention_head_dim=2)
    return get_peft_model(
        model.requires_grad_(False), TsdConfig(r=4, target_modules=["to_q", "to_v"], direction_source="weight")
    )


def held_after_forward(model) -> int:
    """Bytes that a real forward pass leaves allocated while its output is alive."""
    activity = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activity, profile_memory=True) as profile:
        output = forward(model, "cpu")
    held = sum(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    del output
    return held


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_counted_on_shapes_alone(checkpointing):
    real, shapes = adapted("cpu"), adapted("meta")
    for model in (real, shapes):
        model.train()
        if checkpointing:
            model.base_model.model.enable_gradient_checkpointing()
    counted = step_need([shapes], lambda: forward(shapes, "meta"), torch.float32)
    assert counted.activations == pytest.approx(held_after_forward(real), rel=0.2)
    frozen = sum(p.numel() for p in real.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in real.parameters() if p.requires_grad)
    assert counted.weights == 4 * frozen
    # max(r, s) directions and what pre-launch learned, and a few counts, in each layer.
    layers = [layer for layer in real.modules() if isinstance(layer, TsdLayer)]
    held = sum(4 * (8 + 4) * sum(layer.matrix_shape) for layer in layers)
    assert held < counted.trained - 16 * trained < held + 1000 * len(layers)


def test_too_little_memory_says_what_would_help():
    need = Need(weights=2**30, trained=0, activations=2**30)
    check_memory(need, 2**31, 1, 64, checkpointing=False)
    with pytest.raises(RecipeError, match=r"needs about 2.0 GiB .* and 1.0 are free; .*batch_size than 4.*than 64"):
        check_memory(need, 2**30, 4, 64, checkpointing=True)


@pytest.mark.long
def test_recipes_are_counted_without_weights(capsys):
    """SDXL's UNet: 140 attentions of four projections, as many numbers as the sum of their sides times the rank."""
    assert main(["recipes", "check", "dreambooth-sdxl"]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "layers=attention" in line]
    lora = 0
    for width, blocks in ((640, 2 * 2 + 2 * 3), (1280, 10 * 2 + 10 * 3 + 10)):
        lora += blocks * 8 * (4 * 2 * width + 2 * 2 * width + 2 * (width + 2048))
    layers = 8 * (10 + 60)
    assert line.split()[1:] == f"{lora + 8 * layers:,} = LoRA {lora:,} + Δσ {8 * layers:,}".split()
