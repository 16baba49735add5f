"""`TsdModel`: the tuner PEFT puts between a model and its TSD layers."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any, cast

from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from ..distributed.replicas import leave_out_of_ddp
from ..files.adapters import plain_name
from ..models.offloaded import computes_on
from ..models.packed import keep_as_stored
from ..models.wrapped import check_saveable
from .config import TsdConfig
from .directed import DirectedLayer
from .dispatch import check_experts, create_layer
from .held import FixedDirections, joined_as_now
from .layer import TsdLayer
from .phase import (
    Phase,
    adapted_layers,
    check_one_phase,
    phase_of,
    warn_in_prelaunch,
    warn_of_native_state,
)
from .quantized import QuantizedLayer
from .settings import DirectionSettings
from .table import Directions
from .within import found_in


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
            ValueError: There is no such adapter, or its layers are in different phases.
        """
        layers, adapter = self._layers_of(adapter_name)
        check_one_phase(layers, adapter)
        return phase_of(layers, adapter)

    def directions(self, adapter_name: str | None = None) -> Directions:
        """The directions identified in every layer: arrays for programs, a table when printed.

        Args:
            adapter_name: The adapter; the active one by default.

        Raises:
            ValueError: There is no such adapter, or it is still in pre-launch.
        """
        return found_in(*self._layers_of(adapter_name))

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, *args, **kwargs)  # type: ignore[misc]
        names = [
            f"{name}.{key}"
            for name, module in model.named_modules()
            if isinstance(module, FixedDirections)
            for key in module.alike()
        ]
        leave_out_of_ddp(model, names)
        # A PeftModel asks its tuner for what it does not have itself.
        leave_out_of_ddp(
            cast(nn.Module, self), [f"{outer}.{n}" for outer in ("model", "base_model.model") for n in names]
        )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)  # type: ignore[misc]
        if autocast_adapter_dtype:  # PEFT casts parameters
            for layer in adapted_layers(self.model, adapter_name).values():
                layer.fixed(adapter_name).upcast()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # By this PEFT names tensors in files, and finds the place of those it reads: both as in the bare model.
        named: str = super()._remove_adapter_name_from_key(key, adapter_name)  # type: ignore[misc]
        return plain_name(named)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        check_saveable(model)
        if getattr(config, "joins_start", False):
            state_dict = joined_as_now(state_dict)
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(  # type: ignore[misc]
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        # Some wrappers (checkpoints of activations) leave themselves out of the names in a state dict.
        places = {cls._remove_adapter_name_from_key(key, adapter_name): key for key in model.state_dict()}
        return {places.get(key, key): tensor for key, tensor in found.items()}

    @staticmethod
    def _state_to_save(
        model: nn.Module, config: DirectionSettings, adapter: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """`state_dict` with the names that the modules of `model` have, by which PEFT chooses from it.

        Raises:
            ValueError: What would be saved could not be loaded again.
        """
        check_saveable(model)
        warn_of_native_state(config, model, adapter)
        as_saved(config, model, adapter)
        tensors = chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
        names = {plain_name(name): name for name, _ in tensors}
        return {names.get(plain_name(key), key): tensor for key, tensor in state_dict.items()}

    def _name_targets_plainly(self, adapter_name: str) -> None:
        """Take out of `target_modules`, as PEFT filled it in for "all-linear", what torch.compile puts into names."""
        config = self.peft_config[adapter_name]
        for holder in (config, getattr(config, "peft", config)):
            targets = getattr(holder, "target_modules", None)
            if isinstance(targets, (set, list, tuple)) and any(plain_name(name) != name for name in targets):
                holder.target_modules = {plain_name(name) for name in targets}

    def _layers_of(self, adapter_name: str | None) -> tuple[dict[str, DirectedLayer], str]:
        adapter = self.active_adapters[0] if adapter_name is None else adapter_name
        if adapter not in self.peft_config:
            raise ValueError(f"There is no adapter {adapter!r}; the model has {sorted(self.peft_config)}.")
        return adapted_layers(self.model, adapter), adapter


def as_saved(config: DirectionSettings, model: nn.Module, adapter: str) -> None:
    """Warn of an adapter that is saved in pre-launch, and refuse one that could not be loaded again.

    Raises:
        ValueError: Its buffers were averaged.
    """
    layers = adapted_layers(model, adapter)
    for name, layer in layers.items():
        if layer.fixed(adapter).averaged:
            raise ValueError(
                f"The directions of layer {name!r} are an average of positions in a spectrum, which is none. Leave "
                "AveragedModel's use_buffers at False, so that it copies buffers; or copy them into the average: "
                "for a, b in zip(averaged.module.buffers(), model.buffers()): a.copy_(b)."
            )
    warn_in_prelaunch(config, layers, adapter, "is saved")


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
        self._name_targets_plainly(adapter_name)
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
        if "current_key" in kwargs:  # what patterns of ranks are matched with
            kwargs["current_key"] = plain_name(kwargs["current_key"])
        super()._create_and_replace(lora_config, adapter_name, target, *args, **kwargs)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(new_module, TsdLayer) and computes_on(new_module.get_base_layer()) is not None:
            setattr(parent, child_name, new_module)  # PEFT would move it to where the base weight is, which is nowhere
            return
        super()._replace_module(parent, child_name, new_module, child)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: TsdConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        state_dict = cls._state_to_save(model, config, adapter_name, state_dict)
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
