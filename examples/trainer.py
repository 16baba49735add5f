"""LoRA-TSD in transformers' Trainer: a config in place of LoraConfig, and one callback.

python examples/trainer.py                                                  # a tiny random model, in seconds
python examples/trainer.py --model HuggingFaceTB/SmolLM2-135M-Instruct --out runs/sums
"""

from __future__ import annotations

import argparse

from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import stand_in
from peft_tsd import TsdCallback, TsdConfig, export_lora

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a hub name or a folder; without it, a tiny random one")
parser.add_argument("--out", default="runs/example-trainer")
parser.add_argument("--steps", type=int, default=40)
args = parser.parse_args()

base, tokenizer = stand_in.load(args.model)
data = [stand_in.encode(tokenizer, row) for row in stand_in.questions()]

# The directions are those of the first batches' gradient; the paper's way would be
# prelaunch_steps=100 and keep_prelaunch=False.
config = TsdConfig(
    method="lora-tsd",
    r=8,
    lora_alpha=16,
    target_modules=["q_proj", "v_proj", "down_proj"],
    task_type="CAUSAL_LM",
)
model = get_peft_model(base, config)
model.print_trainable_parameters()

Trainer(
    model=model,
    args=TrainingArguments(
        f"{args.out}/checkpoints",
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        warmup_steps=5,  # the first step along the gradient would else be undone in part
        logging_steps=10,
        save_steps=20,  # any checkpoint resumes, before and after the transition: train(resume_from_checkpoint=True)
        report_to="none",
    ),
    train_dataset=data,
    data_collator=DataCollatorForSeq2Seq(tokenizer),
    callbacks=[TsdCallback()],
).train()

print(model.directions())
model.save_pretrained(f"{args.out}/adapter")  # as it is: peft_tsd loads it, and trains on
print(export_lora(model, f"{args.out}/adapter-lora"))  # a plain LoRA: PEFT and every server load it
