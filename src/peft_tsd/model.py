"""`TsdModel`: the tuner PEFT puts between a model and its TSD layers."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from .config import DirectionSettings, TsdConfig
from .dispatch import check_experts, create_layer
from .distributed import is_sharded, whole
from .layer import DirectedLayer, TsdLayer, used_columns
from .quantized import QuantizedLayer, keep_as_stored
from .zero_checkpoints import completed

Phase = Literal["pre-launch", "dash"]


@dataclass(frozen=True)
class LayerDirections:
    """The task-specific directions identified in one layer, highest change rate first.

    `indices`, `rates` and `sigma` have one entry a direction chosen; the dash learns along the first n of them:
    num_directions, or what the layer got of a global budget.
    """

    indices: Tensor
    """Positions in the spectrum, 0 being the largest singular value; int64, shape (m,)."""
    rates: Tensor
    """Change rates at the transition, shape (m,)."""
    sigma: Tensor
    """Singular values, shape (m,)."""
    rank_bound: int
    """How many directions the weight has: min(out, in)."""
    delta_sigma: Tensor
    """Learned change along each direction of the dash, shape (n,) with n ≤ m; empty for LoRA-Init."""
    u: Tensor
    """Left singular vectors of the dash, shape (out, n)."""
    v: Tensor
    """Right singular vectors of the dash, shape (in, n)."""


class Directions(Mapping[str, LayerDirections]):
    """The directions of every layer by its name; printed, a table.

    Attributes:
        prelaunch_steps: Optimizer steps that had been taken when they were identified.
    """

    def __init__(self, layers: dict[str, LayerDirections], prelaunch_steps: int) -> None:
        self._layers = layers
        self.prelaunch_steps = prelaunch_steps

    def __getitem__(self, name: str) -> LayerDirections:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __str__(self) -> str:
        rows = [("layer", "of", "directions, highest change rate first", "rate", "σ", "Δσ")]
        for name, found in self.items():
            shown = [str(i) for i in found.indices[:8].tolist()]
            moved = found.delta_sigma
            change = f"{moved[moved.abs().argmax()]:+.2g}" if len(moved) else "-"
            rows.append(
                (
                    name,
                    str(found.rank_bound),
                    " ".join(shown) + (" ..." if len(found.indices) > 8 else ""),
                    f"{found.rates[0]:.2g}" if len(shown) else "-",
                    f"{found.sigma[0]:.2g}" if len(shown) else "-",
                    change,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        return "\n".join([*lines, "rate, σ: of the first direction; Δσ: the largest learned change of the layer."])


def adapted_layers(model: nn.Module, adapter: str) -> dict[str, DirectedLayer]:
    """The layers of `model` that carry `adapter`, by the name each has in the base model, in the model's order."""
    return {
        name.split("base_model.model.", 1)[-1]: module
        for name, module in model.named_modules()
        if isinstance(module, DirectedLayer) and module.carries(adapter)
    }


def config_of(layers: Mapping[str, DirectedLayer], adapter: str) -> DirectionSettings:
    """The configuration of an adapter, from its layers."""
    return _any(layers).settings(adapter)


def steps_taken(layers: Mapping[str, DirectedLayer], adapter: str) -> int:
    """Optimizer steps the adapter has taken, as its layers recorded them."""
    return int(whole(_any(layers).fixed(adapter).step))


def phase_of(layers: Mapping[str, DirectedLayer], adapter: str) -> Phase:
    """The phase of an adapter, read from its layers."""
    return "dash" if _any(layers).fixed(adapter).identified else "pre-launch"


def _any(layers: Mapping[str, DirectedLayer]) -> DirectedLayer:
    # Steps are counted, and directions written, in all layers of an adapter together: one read tells of all.
    return next(iter(layers.values()))


def prelaunch_length(config: DirectionSettings) -> str:
    """How many steps the pre-launch takes, for messages."""
    return f"{'at most ' * (config.prelaunch_steps == 'auto')}{config.longest_prelaunch}"


class PrelaunchWarning(UserWarning):
    """An adapter is used as finished while it is still the plain LoRA of its pre-launch."""


def warn_in_prelaunch(
    config: DirectionSettings, layers: Mapping[str, DirectedLayer], adapter: str, event: str
) -> None:
    """Say once for each config that `adapter` has no directions yet, and why that is likely so."""
    if config.prelaunch_notice_given or not layers or phase_of(layers, adapter) == "dash":
        return
    config.prelaunch_notice_given = True
    steps = steps_taken(layers, adapter)
    if config.prelaunch_steps == 0:
        cause = (
            "With prelaunch_steps=0 it takes them from gradients: pass callbacks=[TsdCallback()] to the Trainer, or "
            "call identify_from_gradients(model, batches) before the first step of your own loop."
        )
    elif steps == 0:
        cause = (
            "No step was ever counted: pass callbacks=[TsdCallback()] to the Trainer, or call "
            "advance(model, optimizer) after each optimizer step of your own loop."
        )
    else:
        lower = "prelaunch_max" if config.prelaunch_steps == "auto" else "prelaunch_steps"
        length = prelaunch_length(config)
        cause = f"It has counted {steps} of its {length} pre-launch steps: train longer, or lower {lower}."
    warnings.warn(
        f"Adapter {adapter!r} ({config.method}) {event} while still in pre-launch: it has no "
        f"task-specific directions yet. {cause}",
        PrelaunchWarning,
        stacklevel=3,
    )


