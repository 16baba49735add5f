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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..dash.config import DashConfig
from ..files.adapters import PREFIX, WEIGHTS, find_adapter
from ..files.whole import write_folder
from ..tuner.checking import check_config, check_weights
from ..tuner.config import TsdConfig
from ..tuner.directed import DirectedLayer
from .dash import Stacked, stack_layers
from .factors import stack_layer, truncate


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
        save_file(lora_state, folder / WEIGHTS, metadata={"format": "pt"})
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
        name = _prefixed(layer).removeprefix(PREFIX)
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
    prefixes = tuple(f"{PREFIX}{name}." for name in layers)
    # What the adapter holds beside its layers: modules_to_save. A tuner's own tensors lie above the model.
    out = {
        _prefixed(key): tensor
        for key, tensor in state.items()
        if not _TUNERS_OWN.match(key) and not _prefixed(key).startswith(prefixes)
    }
    for name, layer in layers.items():
        out[f"{PREFIX}{name}.lora_A.weight"] = layer.a
        out[f"{PREFIX}{name}.lora_B.weight"] = layer.b
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
    return key if key.startswith(PREFIX) else f"{PREFIX}{key}"
