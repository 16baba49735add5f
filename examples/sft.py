"""LoRA-TSD in TRL's SFTTrainer: `peft_config=` takes a TsdConfig, and the callback goes with it.

python examples/sft.py                                                      # a tiny random model, in seconds
python examples/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/sft
"""

from __future__ import annotations

import argparse

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import stand_in
from peft_tsd import TsdCallback, TsdConfig, export_lora

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder; without it, a tiny random one")
parser.add_argument("--out", default="runs/example-sft")
parser.add_argument("--steps", type=int, default=20)
args = parser.parse_args()

base, tokenizer = stand_in.load(args.model)

trainer = SFTTrainer(
    model=base,
    processing_class=tokenizer,
    train_dataset=Dataset.from_list(stand_in.questions()),
    args=SFTConfig(
        f"{args.out}/checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_steps=5,  # the first step along the gradient would else be undone in part
        logging_steps=5,
        save_strategy="no",
        bf16=torch.cuda.is_available(),  # TRL's default, which wants a GPU
        report_to="none",
    ),
    peft_config=TsdConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    callbacks=[TsdCallback()],
)
trainer.train()
trainer.save_model(f"{args.out}/adapter")
print(export_lora(trainer.model, f"{args.out}/adapter-lora"))