def warn_as_saved(config: DirectionSettings, layers: Mapping[str, DirectedLayer], adapter: str) -> None:
    """`warn_in_prelaunch`, of an adapter that is being saved."""
    # One process saves a sharded model, and cannot ask for its phase without the others.
    if not any(is_sharded(layer) for layer in layers.values()):
        warn_in_prelaunch(config, layers, adapter, "is saved")


class DirectedModel:
    """What a tuner with directions tells of them, mixed in before PEFT's own."""

    model: nn.Module
    peft_config: dict[str, Any]
    active_adapters: list[str]

    def phase(self, adapter_name: str | None = None) -> Phase:
        """The phase of an adapter: `"pre-launch"`, then `"dash"`.

        Args:
            adapter_name: The adapter; the active one by default.

        Raises:
            ValueError: There is no such adapter.
        """
        return phase_of(*self._layers_of(adapter_name))

    def directions(self, adapter_name: str | None = None) -> Directions:
        """The directions identified in every layer: arrays for programs, a table when printed.

        Args:
            adapter_name: The adapter; the active one by default.

        Raises:
            ValueError: There is no such adapter, or it is still in pre-launch.
        """
        layers, adapter = self._layers_of(adapter_name)
        if phase_of(layers, adapter) == "pre-launch":
            raise ValueError(
                f"Adapter {adapter!r} has no directions yet: it has taken {steps_taken(layers, adapter)} of its "
                f"{prelaunch_length(self.peft_config[adapter])} pre-launch steps."
            )
        found = {name: _directions_of(layer, adapter) for name, layer in layers.items()}
        return Directions(found, int(whole(_any(layers).fixed(adapter).identified_at)))

    def _layers_of(self, adapter_name: str | None) -> tuple[dict[str, DirectedLayer], str]:
        adapter = self.active_adapters[0] if adapter_name is None else adapter_name
        if adapter not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}; the model has {sorted(self.peft_config)}.")
        return adapted_layers(self.model, adapter), adapter


class TsdModel(DirectedModel, LoraModel):
    """A model with LoRA-Dash, LoRA-Init or LoRA-TSD adapters (Si et al., arXiv 2409.01035).

    Made by `peft.get_peft_model(model, TsdConfig(...))`; everything PEFT offers on a `LoraModel` works on it, but what
    would combine adapters by their A and B alone.

    Args:
        model (`torch.nn.Module`): The model to adapt. Its weights are never written to, but by an explicit merge.
        config (`TsdConfig`): The configuration of the adapter.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create empty adapter weights on the meta device.
    """

    tuner_layer_cls = TsdLayer

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
        for layer in model.modules():
            if isinstance(layer, TsdLayer):
                layer.shares_weight = holders[id(getattr(layer.get_base_layer(), "weight", None))] > 1

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        for layer in self.model.modules():
            if isinstance(layer, QuantizedLayer):
                layer.check_mergeable()

    def _prepare_model(self, peft_config: TsdConfig, model: nn.Module) -> None:
        super()._prepare_model(peft_config, model)
        check_experts(peft_config, model)
        keep_as_stored(model)

    @staticmethod
    def _create_new_module(lora_config: TsdConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> TsdLayer:
        kwargs.pop("device_map", None)
        return create_layer(target, adapter_name, lora_config, **kwargs)

    def _create_and_replace(
        self, lora_config: TsdConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        if isinstance(target, LoraLayer) and not isinstance(target, TsdLayer):
            raise ValueError(
                f"The model already carries adapters of type {type(target).__module__}.{type(target).__name__}; a TSD "
                "adapter cannot be added beside them. Merge or unload them first, or use a fresh model."
            )
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: TsdConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        warn_as_saved(config, adapted_layers(model, adapter_name), adapter_name)
        state_dict = completed(model, adapter_name, state_dict)
        state: dict[str, Tensor] = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return state

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise ValueError(
            "path_initial_model_for_weight_conversion is not for TSD adapters, which leave the base weight alone. "
            "Use export_lora(model, out) for a plain LoRA."
        )

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused: it would combine A and B and drop what was learned along the directions."""
        raise NotImplementedError(
            f"Cannot combine the TSD adapters {adapters} by their A and B: what they learned along their directions "
            "would be lost. Export each with export_lora and combine the plain LoRAs."
        )


def _directions_of(layer: DirectedLayer, adapter: str) -> LayerDirections:
    fixed = layer.fixed(adapter)
    out_size, in_size = layer.matrix_shape
    dash = 0 if fixed.u is None else int(used_columns(whole(fixed.u)).sum())
    start = layer.r[adapter] if layer.restarted(adapter) else 0
    chosen = min(int(whole(fixed.indices).ge(0).sum()), max(dash, start))

    def read(tensor: Tensor) -> Tensor:
        return whole(tensor).to("cpu", copy=True)

    if fixed.u is None or fixed.v is None:
        delta_sigma, u, v = torch.empty(0), torch.empty(out_size, 0), torch.empty(in_size, 0)
    else:
        delta_sigma = read(layer.delta_sigma(adapter, read=whole))[:dash]
        u, v = read(fixed.u)[:, :dash], read(fixed.v)[:dash].mT

    return LayerDirections(
        indices=read(fixed.indices)[:chosen],
        rates=read(fixed.rates)[:chosen],
        sigma=read(fixed.sigma)[:chosen],
        rank_bound=min(out_size, in_size),
        delta_sigma=delta_sigma,
        u=u,
        v=v,
    )
