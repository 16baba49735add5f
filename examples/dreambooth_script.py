"""diffusers' own DreamBooth LoRA script with a TsdConfig in LoraConfig's place; three lines differ, marked below.

This is the core of diffusers' examples/dreambooth/train_dreambooth_lora.py, for Stable Diffusion 1.5, on one photo.

python examples/dreambooth_script.py                                        # a tiny random pipeline, in seconds
python examples/dreambooth_script.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --photo backpack.jpg
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from PIL import Image

import stand_in_diffusion
from peft_tsd import TsdConfig, advance
from peft_tsd.diffusion import save_lora_weights

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder; without it, a tiny random one")
parser.add_argument("--photo", help="what to teach; without it, a made-up picture")
parser.add_argument("--prompt", default="a photo of sks backpack")
parser.add_argument("--out", default="runs/example-dreambooth")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

device = "cuda" if torch.cuda.is_available() else "cpu"
pipe = (StableDiffusionPipeline.from_pretrained(args.model) if args.model else stand_in_diffusion.pipeline()).to(
    device
)
noise_scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
unet, vae = pipe.unet, pipe.vae
for component in (unet, vae, pipe.text_encoder):
    component.requires_grad_(False)

# 1. TsdConfig where the script has LoraConfig.
config = TsdConfig(
    r=4, lora_alpha=4, target_modules=["to_k", "to_q", "to_v", "to_out.0"], prelaunch_steps=max(1, args.steps // 4)
)
unet.add_adapter(config)

optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-4)
photo = Image.open(args.photo).convert("RGB") if args.photo else stand_in_diffusion.photo()
side = unet.config.sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
pixels = torch.tensor(np.array(photo.resize((side, side))) / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None]
torch.manual_seed(0)
with torch.no_grad():
    latents = vae.encode(pixels.to(device)).latent_dist.sample() * vae.config.scaling_factor
    words = pipe.tokenizer(args.prompt, padding="max_length", truncation=True, return_tensors="pt")
    text = pipe.text_encoder(words.input_ids.to(device))[0]

for step in range(args.steps):
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(latents),), device=device)
    predicted = unet(noise_scheduler.add_noise(latents, noise, timesteps), timesteps, text).sample
    loss = torch.nn.functional.mse_loss(predicted, noise)
    loss.backward()
    optimizer.step()
    advance(unet, optimizer)  # 2. after each optimizer step
    optimizer.zero_grad()
    if step % 10 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

# 3. One call where the script has get_peft_model_state_dict and StableDiffusionPipeline.save_lora_weights.
print(save_lora_weights(args.out, unet=unet))

# From here on nothing needs peft_tsd.
fresh = (StableDiffusionPipeline.from_pretrained(args.model) if args.model else stand_in_diffusion.pipeline()).to(
    device
)
fresh.load_lora_weights(args.out)
fresh(args.prompt, num_inference_steps=4 if args.model is None else 30).images[0].save(f"{args.out}/picture.png")
