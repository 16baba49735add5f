"""How a fine-tuned model changed the weights of its base, one weight at a time.

Three sources: another checkpoint (the difference); a LoRA or TSD adapter (its low-rank factors, straight from the
file); and any other adapter of PEFT's (the layer as PEFT builds it, merged into its real base weight, less that
weight).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import LoraConfig, PeftConfig, PeftModel, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..directions.change import LowRank
from ..directions.spectrum import as_double
from ..errors import one_line
from ..export.factors import lora_scaling, stack_layer
from ..files.adapters import PICKLED, PREFIX, WEIGHTS
from ..models.finding import Source
from ..tuner.checking import check_weights
from ..tuner.config import REFUSED_FIELDS, TsdConfig
from ..tuner.held import used_columns
from ..tuner.inits import moves_base, rounds_base
from ..tuner.settings import DirectionSettings
from .errors import ExploreError
from .skeleton import Weight
from .weights import Checkpoint, SafetensorsFiles, fetch


class Changes(Protocol):
    """The changes of one fine-tuned model."""

    @property
    def kind(self) -> str:
        """`"checkpoint"`, or the adapter's PEFT type."""

    @property
    def along(self) -> Along | None:
        """The directions that it was trained along, if any."""

    def problem(self, weight: Weight) -> str | None:
        """Why the change of `weight` is not known, or None where it is."""

    def of(self, weight: Weight, base: Tensor) -> Tensor | LowRank:
        """ΔW of `weight`, dense in float64 or as factors (B, A, scaling), on the device of `base`.

        Args:
            weight: Which one; `problem` must be None.
            base: W, shape (out, in).

        Raises:
            ExploreError: A file is damaged.
        """


class Along:
    """The directions that an adapter was trained along, or started from.

    Attributes:
        method: Its name, such as `"lora-tsd"`.
        source: Whose they are: `"weight"` or `"gradient"`.
    """

    def __init__(self, config: DirectionSettings, files: SafetensorsFiles) -> None:
        self.method, self.source = config.method, config.direction_source
        self._files = files

    def gradient(self, weight: Weight) -> tuple[Tensor, Tensor] | None:
        """The directions of the gradient of `weight`, (out, n) and (in, n); None where they are not known."""
        held = [key.removesuffix(".u") for key in self._files if _holds(key, weight.name)]
        if self.source != "gradient" or not held:
            return None
        u, v = (self._files[f"{held[0]}.{part}"] for part in "uv")
        used = used_columns(u)
        return (u[:, used], v[used].mT) if used.any() else None


def _along(config: PeftConfig, files: SafetensorsFiles) -> Along | None:
    """None for an adapter without directions, and for one in pre-launch."""
    if not isinstance(config, DirectionSettings):
        return None
    made = any(bool(files[key].ge(0).any()) for key in files if key.endswith("directions.identified_at"))
    return Along(config, files) if made else None


def _holds(key: str, module: str) -> bool:
    return key.startswith(f"{PREFIX}{module}.") and key.endswith("directions.u")


class OfCheckpoint:
    """The difference to another checkpoint."""

    kind = "checkpoint"
    along = None

    def __init__(self, tuned: Checkpoint) -> None:
        self._tuned = tuned

    def problem(self, weight: Weight) -> str | None:
        return self._tuned.problem(weight)

    def of(self, weight: Weight, base: Tensor) -> Tensor:
        return as_double(self._tuned.read(weight).to(base.device)) - as_double(base)


class OfLora:
    """The low-rank factors of a LoRA or TSD adapter, and the weights it holds as a whole."""

    def __init__(self, config: LoraConfig, files: SafetensorsFiles, name: str, weights: Sequence[Weight]) -> None:
        """
        Raises:
            ExploreError: The adapter is not for this base.
        """
        self.kind = _kind(config)
        self.along = _along(config, files)
        self._config = config
        self._files = files
        self._name = name
        self._layers = {_adapted_module(key): key.removesuffix(".lora_A.weight") for key in files if ".lora_A." in key}
        self._whole = whole_weights(files, weights)
        self._embeddings = {_adapted_module(key) for key in files if ".lora_embedding_A" in key}
        for weight in weights:
            if weight.name in self._layers and (reason := self._misfit(weight)):
                raise ExploreError(f"{name} is an adapter for another base: {reason}")

    @property
    def modules(self) -> set[str]:
        """The modules the adapter changes."""
        return set(self._layers) | set(self._whole) | self._embeddings

    def problem(self, weight: Weight) -> str | None:
        known = weight.name in self._layers or weight.name in self._whole
        return None if known else f"not adapted by {self._name}"

    def of(self, weight: Weight, base: Tensor) -> Tensor | LowRank:
        if weight.name in self._whole:
            return as_double(weight.matrix(self._files[self._whole[weight.name]]).to(base.device)) - as_double(base)
        layer = self._layers[weight.name]
        if isinstance(self._config, TsdConfig):
            try:
                a, b, _ = stack_layer(self._config, self._files, layer, weight.name)
            except ValueError as error:
                raise ExploreError(f"{self._name}: {one_line(error)}") from None
            scaling = 1.0
        else:
            a, b = (self._files[f"{layer}.lora_{part}.weight"].flatten(1) for part in "AB")
            scaling = lora_scaling(self._config, weight.name, rank=a.shape[0])
        return b.to(base.device), a.to(base.device), scaling

    def _misfit(self, weight: Weight) -> str | None:
        layer = self._layers[weight.name]
        try:
            a, b = (self._files.shape(f"{layer}.lora_{part}.weight") for part in "AB")
        except KeyError:
            return f"{weight.name} has no lora_B"
        shape = (b[0], torch.Size(a[1:]).numel())
        return None if shape == weight.shape else f"its {weight.name} changes {shape}, and the base has {weight.shape}"


