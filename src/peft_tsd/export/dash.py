"""What another method and the directions beside it learned, as the factors of a LoRA.

The method's ΔW is dense: its singular value decomposition gives the factors, as in PEFT's `convert_to_lora`. The
directions are exact on top of it, whatever is kept of ΔW:

    A' = [Σ^½ Vᵀ; diag(Δσ) V_sᵀ],    B' = [U Σ^½, U_s],    scaling 1
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..dash.layer import DashLayer
from ..directions.change import check_matrix
from ..directions.spectrum import as_double
from ..tuner.phase import adapted_layers


class Stacked(NamedTuple):
    """The whole effective change of one layer, as LoRA's factors of scaling 1, float32."""

    a: Tensor
    """A', shape (n, in), or (n, in, kh, kw) for a convolution."""
    b: Tensor
    """B', shape (out, n), or (out, n, 1, 1)."""
    error: float | None
    """‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius) of the whole change, where a rank was asked for."""
    fan_in_fan_out: bool
    """Whether the base weight is stored as (in, out)."""


def stack_layers(model: nn.Module, adapter: str, rank: int | None) -> dict[str, Stacked]:
    """Each layer's change by the name the layer has in the base model.

    Args:
        model: The model with directions beside another method.
        adapter: The adapter.
        rank: How much to keep of the method's own change; all of it by default.

    Raises:
        ValueError: No rank is given and PEFT has no LoRA of this method; biases changed too; or NaN or Inf.
    """
    stacked = {}
    for name, layer in adapted_layers(model, adapter).items():
        assert isinstance(layer, DashLayer)
        config = layer.settings(adapter)
        if rank is None and not layer.has_exact_lora(adapter):
            raise ValueError(
                f"The change that {config.peft.peft_type.value} makes may be of full rank, and PEFT converts no such "
                "adapter to a LoRA. Give rank=..., and read the errors reported; or merge_and_unload() and save that."
            )
        merged = layer.merged_without_directions(adapter)
        bias, merged_bias = layer.get_base_layer().bias, merged.get_base_layer().bias
        changes_bias = bias is not None and not torch.equal(as_double(bias), merged_bias)
        if getattr(config, "bias", "none") != "none" or changes_bias:
            raise ValueError(
                f"{config.peft.peft_type.value} has changed biases too (in {name}), which a LoRA does not hold. Call "
                "merge_and_unload() and save the model."
            )
        change = merged.weight_matrix() - as_double(layer.weight_matrix())
        check_matrix(change, f"the change of {name}")
        stacked[name] = _stack(layer, adapter, change, rank)
    return stacked


@torch.no_grad()
def _stack(layer: DashLayer, adapter: str, change: Tensor, rank: int | None) -> Stacked:
    u, sigma, v_transposed = torch.linalg.svd(change, full_matrices=False)
    # What float32 parameters can say of a rank.
    own = int((sigma > sigma[0] * max(change.shape) * torch.finfo(torch.float32).eps).sum())
    keep = max(own if rank is None else min(rank, own), 1)
    root = sigma[:keep].sqrt()
    parts_a, parts_b = [root[:, None] * v_transposed[:keep]], [u[:, :keep] * root]
    if layer.fixed(adapter).identified:
        down, up = (as_double(factor) for factor in layer.dash_factors(adapter))
        change = change + up @ down
        parts_a.append(down)
        parts_b.append(up)
    total = float(change.norm())
    base = layer.get_base_layer()
    kernel = base.weight.shape[1:] if isinstance(base, nn.Conv2d) else (change.shape[1],)
    a, b = torch.cat(parts_a), torch.cat(parts_b, 1)
    return Stacked(
        a=a.reshape(-1, *kernel).float(),
        b=b.reshape(*b.shape, *(1,) * (len(kernel) - 1)).float(),
        error=None if rank is None else float(sigma[keep:].norm()) / total if total else 0.0,
        fan_in_fan_out=isinstance(base, Conv1D),
    )
