"""A model without its weights, and the weights of it that have directions.

The model is built on the meta device from its configuration, so that names, shapes and the way a module stores its
weight are known before a weight is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import did_you_mean, one_line
from ..models.matrix import MATRICES, as_matrix, as_stored, is_transposed, matrix_shape
from .errors import ExploreError


@dataclass(frozen=True)
class Weight:
    """A weight to measure.

    Attributes:
        name: The name of its module in the model.
        parameters: The names of its parameter: more than one where it is tied, and a checkpoint has it under any.
        stored: The shape it is stored in.
        transposed: Whether it is stored as (in, out), as that of a Conv1D.
    """

    name: str
    parameters: tuple[str, ...]
    stored: tuple[int, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in); of a convolution (out, in/groups·kh·kw)."""
        return matrix_shape(self.stored, self.transposed)

    def matrix(self, tensor: Tensor) -> Tensor:
        """The stored tensor as a matrix (out, in): a view of it."""
        return as_matrix(tensor, self.transposed)

    def tensor(self, matrix: Tensor) -> Tensor:
        """A matrix (out, in) as it is stored; the inverse of `matrix`."""
        return as_stored(matrix, self.stored, self.transposed)


def build(config: PretrainedConfig, name: str) -> PreTrainedModel:
    """The model of `config` on the meta device, of the class its checkpoint was saved from where that is known.

    Args:
        config: The model's configuration.
        name: As the model was given, for error messages.

    Raises:
        ExploreError: There is no class for it.
    """
    architecture = (config.architectures or [""])[0]
    model_class: Any = getattr(transformers, architecture, None)
    # Attention kernels do not matter here, and the one the configuration names may not be installed.
    with torch.device("meta"):
        try:
            if model_class is not None:
                model: PreTrainedModel = model_class._from_config(config, attn_implementation="eager")
            else:
                known = type(config) in transformers.AutoModelForCausalLM._model_mapping
                auto = transformers.AutoModelForCausalLM if known else transformers.AutoModel
                model = auto.from_config(config, attn_implementation="eager")
        except (ValueError, ImportError, AttributeError, TypeError) as error:
            raise ExploreError(f"{name}: no model can be built from its configuration: {one_line(error)}") from None
    return model


def select(model: PreTrainedModel, modules: Sequence[str] | None = None) -> tuple[tuple[Weight, ...], dict[str, str]]:
    """The weights of `model` to measure, in the model's order, and the names of others with the reason why not.

    Args:
        model: The model, on any device.
        modules: Names of modules, or their endings (`q_proj`), as PEFT's target_modules. By default every Linear,
            Conv1D and Conv2d but the output head, as PEFT's `"all-linear"`.

    Raises:
        ExploreError: One of `modules` names nothing that can be measured; the message has the nearest name.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    if not heads:
        heads = {name for name in SEQ_CLS_HEAD_NAMES if hasattr(model, name)}
    found: dict[int, Weight] = {}
    left_out: dict[str, str] = {}
    for name, module in model.named_modules():
        wanted = modules is None or any(name == ending or name.endswith(f".{ending}") for ending in modules)
        if not isinstance(module, MATRICES):
            if wanted and not isinstance(module, nn.Embedding):
                left_out.update(_matrices_of(name, module))
        elif wanted and modules is None and name in heads:
            left_out[name] = "the output head"
        elif wanted:
            weight = module.weight
            found.setdefault(
                id(weight),
                Weight(name, tuple(owners[id(weight)]), tuple(weight.shape), is_transposed(module)),
            )
    measured = tuple(found.values())
    for ending in modules or ():
        if not any(weight.name == ending or weight.name.endswith(f".{ending}") for weight in measured):
            endings = {weight.name.rpartition(".")[2] for weight in select(model)[0]}
            raise ExploreError(
                f"modules: no Linear, Conv1D or Conv2d is named {ending!r}{did_you_mean(ending, endings)}"
            )
    return measured, left_out


def _matrices_of(name: str, module: nn.Module) -> dict[str, str]:
    """Parameters of a module of another type that are more than vectors, such as the stacked weights of experts."""
    reason = f"in a {type(module).__name__}: only Linear, Conv1D and Conv2d weights have directions here"
    held = module.named_parameters(recurse=False)
    return {f"{name}.{parameter}".lstrip("."): reason for parameter, value in held if value.ndim > 1}
