"""A layer's change as the two factors of a plain LoRA: stacked, and truncated to a lower rank."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..directions.spectrum import as_double
from ..tuner.config import TsdConfig
from ..tuner.held import joined_coefficients, used_columns
from ..tuner.stacked import Factors


def stack_layer(
    config: TsdConfig, state: Mapping[str, Tensor], layer: str, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The exact factors A' (n, in), B' (out, n) and the bias (out,) of one layer, in float32.

    Args:
        config: The adapter's configuration.
        state: Its tensors.
        layer: The layer in the names of those.
        name: The layer in the base model.

    Raises:
        ValueError: A tensor is missing, does not fit the others, or holds NaN or Inf.
    """

    def read(part: str) -> Tensor:
        try:
            return state[f"{layer}.{part}"]
        except KeyError:
            raise ValueError(f"The adapter is incomplete: layer {name!r} lacks {part!r}.") from None

    a, b = read("lora_A.weight").float().flatten(1), read("lora_B.weight").float().flatten(1)
    scaling = lora_scaling(config, name, rank=a.shape[0])
    factors = Factors(a, b, scaling)
    identified = bool(read("lora_directions.indices")[0] >= 0)  # a layer may have been left out
    if identified and config.learns_along_directions:
        theta = read("lora_dash.weight").float()
        if config.dash_unit != "one":
            theta = read("lora_directions.unit").float() * theta
        u, v = read("lora_directions.u").float(), read("lora_directions.v").float()
        c = config.dash_lr_ratio * theta
        if config.joins_start:
            to_unit, taken = (read(f"lora_directions.{part}").float() for part in ("to_unit", "taken"))
            c = joined_coefficients(c, to_unit, taken, scaling)
        factors = factors._replace(c=c, u=u, v=v)
    if (identified and config.subtracts_start and not config.joins_start) or config.subtracts_init:
        a0, b0 = read("lora_directions.a0").float(), read("lora_directions.b0").float()
        factors = factors._replace(a0=a0, b0=b0)
    if identified and config.keeps_prelaunch:
        kept_a, kept_b = read("lora_directions.kept_a").float(), read("lora_directions.kept_b").float()
        factors = factors._replace(kept_a=kept_a, kept_b=kept_b)
    try:
        factors = _without_unused(factors)
        factor_a, factor_b = factors.down(), factors.up()
        torch.empty(factor_b.shape, device="meta") @ torch.empty(factor_a.shape, device="meta")
    except (RuntimeError, IndexError) as error:
        raise ValueError(f"The factors of layer {name!r} do not fit each other: {error}") from None
    if not (torch.isfinite(factor_a).all() and torch.isfinite(factor_b).all()):
        raise ValueError(f"Layer {name!r} holds NaN or Inf; the adapter is broken.")
    bias = state.get(f"{layer}.lora_B.bias")
    return factor_a, factor_b, None if bias is None else scaling * bias.float()


def _without_unused(factors: Factors) -> Factors:
    """Without the columns of U that hold no direction: a layer may have more slots than directions."""
    if factors.u is None or factors.v is None or factors.c is None:
        return factors
    used = used_columns(factors.u)
    return factors._replace(c=factors.c[used], u=factors.u[:, used], v=factors.v[used])


def lora_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """LoRA's scaling in the layer `name` of the base model, whose rank is `rank`."""
    patterns: dict[str, float] = config.alpha_pattern or {}
    key = get_pattern_key(patterns, name)  # `name` itself where no pattern matches
    alpha = float(patterns.get(key, config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


def truncate(factor_a: Tensor, factor_b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most `rank`, and their relative error, through the small core between two QRs."""
    q_b, r_b = torch.linalg.qr(as_double(factor_b))
    q_a, r_a = torch.linalg.qr(as_double(factor_a).mT)
    u, sigma, v_transposed = torch.linalg.svd(r_b @ r_a.mT)
    keep = min(rank, len(sigma))
    root = sigma[:keep].sqrt()
    total = sigma.square().sum()
    error = float((sigma[keep:].square().sum() / total).sqrt()) if total > 0 else 0.0
    new_b = q_b @ (u[:, :keep] * root)
    new_a = (root[:, None] * v_transposed[:keep]) @ q_a.mT
    return new_a.float(), new_b.float(), error
