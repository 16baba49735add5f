"""What leaves the library: an adapter as a plain LoRA, which every server already loads.

Each adapter *is* a LoRA of a higher rank. With A, B and scaling s of LoRA, directions U, V with their learned changes
Δσ, and LoRA-Init's starting factors A₀, B₀,

    A' = [s·A; diag(Δσ)·Vᵀ; −s·A₀],    B' = [B, U, B₀],    scaling 1

is exact: rank r + s, or 2r + s with the `"svd"` reading of LoRA-Init. Compression to a smaller rank goes through QR of
both factors and an SVD of the small core between them; the dense change is never formed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .adapter_files import WEIGHTS, check_config, check_weights, find_adapter
from .config import TsdConfig
from .dash.config import DashConfig
from .dash.export import Stacked, stack_layers
from .folders import write_folder
from .layer import DirectedLayer, used_columns
from .stacked import Factors


@dataclass(frozen=True)
class ExportReport:
    """What `export_lora` wrote.

    Attributes:
        path: The folder of the plain LoRA.
        rank: Its rank; the largest where layers differ.
        errors: For a compressed export, the relative error ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius) of each layer; empty where
            exact.
    """

    path: Path
    rank: int
    errors: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.errors:
            return f"plain LoRA of rank {self.rank}, exact: {self.path}"
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"plain LoRA of rank {self.rank}: {self.path}\n"
            f"relative error of the change: mean {mean:.2e}, largest {self.errors[worst]:.2e} in {worst}"
        )


def export_lora(
    model_or_path: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    adapter_name: str | None = None,
) -> ExportReport:
    """Write an adapter as a plain LoRA (`peft_type` LORA) into the new folder `out`.

    PEFT, vLLM, diffusers and others load the result without this package. An adapter still in pre-launch is exported
    as the LoRA it is.

    Args:
        model_or_path: A model with TSD adapters or with directions beside another method, or (but for the latter) a
            folder or hub name saved by `save_pretrained`.
        out: The folder to make; it must not exist.
        rank: Compress to at most this rank by truncated SVD, and report the relative error of each layer. Exact, at
            rank r + s (or 2r + s with the `"svd"` reading of LoRA-Init), by default.
        adapter_name: The adapter of the model to export; the active one by default.

    Raises:
        FileExistsError: `out` exists.
        ValueError: The adapter has no directions, its tensors do not fit its config or hold NaN or Inf, or `rank`
            is not a positive integer. Nothing is written then.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and is not overwritten. Give a new folder, or remove it first.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer, or None for an exact export; got {rank!r}.")
    lora_config, lora_state, errors = _convert(model_or_path, adapter_name, rank)

    def fill(folder: Path) -> None:
        save_file(lora_state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        lora_config.save_pretrained(str(folder))

    write_folder(out, fill)
    ranks = [tensor.shape[0] for key, tensor in lora_state.items() if key.endswith(".lora_A.weight")]
    return ExportReport(out, max(ranks), errors)


class Lora(NamedTuple):
    """A plain LoRA."""

    config: LoraConfig
    state: dict[str, Tensor]
    """Its tensors, under PEFT's names."""
    errors: dict[str, float]
    """The relative error of each layer that was compressed."""


def _convert(model_or_path: nn.Module | str | os.PathLike[str], adapter_name: str | None, rank: int | None) -> Lora:
    if not isinstance(model_or_path, nn.Module):
        path = os.fspath(model_or_path)
        folder = find_adapter(path)
        config = check_config(folder)
        if isinstance(config, DashConfig):
            raise ValueError(
                f"{path} is an adapter of type {config.peft_type.value}, whose change is read on its base model: load "
                "it with PeftModel.from_pretrained(base, path), and export that."
            )
        _check_type(config, path)
        check_weights(folder / WEIGHTS, config)
        return as_lora(config, load_file(folder / WEIGHTS), rank)
    model = model_or_path
    configs = getattr(model, "peft_config", {})
    if adapter_name is None:
        active = (layer.active_adapters[0] for layer in model.modules() if isinstance(layer, DirectedLayer))
        adapter_name = next(active, next(iter(configs), "default"))
    if adapter_name not in configs:
        raise ValueError(f"The model has no adapter {adapter_name!r}; it has {sorted(configs)}.")
    config = configs[adapter_name]
    if not isinstance(config, DashConfig):
        _check_type(config, f"Adapter {adapter_name!r}")
    state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if isinstance(config, DashConfig):
        return _dash_as_lora(config, state, stack_layers(model, adapter_name, rank))
    return as_lora(config, state, rank)


def _check_type(config: PeftConfig, name: str) -> None:
    if not isinstance(config, TsdConfig):
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{name} is an adapter of type {kind}, not of type TSD; there is nothing to convert.")


def as_lora(config: TsdConfig, state: dict[str, Tensor], rank: int | None) -> Lora:
    """The plain LoRA that an adapter is, of scaling 1; compressed where `rank` is given.

    Raises:
        ValueError: The adapter has no layer, or as `stack_layer`.
    """
    layers = sorted(key.removesuffix(".lora_A.weight") for key in state if key.endswith(".lora_A.weight"))
    if not layers:
        raise ValueError("The adapter has no LoRA layer; there is nothing to export.")
    out = {
        _prefixed(key): tensor
        for key, tensor in state.items()
        if not re.search(r"\.lora_(A|B|dash|directions)\.", key)
    }
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for layer in layers:
        name = _prefixed(layer).removeprefix("base_model.model.")
        factor_a, factor_b, bias = stack_layer(config, state, layer, name)
        if rank is not None:
            factor_a, factor_b, errors[name] = truncate(factor_a, factor_b, rank)
        kernel = state[f"{layer}.lora_A.weight"].shape[1:]
        ranks[name] = factor_a.shape[0]
        out[_prefixed(f"{layer}.lora_A.weight")] = factor_a.reshape(-1, *kernel)
        out[_prefixed(f"{layer}.lora_B.weight")] = factor_b[(..., *(None,) * (len(kernel) - 1))]
        if bias is not None:
            out[_prefixed(f"{layer}.lora_B.bias")] = bias
    shared = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.name != "peft_type"}
    return Lora(_lora_config(shared, ranks), _detached(out), errors)