class OfPeft:
    """Any adapter that PEFT can merge: the merged weight less the base weight, each layer built when it is asked for.

    The adapter is put on a model whose weights take up no memory. One layer at a time gets a copy of its real base
    weight, is merged in float64, and is dropped.
    """

    def __init__(
        self, config: PeftConfig, files: SafetensorsFiles, name: str, model: PreTrainedModel, weights: Sequence[Weight]
    ) -> None:
        """
        Raises:
            ExploreError: PEFT cannot put the adapter on this model, or merge it; it does not fit; or its files and
                configuration do not say all of its change.
        """
        self.kind = _kind(config)
        self.along = _along(config, files)
        self._name = name
        self._files = files
        self._whole = whole_weights(files, weights)
        state = {key: files[key] for key in files if _whole_module(key) not in self._whole}
        config = copy.deepcopy(config)
        config.inference_mode = True
        config.modules_to_save = None
        self._layers = _tuner_layers(config, state, name, model, seed=0)
        _check_determined(self._layers, _tuner_layers(config, state, name, model, seed=1), self.kind, name)
        # A method that PEFT cannot merge is found here, and not after hours.
        for weight in [weight for weight in weights if weight.name in self._layers][:1]:
            self.of(weight, torch.ones(weight.shape))

    @property
    def modules(self) -> set[str]:
        """The modules the adapter changes."""
        return set(self._layers) | set(self._whole)

    def problem(self, weight: Weight) -> str | None:
        known = weight.name in self._layers or weight.name in self._whole
        return None if known else f"not adapted by {self._name}"

    def of(self, weight: Weight, base: Tensor) -> Tensor:
        if weight.name in self._whole:
            return as_double(weight.matrix(self._files[self._whole[weight.name]]).to(base.device)) - as_double(base)
        layer = copy.deepcopy(self._layers[weight.name])
        stored = as_double(weight.tensor(base))
        layer.get_base_layer().weight = nn.Parameter(stored.clone(), requires_grad=False)
        layer.to(base.device, torch.float64)
        try:
            with torch.no_grad():
                layer.merge(safe_merge=False, adapter_names=["default"])
        except (NotImplementedError, ValueError, TypeError, RuntimeError) as error:
            raise ExploreError(
                f"{self._name}: PEFT cannot merge a {self.kind} adapter into {weight.name}, so that there is no "
                f"change of the weight to explore: {one_line(error)}"
            ) from None
        # Asked for again: a merge may put another module in the base layer's place.
        return weight.matrix(layer.get_base_layer().weight.detach() - stored)


def open_adapter(
    source: Source, config: PeftConfig, name: str, model: PreTrainedModel, weights: Sequence[Weight]
) -> OfLora | OfPeft:
    """The changes of an adapter.

    Args:
        source: Where its files are.
        config: Its configuration.
        name: As it was given, for error messages.
        model: The base model; its own weights may be on the meta device.
        weights: The weights of the base that are to be measured.

    Raises:
        ExploreError: It has no change of weights, one that its files do not tell, or is not for this base.
    """
    kind = _kind(config)
    if config.is_prompt_learning or not issubclass(PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type], BaseTuner):
        raise ExploreError(
            f"{name} is an adapter of type {kind}, which changes what the model is given and not its weights; "
            "there are no directions to explore"
        )
    file = fetch(source, WEIGHTS, name)
    if file is None:
        pickled = fetch(source, PICKLED, name) is not None
        hint = f" ({PICKLED} is pickled and not read: load the adapter with PEFT and save it again)"
        raise ExploreError(f"{name} has no {WEIGHTS}{hint if pickled else '; get the whole adapter'}")
    check_weights(file, config)
    files = SafetensorsFiles([file])
    grouped = {n for n, module in model.named_modules() if isinstance(module, nn.Conv2d) and module.groups > 1}
    low_rank = (
        kind in ("LORA", "TSD")  # by its type: AdaLoRA's configuration is one of LoRA's too
        and not any(getattr(config, field, None) for field in REFUSED_FIELDS)
        and not grouped.intersection(map(_adapted_module, files))  # whose B·A has another shape than the kernel
    )
    if isinstance(config, LoraConfig) and not isinstance(config, TsdConfig):
        init = config.init_lora_weights
        if moves_base(init) or rounds_base(init):
            raise ExploreError(
                f"{name} was trained with init_lora_weights={init!r}, which takes a part out of the base weight that "
                "its files do not hold; save it with path_initial_model_for_weight_conversion as a plain LoRA"
            )
    if getattr(config, "layer_replication", None):
        raise ExploreError(
            f"{name} has layer_replication={config.layer_replication!r}: its layers are not those of the base; "
            "merge it with PEFT, save the model, and give that as the base of further ones"
        )
    changes: OfLora | OfPeft = (
        OfLora(config, files, name, weights) if low_rank else OfPeft(config, files, name, model, weights)
    )
    known = {module for module, _ in model.named_modules()}
    foreign = sorted(changes.modules - known)
    if foreign and not changes.modules & known:
        raise ExploreError(
            f"{name} is an adapter for another base: it adapts {foreign[0]!r}, and {type(model).__name__} has no such "
            "module"
        )
    if not changes.modules:
        raise ExploreError(f"{name} holds no change of a weight; there are no directions to explore")
    return changes


