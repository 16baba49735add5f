"""A loop of your own with Accelerate: directions from a few batches, and `advance` after each step, in every process.

python examples/accelerate_loop.py                                          # a tiny random model, in seconds
accelerate launch examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, get_constant_schedule_with_warmup

import stand_in
from peft_tsd import TsdConfig, advance, export_lora, identify_from_gradients

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder; without it, a tiny random one")
parser.add_argument("--out", default="runs/example-accelerate")
parser.add_argument("--epochs", type=int, default=5)
args = parser.parse_args()

accelerator = Accelerator(gradient_accumulation_steps=2)
base, tokenizer = stand_in.load(args.model)
data = [stand_in.encode(tokenizer, row) for row in stand_in.questions()]
config = TsdConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
model = get_peft_model(base, config)

optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
loader = DataLoader(data, batch_size=8, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))
# A few steps of warm-up: the first step along the gradient would else be undone in part.
warm_up = get_constant_schedule_with_warmup(optimizer, 5 * accelerator.num_processes)
model, optimizer, loader, warm_up = accelerator.prepare(model, optimizer, loader, warm_up)
first = [batch for batch, _ in zip(loader, range(2), strict=False)]
identify_from_gradients(model, first)  # the gradient of one, the length of the first step tried on the other

for epoch in range(args.epochs):
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            warm_up.step()
            if accelerator.sync_gradients:  # a step was taken, and not only a micro-batch added
                advance(model, optimizer)
            optimizer.zero_grad()
    accelerator.print(f"epoch {epoch}: loss {loss.item():.3f}")

model = accelerator.unwrap_model(model)
if accelerator.is_main_process:
    print(model.directions())
    model.save_pretrained(f"{args.out}/adapter")
    print(export_lora(model, f"{args.out}/adapter-lora"))
