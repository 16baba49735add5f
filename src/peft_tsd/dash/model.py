"""`DashModel`: the tuner of any PEFT method, its layers given directions as they are made."""

from __future__ import annotations

import functools
import re
from typing import Any, cast

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..layer import unsupported
from ..model import DirectedModel, adapted_layers, warn_in_prelaunch
from .config import DashConfig
from .layer import DashLayer, with_directions

_OWN = re.compile(r"\.(dash_scalars|dash_directions)\.")


class DashModel(DirectedModel, BaseTuner):
    """A model with adapters of some PEFT method and directions beside them.

    Made by `peft.get_peft_model(model, DashConfig(peft=...))`. It is the method's own tuner, `LoHaModel` or
    `AdaLoraModel`, with this class put before it: what a method needs to be called for (AdaLoRA's
    `update_and_allocate`) is called as ever.

    Args:
        model (`torch.nn.Module`): The model to adapt.
        config (`DashConfig`): The configuration of the adapter.
        adapter_name (`str`, defaults to `"default"`): The name of the adapter.
    """

    without_directions: type[BaseTuner]
    """PEFT's own class of this tuner."""

    def __new__(cls, *args: Any, **kwargs: Any) -> DashModel:
        if cls is not DashModel:
            return cast(DashModel, super().__new__(cls))
        return _instance(*args, **kwargs)

    def _check_new_adapter_config(self, config: DashConfig) -> None:
        kinds = sorted({str(getattr(one, "peft", one).peft_type.value) for one in self.peft_config.values()})
        if len(kinds) > 1:
            raise ValueError(
                f"One model cannot carry adapters of {' and '.join(kinds)}, with directions beside them. "
                "Merge or unload one first, or use a second model."
            )
        super()._check_new_adapter_config(config)

    def _create_and_replace(
        self,
        config: DashConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        if isinstance(target, BaseTunerLayer) and not isinstance(target, DashLayer):
            raise ValueError(
                f"{current_key} already carries adapters of type {type(target).__module__}.{type(target).__name__}; "
                "directions cannot be added to them. Merge or unload them first, or use a fresh model."
            )
        base = target.get_base_layer() if isinstance(target, DashLayer) else target
        if reason := unsupported(base):
            raise ValueError(
                f"{current_key} cannot be given directions: {reason}. "
                f"Leave it out of target_modules, or name it in exclude_modules=[{current_key!r}]."
            )
        super()._create_and_replace(
            config.peft, adapter_name, target, target_name, parent, current_key=current_key, **kwargs
        )
        layer = getattr(parent, target_name)
        if isinstance(layer, BaseTunerLayer):
            with_directions(layer).add_directions(adapter_name, config)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # A layer whose change cannot be read is found here, and not after the pre-launch.
        name, layer = next(iter(adapted_layers(model, adapter_name).items()))
        if not any(tensor.is_meta for tensor in layer.parameters()):
            try:
                layer.learned_change(adapter_name)
            except ValueError as error:
                raise ValueError(f"{name} cannot be given directions: {error}") from None

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        scalars = [
            p for layer in model.modules() if isinstance(layer, DashLayer) for p in layer.dash_scalars.parameters()
        ]
        trained = [parameter.requires_grad for parameter in scalars]
        super()._mark_only_adapters_as_trainable(model)
        for parameter, requires_grad in zip(scalars, trained):  # some methods freeze all but what they know
            parameter.requires_grad = requires_grad

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: DashConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        warn_in_prelaunch(config, adapted_layers(model, adapter_name), adapter_name, "is saved")
        tuner = tuner_of(config.peft)
        own = {key: tensor for key, tensor in state_dict.items() if _OWN.search(key)}
        rest = {key: tensor for key, tensor in state_dict.items() if key not in own}
        kept = tuner._get_adapter_state_dict(model, config.peft, adapter_name, rest, unwanted_adapter_names)
        # PEFT goes on to take the adapter's name out of the keys as this class does, which does not know the method:
        # where the method has a way of its own, that comes first.
        named = {}
        for key, tensor in kept.items():
            theirs = tuner._remove_adapter_name_from_key(key, adapter_name)
            named[key if theirs == cls._remove_adapter_name_from_key(key, adapter_name) else theirs] = tensor
        return {**named, **own}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: DashConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        own = {key for key in state_dict if _OWN.search(key)}
        rest = {key: tensor for key, tensor in state_dict.items() if key not in own}
        return {
            **tuner_of(config.peft)._remap_adapter_state_dict_for_load(model, config.peft, adapter_name, rest),
            **{_OWN.sub(rf".\1.{adapter_name}.", key): state_dict[key] for key in own},
        }

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        raise ValueError(
            "path_initial_model_for_weight_conversion is not for adapters with directions, which would be lost. "
            "Use export_lora(model, out) for a plain LoRA."
        )

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused: it would drop what was learned along the directions."""
        raise NotImplementedError(
            f"Cannot combine the adapters {adapters}: what they learned along their directions would be lost. Export "
            "each with export_lora and combine the plain LoRAs."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, and cannot be found by its name.
        return _empty, (self.without_directions,), vars(self)


def tuner_of(config: PeftConfig) -> type[BaseTuner]:
    """PEFT's tuner for a method."""
    return cast(type[BaseTuner], PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type])


def _instance(model: nn.Module, config: Any, adapter_name: str, **kwargs: Any) -> DashModel:
    tuner = tuner_of((config if isinstance(config, PeftConfig) else config[adapter_name]).peft)
    if tuner.uses_shared_state and "state_dict" in kwargs:  # inject_adapter_in_model, which asks the class before
        raise ValueError(
            f"{tuner.__name__} shares a part of its state between layers, which inject_adapter_in_model would lose. "
            "Use get_peft_model."
        )
    return _empty(tuner)


@functools.cache
def _class_with_directions(tuner: Any) -> Any:
    return type(f"Dash{tuner.__name__}", (DashModel, tuner), {"__module__": __name__, "without_directions": tuner})


def _empty(tuner: Any) -> DashModel:
    cls = _class_with_directions(tuner)
    return cast(DashModel, cls.__new__(cls))