def whole_weights(files: SafetensorsFiles, weights: Sequence[Weight]) -> dict[str, str]:
    """The keys of the weights that an adapter holds as a whole, such as PEFT's modules_to_save, by module."""
    keys = {_whole_module(key): key for key in files}
    return {weight.name: keys[weight.name] for weight in weights if weight.name in keys}


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _adapted_module(key: str) -> str:
    """The module in the base model that a tensor of a LoRA belongs to."""
    return key.removeprefix(PREFIX).partition(".lora_")[0]


def _whole_module(key: str) -> str:
    """The module in the base model whose weight a tensor of an adapter is, if it is one."""
    return key.removeprefix(PREFIX).removesuffix(".weight")


def _tuner_layers(
    config: PeftConfig, state: dict[str, Tensor], name: str, model: PreTrainedModel, seed: int
) -> dict[str, Any]:
    """The layers of an adapter as PEFT builds and loads them, on a model without weights."""
    hollow = _hollow(model, seed)
    untouched = {parameter.data_ptr() for parameter in hollow.parameters()}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.simplefilter("ignore")  # PEFT's advice is for training
        try:
            peft_model = PeftModel(hollow, copy.deepcopy(config), autocast_adapter_dtype=False)
            loaded = set_peft_model_state_dict(peft_model, state, "default")
        except (ValueError, RuntimeError, KeyError, NotImplementedError, TypeError, AttributeError) as error:
            raise ExploreError(
                f"{name} does not fit the base (is it an adapter for another one?): {one_line(error)}"
            ) from None
    if loaded.unexpected_keys:
        raise ExploreError(
            f"{name} is an adapter for another base: {type(model).__name__} has no place for its "
            f"{loaded.unexpected_keys[0]!r}"
        )
    layers = {}
    for module_name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            weight = getattr(module.get_base_layer(), "weight", None)
            if weight is not None and weight.data_ptr() not in untouched:
                raise ExploreError(
                    f"{name}: a {_kind(config)} adapter takes a part out of the base weight of {module_name} that its "
                    "files do not hold; merge it with PEFT, save the model, and give that"
                )
            layers[module_name] = module.eval()
    return layers


def _hollow(model: PreTrainedModel, seed: int) -> nn.Module:
    """A copy of `model` whose weights are one random row, repeated: of full shape, and without memory."""
    hollow: nn.Module = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for module in hollow.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            row = torch.randn(parameter.shape[1:], generator=generator)
            setattr(module, name, nn.Parameter(row.expand(parameter.shape), requires_grad=False))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.zeros((), dtype=buffer.dtype).expand(buffer.shape))
    return hollow


def _check_determined(one: dict[str, Any], other: dict[str, Any], kind: str, name: str) -> None:
    """Refuse an adapter part of which was drawn at random, or made from the base weights, and not saved: two builds
    from different seeds and weights then differ."""
    for module in one:
        theirs = dict(_own_tensors(other[module]))
        for key, tensor in _own_tensors(one[module]):
            if tensor.shape != theirs[key].shape or not torch.equal(tensor, theirs[key]):
                raise ExploreError(
                    f"{name}: the files of this {kind} adapter do not hold {key!r} of {module}, without which its "
                    "change is not known; merge it with PEFT, save the model, and give that"
                )


def _own_tensors(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors of an adapter's layer by name, also those it holds outside of its parameters and buffers."""
    for name, module in layer.named_modules():
        if name.partition(".")[0] == "base_layer":
            continue  # random here
        for attribute, value in vars(module).items():
            if attribute != "_modules":
                inner = attribute.removeprefix("_parameters").removeprefix("_buffers")
                yield from _tensors_in(value, ".".join(filter(None, [name, inner])))


def _tensors_in(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors_in(inner, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            yield from _tensors_in(inner, f"{name}.{i}")
