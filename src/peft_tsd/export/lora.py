"""What leaves the library: an adapter as a plain LoRA, which every server already loads.

Each adapter *is* a LoRA of a higher rank. With A, B and scaling s of LoRA, directions U, V with their learned changes
Δσ, starting factors A₀, B₀, and A₁, B₁ of a pre-launch that is kept,

    A' = [s·A; diag(Δσ)·Vᵀ; −s·A₀; s·A₁],    B' = [B, U, B₀, B₁],    scaling 1

is exact. Its rank is r + s in LoRA-Dash (and r more where it began as PiSSA does), r in LoRA-Init, r + s in LoRA-TSD.
From directions of the weight by the `"svd"` reading it is 2r and r + max(r, s) in the last two, for A₀ and B₀ of
LoRA-TSD lie along V and U (`peft_tsd.tuner.held.Joined`). A pre-launch that they keep adds r. Compression to a smaller
rank goes through QR of both factors and an SVD of the small core between them; the dense change is never formed. All
layers of an export then get one rank (`ranks`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from peft import LoraConfig, PeftConfig, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..dash.config import DashConfig
from ..distributed.sharded import is_sharded
from ..files.adapters import PREFIX, WEIGHTS, find_adapter
from ..files.cards import copy_tokenizer, export_text, write_card
from ..files.whole import write_folder
from ..models.wrapped import adapted_model, modules_in_base
from ..tuner.checking import check_config, check_weights
from ..tuner.config import TsdConfig
from ..tuner.directed import DirectedLayer
from ..tuner.held import joined_as_now
from ..tuner.phase import adapted_layers
from .dash import Stacked, stack_layers
from .factors import stack_layer, truncate
from .pipelines import DIFFUSERS_FILE, denoiser_name, in_component
from .ranks import of_one_rank


@dataclass(frozen=True)
class ExportReport:
    """What `export_lora` wrote.

    Attributes:
        path: The folder of the plain LoRA.
        rank: Its rank, the same in all layers: what the layers need, filled up with zeros to a rank that servers take,
            8 or a multiple of 16.
        errors: For a compressed export, the relative error ‖ΔW − ΔW'‖/‖ΔW‖ (Frobenius) of each layer; empty where
            exact.
        ranks: The rank that each layer needs, without the zeros.
    """

    path: Path
    rank: int
    errors: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kind = f"plain LoRA of rank {self.rank}{self._filled()}"
        if not self.errors:
            return f"{kind}, exact: {self.path}"
        worst = max(self.errors, key=self.errors.__getitem__)
        mean = sum(self.errors.values()) / len(self.errors)
        return (
            f"{kind}: {self.path}\n"
            f"relative error of the change: mean {mean:.2e}, largest {self.errors[worst]:.2e} in {worst}"
        )

    def _filled(self) -> str:
        """What was filled up, for people; nothing where nothing was."""
        least, most = min(self.ranks.values(), default=self.rank), max(self.ranks.values(), default=self.rank)
        if least == self.rank:
            return ""
        needed = str(most) if least == most else f"{least} to {most}, by layer"
        return f" (of which it needs {needed}; filled up with zeros)"


def export_lora(
    model_or_path: nn.Module | str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    rank: int | None = None,
    adapter_name: str | None = None,
) -> ExportReport:
    """Write an adapter as a plain LoRA (`peft_type` LORA) into the new folder `out`, with a model card, and with the
    tokenizer that lies in the adapter's folder.

    PEFT, vLLM and others load the result without this package, and diffusers' pipelines where `model_or_path` is a
    denoiser of theirs: the folder then has the file that `pipe.load_lora_weights` reads too. (With text encoders:
    `peft_tsd.diffusion.save_lora_weights`.) An adapter still in pre-launch is exported as the LoRA it is.

    Args:
        model_or_path: A model with TSD adapters or with directions beside another method, wrapped (`torch.compile`,
            DDP, Accelerate, ...) or not; or (but for directions beside another method) a folder or hub name saved by
            `save_pretrained`.
        out: The folder to make; it must not exist.
        rank: Compress to at most this rank by truncated SVD, and report the relative error of each layer. By default
            exact, at rank r + s (LoRA-Init: r); with the `"svd"` reading and directions of the weight r + max(r, s)
            (LoRA-Init: 2r); and r more where what pre-launch learned was kept, or LoRA-Dash began as PiSSA does.
            Either way all layers get one rank, filled up with zeros to the next that servers take: 8, or a multiple of
            16; not below the one given.
        adapter_name: The adapter of the model to export; the active one by default.

    Raises:
        FileExistsError: `out` exists.
        ValueError: The adapter has no directions, its tensors do not fit its config or hold NaN or Inf, or `rank`
            is not a positive integer. Nothing is written then.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and is not overwritten. Give a new folder, or remove it first.")
    check_rank(rank)
    lora = convert(model_or_path, adapter_name, rank)
    filled = of_one_rank(lora.state, at_least=rank)
    config = plain_config(lora.settings, filled.rank)

    def fill(folder: Path) -> None:
        save_file(filled.state, folder / WEIGHTS, metadata={"format": "pt"})
        config.save_pretrained(str(folder))
        check_weights(folder / WEIGHTS, config)
        component = None
        if isinstance(model_or_path, nn.Module):
            model = adapted_model(model_or_path)
            check_names(folder / WEIGHTS, model)
            if component := denoiser_name(model):
                # Pipelines take this file before the other, which PEFT reads.
                save_file(in_component(filled.state, component), folder / DIFFUSERS_FILE, metadata={"format": "pt"})
        else:
            copy_tokenizer(find_adapter(os.fspath(model_or_path)), folder)
        base = config.base_model_name_or_path
        text = export_text(filled.rank, not lora.errors, base, component is not None)
        write_card(folder, text, base, ("lora", "peft-tsd"))

    write_folder(out, fill)
    return ExportReport(out, filled.rank, lora.errors, filled.ranks)


