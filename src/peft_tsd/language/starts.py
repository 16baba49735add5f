"""PEFT's methods that start from the first training batches: LoRA-GA and EVA.

LoRA-GA: Wang et al., arXiv 2407.05000. EVA: Paischer et al., arXiv 2410.07170. Both are PEFT's own code; what is here
gives them batches and keeps what they leave.

LoRA-GA writes `W - s·B₀·A₀` over every base weight W that it adapts. So the start A₀, B₀ is kept in the run folder: a
run that goes on takes it out of W again, and the adapter that is kept at the end is the LoRA of twice the rank that
has it in itself, `A' = [A; A₀]`, `B' = [B, -B₀]`, for the base weights as they were.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from peft.tuners.lora import LoraLayer, preprocess_loraga
from peft.utils import transpose
from safetensors.torch import load_file, save_file

from ..files.adapters import WEIGHTS
from ..files.whole import write_folder
from ..runs.processes import by_main
from ..schedule.gradients import loss_of_output
from .tasks.generation import IGNORED

# What torch says of the hooks with which PEFT counts backward passes: the first layer's input needs no gradient.
_NO_INPUT = "Full backward hook is firing when gradients are computed"


def start_from_batches(base: Any, config: LoraConfig, batches: Sequence[Any], kept: Path) -> PeftModel:
    """`base` with the adapter that `config` describes, started from `batches`.

    Args:
        base: The model, on its device. LoRA-GA writes to its weights.
        config: Of LoRA-GA or EVA.
        batches: Of training rows, on that device.
        kept: The folder for LoRA-GA's start.
    """
    if config.init_lora_weights == "eva":
        model = get_peft_model(base, config)
        initialize_lora_eva_weights(model, [_aligned(batch) for batch in batches], show_progress_bar=False)
        return model

    def backward() -> None:
        for batch in batches:
            loss_of_output(base, batch).backward()  # type: ignore[no-untyped-call]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", _NO_INPUT)
        preprocess_loraga(base, config, backward)
    model = get_peft_model(base, config)
    by_main(lambda: write_folder(kept, lambda path: model.save_pretrained(path)))
    return model


def take_out_start(model: PeftModel, kept: Path) -> None:
    """Have a base model read anew be what a run was begun on, with the arithmetic of `LoraLayer.lora_ga_init`.

    Args:
        model: With the adapter of a checkpoint.
        kept: As `start_from_batches`; nothing is done where it is not there, as for EVA.
    """
    if not kept.is_dir():
        return
    start = load_file(kept / WEIGHTS)
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                weight = layer.get_base_layer().weight
                a, b = (start[f"{name}.lora_{part}.weight"].to(weight.device) for part in "AB")
                turned = layer.fan_in_fan_out
                changed = transpose(weight.float(), turned) - layer.scaling["default"] * (b.float() @ a.float())
                weight.copy_(transpose(changed, turned))


def put_start_in(adapter: Path, kept: Path) -> None:
    """Have a saved adapter hold its start too, so that it is for the base weights as they were.

    Args:
        adapter: The folder, written anew.
        kept: As `take_out_start`.
    """
    if not kept.is_dir():
        return
    tensors, start = load_file(adapter / WEIGHTS), load_file(kept / WEIGHTS)
    for key, tensor in start.items():
        if ".lora_A." in key:
            tensors[key] = torch.cat([tensors[key], tensor])
        elif ".lora_B." in key:
            tensors[key] = torch.cat([tensors[key], -tensor], dim=1)
    save_file(tensors, adapter / WEIGHTS, metadata={"format": "pt"})
    config = LoraConfig.from_pretrained(adapter)
    config.r *= 2
    # The scaling stays: α/r, or α/√r.
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2
    config.init_lora_weights, config.lora_ga_config = True, None
    config.save_pretrained(adapter)


def _aligned(batch: Any) -> dict[str, Any]:
    """A batch with a label for each of its tokens, by which EVA takes the inputs that answers are learned from.

    Labels of the last logits alone get those before them; a classifier's are left out.
    """
    rest = {key: value for key, value in batch.items() if key not in ("labels", "logits_to_keep")}
    labels = batch["labels"]
    if labels.ndim < 2:
        return rest
    missing = batch["input_ids"].shape[1] - labels.shape[1]
    return {**rest, "labels": torch.nn.functional.pad(labels, (missing, 0), value=IGNORED)}
