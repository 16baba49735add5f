"""Tiny models in transformers' Trainer, and what is compared of two trainings."""

import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

from peft_tsd import TsdCallback
from support import tiny


class Tokens(Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        ids = tiny.tokens(1, 9, seed=i)[0]
        return {"input_ids": ids, "labels": ids}


def trainer(out, model=None, callbacks=None, **changes):
    model = model or get_peft_model(tiny.llama(), tiny.config(prelaunch_steps=4, lora_dropout=0.1))
    settings = {
        "output_dir": str(out),
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**{**settings, **changes}),
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        callbacks=[TsdCallback()] if callbacks is None else callbacks,
    )


def losses(trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def adapter_bits(model, path) -> dict[str, torch.Tensor]:
    model.save_pretrained(path)
    return load_file(path / "adapter_model.safetensors")


def chosen(model) -> dict[str, list[int]]:
    return {name: found.indices.tolist() for name, found in model.directions().items()}