def check_rank(rank: int | None) -> None:
    """Refuse a rank that is no positive integer; None is none."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer, or None for an exact export; got {rank!r}.")


def check_names(path: Path, model: nn.Module) -> None:
    """Read the file that was written, and refuse one whose tensors have names that the base's modules do not have.

    PEFT passes over such a tensor, and the layer stays as it is in the base.

    Raises:
        ValueError: There is one; or it has another shape than the module's weight.
    """
    sizes = {name: layer.matrix_shape for name, layer in modules_in_base(model) if isinstance(layer, DirectedLayer)}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  (not a dict)
            name, factor, _ = key.removeprefix(PREFIX).partition(".lora_")
            if not factor:
                continue
            if name not in sizes:
                raise ValueError(f"{key} was to be written, and the model has no layer {name!r}; please report it.")
            out_size, in_size = sizes[name]
            shape = file.get_slice(key).get_shape()
            fits = math.prod(shape[1:]) == in_size if key.endswith("A.weight") else shape[0] == out_size
            if not fits:
                raise ValueError(f"{key} of shape {shape} was to be written, and {name!r} is {out_size} x {in_size}.")


class Lora(NamedTuple):
    """A plain LoRA of scaling 1; its layers may be of unequal rank."""

    settings: dict[str, Any]
    """The fields of its configuration, but for those that say its rank and scaling."""
    state: dict[str, Tensor]
    """Its tensors, under PEFT's names."""
    errors: dict[str, float]
    """The relative error of each layer that was compressed."""


