"""`DashModel`: the tuner of any PEFT method, its layers given directions as they are made."""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn

from ..files.adapters import plain_name
from ..models.matrix import unsupported
from ..models.packed import is_quantized
from ..tuner.model import DirectedModel
from ..tuner.phase import adapted_layers
from .config import DashConfig, DashType
from .layer import DashLayer, own_names, with_directions


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

    dash_type: DashType
    own_prefix: str
    """What the names of the parameters along directions start with."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._name_targets_plainly(adapter_name)
        # A layer whose change cannot be read is found here, and not after the pre-launch.
        name, layer = next(iter(adapted_layers(model, adapter_name).items()))
        if not layer.merged and not any(tensor.is_meta for tensor in layer.parameters()):
            try:
                layer.learned_change(adapter_name)
            except ValueError as error:
                raise ValueError(f"{name} cannot be given directions: {error}") from None

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
        base = target
        if isinstance(target, DashLayer) and isinstance(target, self.tuner_layer_cls):
            base = target.get_base_layer()
        elif isinstance(target, BaseTunerLayer):
            raise ValueError(
                f"{current_key} already carries adapters of type {type(target).__module__}.{type(target).__name__}; "
                "directions cannot be added to them. Merge or unload them first, or use a fresh model."
            )
        reason = unsupported(base)
        if is_quantized(base):
            reason = (
                f"its weight is quantized ({type(base).__name__}), and what another method changes is read from a "
                "merged copy of it; load the base model in bfloat16, or use TsdConfig, which takes quantized weights"
            )
        if reason:
            raise ValueError(
                f"{current_key} cannot be given directions: {reason}. "
                f"Leave it out of target_modules, or name it in exclude_modules=[{current_key!r}]."
            )
        # The method's own configuration: one of its fields may have the name of one of ours (OFT's eps).
        super()._create_and_replace(
            config.peft, adapter_name, target, target_name, parent, current_key=plain_name(current_key), **kwargs
        )
        layer = getattr(parent, target_name)
        if isinstance(layer, BaseTunerLayer):
            with_directions(layer, self.own_prefix).add_directions(adapter_name, config)

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, DashLayer)]
        scalars = [parameter for layer in layers for parameter in layer.dash_scalars.parameters()]
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
        state_dict = cls._state_to_save(model, config, adapter_name, state_dict)
        state = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # Some methods save what is on a list of their own.
        own = tuple(f".{name}.{adapter_name}." for name in own_names(cls.own_prefix))
        return {**state, **{key: tensor for key, tensor in state_dict.items() if any(name in key for name in own)}}

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
        # The class was made at run time, and cannot be found by its name.
        return _empty, (self.dash_type,), vars(self)


def make_tuner(kind: DashType) -> type[DashModel]:
    """The tuner of a method of PEFT's, with directions."""
    tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[kind.name]
    names: dict[str, Any] = {"__module__": __name__, "dash_type": kind, "own_prefix": tuner.prefix}
    if kind.name == "ADALORA":
        # It takes all that starts so for factors whose rank it allocates; and its allocator is on the tuner, which
        # inject_adapter_in_model would lose.
        names |= {"own_prefix": "", "uses_shared_state": True}
    return type(f"Dash{tuner.__name__}", (DashModel, tuner), names)


def _empty(kind: DashType) -> Any:
    cls: Any = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    return cls.__new__(cls)
