"""Tiny models with directions beside another method."""

import warnings

import torch
from peft import (
    LoHaConfig,
    PeftConfig,
    get_peft_model,
)

from peft_tsd import DashConfig
from support import tiny


def config(inner: PeftConfig | None = None, **changes) -> DashConfig:
    settings = {"prelaunch_steps": 3, "num_directions": 5, "dash_lr_ratio": 20.0}
    return DashConfig(peft=inner or LoHaConfig(r=3, alpha=5, target_modules=tiny.LLAMA_TARGETS), **settings | changes)


def trained(inner: PeftConfig | None = None, steps: int = 6, base=None, **changes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base or tiny.llama(), config(inner, **changes))
    tiny.train(model, steps)
    return model.eval()


def logits(model, ids=None) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens() if ids is None else ids).logits