def convert(model_or_path: nn.Module | str | os.PathLike[str], adapter_name: str | None, rank: int | None) -> Lora:
    """The first half of `export_lora`: the adapter as a plain LoRA, in memory."""
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
    model = adapted_model(model_or_path)
    configs = getattr(model, "peft_config", {})
    if adapter_name is None:
        active = (layer.active_adapters[0] for layer in model.modules() if isinstance(layer, DirectedLayer))
        adapter_name = next(active, next(iter(configs), "default"))
    if adapter_name not in configs:
        raise ValueError(f"{type(model).__name__} has no adapter {adapter_name!r}; it has {sorted(configs)}.")
    config = configs[adapter_name]
    if not isinstance(config, DashConfig):
        _check_type(config, f"Adapter {adapter_name!r}")
    if any(is_sharded(layer) for layer in adapted_layers(model, adapter_name).values()):
        raise ValueError(
            f"Adapter {adapter_name!r} is sharded over processes. Save it (by the Trainer, or with the state_dict of "
            "all processes' parts), and export the folder: export_lora(FOLDER, OUT)."
        )
    with config.native_state_wanted():
        state = get_peft_model_state_dict(model, adapter_name=adapter_name)
    if isinstance(config, DashConfig):
        return _dash_as_lora(config, state, stack_layers(model, adapter_name, rank), model)
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
    if config.joins_start:
        state = joined_as_now(state)
    if not layers:
        raise ValueError("The adapter has no LoRA layer; there is nothing to export.")
    out = {
        _prefixed(key): tensor
        for key, tensor in state.items()
        if not re.search(r"\.lora_(A|B|dash|directions)\.", key)
    }
    errors: dict[str, float] = {}
    for layer in layers:
        name = _prefixed(layer).removeprefix(PREFIX)
        factor_a, factor_b, bias = stack_layer(config, state, layer, name)
        if rank is not None:
            factor_a, factor_b, errors[name] = truncate(factor_a, factor_b, rank)
        kernel = state[f"{layer}.lora_A.weight"].shape[1:]
        out[_prefixed(f"{layer}.lora_A.weight")] = factor_a.reshape(-1, *kernel)
        out[_prefixed(f"{layer}.lora_B.weight")] = factor_b[(..., *(None,) * (len(kernel) - 1))]
        if bias is not None:
            out[_prefixed(f"{layer}.lora_B.bias")] = bias
    shared = {f.name: getattr(config, f.name) for f in fields(LoraConfig) if f.name != "peft_type"}
    return Lora(shared, _detached(out), errors)


def _dash_as_lora(config: DashConfig, state: dict[str, Tensor], layers: dict[str, Stacked], model: nn.Module) -> Lora:
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
        "target_modules": _targets(layers, model),
        "modules_to_save": getattr(config, "modules_to_save", None),
        "fan_in_fan_out": any(layer.fan_in_fan_out for layer in layers.values()),
        **{name: getattr(config, name) for name in ("task_type", "base_model_name_or_path", "revision")},
    }
    errors = {name: layer.error for name, layer in layers.items() if layer.error is not None}
    return Lora(shared, _detached(out), errors)


def _targets(layers: Collection[str], model: nn.Module) -> list[str] | str:
    """What `target_modules` names these layers and no others: PEFT takes a name for the end of longer ones too."""
    modules = {name for name, _ in modules_in_base(model)} - set(layers)
    if not any(module.endswith(f".{layer}") for layer in layers for module in modules):
        return list(layers)
    return "|".join(map(re.escape, layers))


# How a tensor is called that belongs to a tuner, and not to the model in it.
_TUNERS_OWN = re.compile(r"base_model\.(?!model\.)")


def _detached(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def plain_config(settings: dict[str, Any], rank: int) -> LoraConfig:
    """The configuration of a plain LoRA whose layers all have this rank and scaling 1."""
    return LoraConfig(
        **{
            **settings,
            "r": rank,
            "lora_alpha": rank,  # with r, a scaling of 1
            "use_rslora": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "init_lora_weights": True,
            **dict.fromkeys(("eva_config", "corda_config", "lora_ga_config")),
            "loftq_config": {},
            "inference_mode": True,
        }
    )


def _prefixed(key: str) -> str:
    """A key of the saved state as PEFT writes it; adapters injected into a model lack the prefix."""
    return key if key.startswith(PREFIX) else f"{PREFIX}{key}"
