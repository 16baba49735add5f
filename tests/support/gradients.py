"""Batches, losses, and gradients of all weights by autograd, in dense float64."""

import copy

import torch
from transformers.pytorch_utils import Conv1D

from peft_tsd.schedule.gradients import loss_of_output
from support import tiny


def batch(seed: int = 0, rows: int = 4) -> dict[str, torch.Tensor]:
    ids = tiny.tokens(rows, 9, seed=seed)
    return {"input_ids": ids, "labels": ids}


BATCHES = [batch(seed) for seed in range(3)]


def dense_gradients(base, batches, loss=loss_of_output) -> dict[str, torch.Tensor]:
    """The gradient of the mean loss with respect to every weight of `base`, (out, in)."""
    base = copy.deepcopy(base).double().requires_grad_()
    sum(loss(base, one) for one in batches).div(len(batches)).backward()
    return {
        name: (module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad).flatten(1)
        for name, module in base.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim > 1 and module.weight.grad is not None
    }


def square(model, x):
    return model(x).square().mean()