def _dash_as_lora(config: DashConfig, state: dict[str, Tensor], layers: dict[str, Stacked]) -> Lora:
    prefixes = tuple(f"base_model.model.{name}." for name in layers)
    # What the adapter holds beside its layers: modules_to_save. A tuner's own tensors lie above the model.
    out = {
        _prefixed(key): tensor
        for key, tensor in state.items()
        if not _TUNERS_OWN.match(key) and not _prefixed(key).startswith(prefixes)
    }
    for name, layer in layers.items():
        out[f"base_model.model.{name}.lora_A.weight"] = layer.a
        out[f"base_model.model.{name}.lora_B.weight"] = layer.b
    shared = {
        "target_modules": list(layers),
        "modules_to_save": getattr(config, "modules_to_save", None),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        **{name: getattr(config, name) for name in ("task_type", "base_model_name_or_path", "revision")},
    }
    ranks = {name: layer.a.shape[0] for name, layer in layers.items()}
    errors = {name: layer.error for name, layer in layers.items() if layer.error is not None}
    return Lora(_lora_config(shared, ranks), _detached(out), errors)


# How a tensor is called that belongs to a tuner, and not to the model in it.
_TUNERS_OWN = re.compile(r"base_model\.(?!model\.)")


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


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
    identified = bool(read("lora_directions.indices")[0] >= 0)
    if identified and config.learns_along_directions:
        theta = read("lora_dash.weight").float()
        if config.dash_unit != "one":
            theta = read("lora_directions.unit").float() * theta
        u, v = read("lora_directions.u").float(), read("lora_directions.v").float()
        factors = factors._replace(delta_sigma=config.dash_lr_ratio * theta, u=u, v=v)
    restarted = identified and config.starts_from_directions and config.init_reading == "svd"
    if restarted or config.subtracts_init:
        a0, b0 = read("lora_directions.a0").float(), read("lora_directions.b0").float()
        factors = factors._replace(a0=a0, b0=b0)
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
    if factors.u is None or factors.v is None or factors.delta_sigma is None:
        return factors
    used = used_columns(factors.u)
    return factors._replace(delta_sigma=factors.delta_sigma[used], u=factors.u[:, used], v=factors.v[used])


def lora_scaling(config: LoraConfig, name: str, rank: int) -> float:
    """LoRA's scaling in the layer `name` of the base model, whose rank is `rank`."""
    patterns: dict[str, float] = config.alpha_pattern or {}
    key = get_pattern_key(patterns, name)  # `name` itself where no pattern matches
    alpha = float(patterns.get(key, config.lora_alpha))
    return alpha / (rank**0.5 if config.use_rslora else rank)


def truncate(factor_a: Tensor, factor_b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of at most `rank`, and their relative error, through the small core between two QRs."""
    q_b, r_b = torch.linalg.qr(factor_b.double())
    q_a, r_a = torch.linalg.qr(factor_a.double().mT)
    u, sigma, v_transposed = torch.linalg.svd(r_b @ r_a.mT)
    keep = min(rank, len(sigma))
    root = sigma[:keep].sqrt()
    total = sigma.square().sum()
    error = float((sigma[keep:].square().sum() / total).sqrt()) if total > 0 else 0.0
    new_b = q_b @ (u[:, :keep] * root)
    new_a = (root[:, None] * v_transposed[:keep]) @ q_a.mT
    return new_a.float(), new_b.float(), error


def _lora_config(shared: dict[str, Any], ranks: dict[str, int]) -> LoraConfig:
    commonest = max(set(ranks.values()), key=list(ranks.values()).count)
    patterns = {re.escape(name): rank for name, rank in ranks.items() if rank != commonest}
    return LoraConfig(
        **{
            **shared,
            "r": commonest,
            "lora_alpha": commonest,  # with r, a scaling of 1
            "use_rslora": False,
            "rank_pattern": patterns,
            "alpha_pattern": dict(patterns),
            "init_lora_weights": True,
            **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config")),
            "loftq_config": {},
            "inference_mode": True,
        }
    )


def _prefixed(key: str) -> str:
    """A key of the saved state as PEFT writes it; adapters injected into a model lack the prefix."""
    return key if key.startswith("base_model.model.") else f"base_model.model.{key}"
