"""Does a step of teaching SDXL a subject cost more than in diffusers' own DreamBooth script with LoRA?

    python benchmarks/dreambooth.py                  # CPU: a small UNet of SDXL's make in float32
    python benchmarks/dreambooth.py --device cuda    # SDXL's whole UNet, random weights, bfloat16, 1024 px, batch 4

The peer is the loop of diffusers' train_dreambooth_lora_sdxl.py with its --cache_latents: PEFT's LoRA put on by
`unet.add_adapter`, Accelerate for precision, AdamW, clipped gradients. Ours is what `peft-tsd train` runs, of the same
rank, on the same latents and embeddings: plain LoRA, and LoRA-TSD in pre-launch and after its transition. All are
trained in one process around the weights of one UNet, one step each in turn, in another order each round. Reported:
the median over rounds of a step's time over the peer's in the same round, with its quartiles; and the peak of the
memory allocated during a step, over the peer's.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model

from peft_tsd import TsdConfig, __version__
from peft_tsd.diffusion.counting import denoiser_skeleton
from peft_tsd.diffusion.encoded import Encoded
from peft_tsd.diffusion.families import family_of
from peft_tsd.diffusion.learner import Learner
from peft_tsd.diffusion.objective import Diffusion
from peft_tsd.diffusion.recipe import DreamBooth

SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def small_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=32,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=256,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=6 * 32 + 128,
    )


def unet(device: str) -> UNet2DConditionModel:
    torch.manual_seed(0)
    if device == "cpu":
        return small_unet()
    with torch.device(device):
        return UNet2DConditionModel.from_config(denoiser_skeleton(SDXL).config).to(torch.bfloat16)


def share(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """A new UNet around the same weights."""
    with torch.device("meta"):
        twin = UNet2DConditionModel.from_config(base.config)
    twin.load_state_dict(base.state_dict(), assign=True)
    return twin


def material(model: UNet2DConditionModel, side: int, photos: int = 6) -> Encoded:
    """Latents and embeddings of the right shapes."""
    width = model.config.cross_attention_dim
    pooled = model.config.projection_class_embeddings_input_dim - 6 * model.config.addition_time_embed_dim
    pixels = float(8 * side)
    return Encoded(
        mean=torch.randn(photos, 4, side, side),
        std=torch.full((photos, 4, side, side), 0.1),
        time_ids=torch.tensor([pixels, pixels, 0, 0, pixels, pixels]).repeat(photos, 1),
        embeddings={"encoder_hidden_states": torch.randn(1, 77, width), "text_embeds": torch.randn(1, pooled)},
    )


class Peer:
    """The loop of diffusers' script."""

    def __init__(self, model: Any, data: Encoded, arguments: argparse.Namespace) -> None:
        AcceleratorState._reset_state()
        dtype = model.dtype
        self.accelerator = Accelerator(mixed_precision="bf16" if dtype == torch.bfloat16 else "no")
        model.requires_grad_(False)
        model.add_adapter(
            LoraConfig(
                r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules=TARGETS, init_lora_weights="gaussian"
            )
        )
        if dtype != torch.float32:
            cast_training_params([model], dtype=torch.float32)
        if arguments.checkpointing:
            model.enable_gradient_checkpointing()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.0)
        schedule = get_scheduler("constant", optimizer=optimizer)
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model.train(), optimizer, schedule)
        self.noise = DDPMScheduler(**NOISE)
        self.data, self.size, self.dtype = data, arguments.batch_size, dtype
        device = self.accelerator.device
        self.embeddings = {key: x.to(device, dtype) for key, x in data.embeddings.items()}

    def step(self, number: int) -> None:
        device, size = self.accelerator.device, self.size
        chosen = torch.arange(number * size, (number + 1) * size) % len(self.data.mean)
        with self.accelerator.accumulate(self.model):
            mean, std = self.data.mean[chosen].to(device), self.data.std[chosen].to(device)
            latents = (mean + std * torch.randn_like(mean)).to(self.dtype)
            noise = torch.randn_like(latents)
            timesteps = torch.randint(0, 1000, (size,), device=device).long()
            noisy = self.noise.add_noise(latents, noise, timesteps)
            predicted = self.model(
                noisy,
                timesteps,
                self.embeddings["encoder_hidden_states"].repeat(size, 1, 1),
                added_cond_kwargs={
                    "time_ids": self.data.time_ids[chosen].to(device, self.dtype),
                    "text_embeds": self.embeddings["text_embeds"].repeat(size, 1),
                },
                return_dict=False,
            )[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        loss.detach().item()  # shown in its progress bar


def ours(model: Any, data: Encoded, arguments: argparse.Namespace, method: str, prelaunch: int) -> Learner:
    recipe = DreamBooth.model_validate(
        {
            "model": {"name": SDXL, "dtype": str(model.dtype).removeprefix("torch.")},
            "data": {"folder": "-", "prompt": "-"},
            "method": method,
            "directions": {"prelaunch_steps": prelaunch},
            "training": {"steps": 2 * prelaunch, "batch_size": arguments.batch_size},
            "output": "-",
        }
    )
    rank = {"r": arguments.rank, "lora_alpha": 2 * arguments.rank, "target_modules": TARGETS}
    config = LoraConfig(**rank) if method == "lora" else TsdConfig(**rank, method=method, prelaunch_steps=prelaunch)
    model.requires_grad_(False)
    if arguments.checkpointing:
        model.enable_gradient_checkpointing()
    adapters = {"unet": get_peft_model(model, config)}
    family = family_of("StableDiffusionXLPipeline", SDXL)
    return Learner(None, family, recipe, adapters, {"subject": data}, Diffusion(DDPMScheduler(**NOISE), None))


class Contender:
    def __init__(self, loop: Peer | Learner) -> None:
        self.loop, self.number, self.seconds = loop, 0, []

    def step(self) -> None:
        self.number += 1
        self.loop.step(self.number)

    def timed_step(self, device: str) -> None:
        # On a CPU the time on the processor, which other work on the machine does not lengthen.
        clock = time.perf_counter if device == "cuda" else time.process_time
        synchronize(device)
        start = clock()
        self.step()
        synchronize(device)
        self.seconds.append(clock() - start)

    def memory(self, device: str) -> int:
        """Peak bytes allocated during a step, beyond what was allocated before it."""
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.step()
            return torch.cuda.max_memory_allocated() - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            self.step()
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        return max(itertools.accumulate(change for _, change in changes))


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=20, help="rounds that are timed")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--side", type=int, help="of the latents; an eighth of the photos'")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing in all of them")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    arguments = parser.parse_args()
    arguments.batch_size = arguments.batch_size or (2 if arguments.device == "cpu" else 4)
    arguments.side = arguments.side or (64 if arguments.device == "cpu" else 128)

    base = unet(arguments.device)
    data = material(base, arguments.side)
    table = {
        "diffusers, PEFT LoRA": lambda model: Peer(model, data, arguments),
        "ours, lora": lambda model: ours(model, data, arguments, "lora", 10**8),
        "ours, lora-tsd, pre-launch": lambda model: ours(model, data, arguments, "lora-tsd", 10**8),
        "ours, lora-tsd, dash": lambda model: ours(model, data, arguments, "lora-tsd", 1),
    }
    contenders = {name: Contender(make(share(base))) for name, make in table.items()}
    for contender in contenders.values():  # the first step of the last one makes the transition
        contender.step()
        contender.step()
    gc.collect()
    order = random.Random(0)
    for _ in range(arguments.steps):
        for contender in order.sample(list(contenders.values()), len(contenders)):
            contender.timed_step(arguments.device)
    peak = {name: contender.memory(arguments.device) for name, contender in contenders.items()}

    [peer, *_] = contenders
    rows = []
    print(f"{'':28} {'ms':>8} {'time':>7} {'quartiles':>15} {'memory':>8}")
    for name, contender in contenders.items():
        ratios = [mine / its for mine, its in zip(contender.seconds, contenders[peer].seconds)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        row = {
            "name": name,
            "milliseconds": 1000 * statistics.median(contender.seconds),
            "time_ratio": middle,
            "quartiles": [low, high],
            "memory_ratio": peak[name] / peak[peer],
            "peak_bytes": peak[name],
        }
        rows.append(row)
        quartiles = f"{low:.3f}-{high:.3f}"
        print(f"{name:28} {row['milliseconds']:8.1f} {middle:7.3f} {quartiles:>15} {row['memory_ratio']:8.3f}")
    if arguments.out:
        versions = {"peft-tsd": __version__, "torch": torch.__version__, "peft": peft.__version__}
        versions["diffusers"] = diffusers.__version__
        device = torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor()
        settings = {k: v for k, v in vars(arguments).items() if k != "out"}
        content = {"device": device, "versions": versions, "settings": settings, "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
