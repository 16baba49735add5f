"""From the name in a recipe to a model and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..errors import InputError, did_you_mean, one_line
from .finding import Source
from .packed import keep_as_stored


def load_config(source: Source, **fields: Any) -> PretrainedConfig:
    """The model's configuration, with `fields` (a classifier's labels) set."""
    with _one_line_errors(source):
        config: PretrainedConfig = AutoConfig.from_pretrained(source.name, **source.options, **fields)
    return config


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The model's tokenizer, which has a padding token."""
    with _one_line_errors(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source.name, **source.options)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"model.name={source.name!r}: its tokenizer has neither a pad nor an end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_skeleton(config: PretrainedConfig, auto_class: Any, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model without its weights: module names and shapes, known before a weight is read or fetched."""
    with torch.device("meta"):
        try:
            skeleton: PreTrainedModel = auto_class.from_config(config, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise InputError(one_line(error)) from None
    return skeleton


def load_model(
    source: Source, config: PretrainedConfig, auto_class: Any, dtype: str, quantization: str | None = None
) -> PreTrainedModel:
    """The model with its weights, on the CPU (a quantized one: where it will be used), in evaluation mode.

    A GGUF file's weights are de-quantized, and the model is an ordinary one afterwards: it can be trained and saved.
    One that was saved quantized is loaded as it is.

    Args:
        source: Where it is.
        config: Its configuration.
        auto_class: The transformers class for the task.
        dtype: Of its weights, or what quantized ones are computed with.
        quantization: `bnb-4bit` or `bnb-8bit`; none by default.

    Raises:
        InputError: It cannot be loaded, or files lack a part of it; the new head of a classifier is none.
    """
    options = dict(source.options)
    classifies = auto_class is transformers.AutoModelForSequenceClassification
    if classifies:
        # A model that was fine-tuned on other labels has a head of another size; ours is new.
        options["ignore_mismatched_sizes"] = True
    if "gguf_file" in options and hasattr(transformers, "GgufConfig"):
        # Where a kernel for packed weights is installed they would stay packed, and no layer could be adapted.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    if quantization is not None:
        if getattr(config, "quantization_config", None) is not None:
            raise InputError(
                f"model.quantization={quantization} is for full weights, and those of {source.name!r} are quantized "
                "already; remove model.quantization, and they are used as they are"
            )
        options["quantization_config"] = _bitsandbytes(quantization, getattr(torch, dtype))
    with _one_line_errors(source):
        model: PreTrainedModel
        model, found = auto_class.from_pretrained(
            source.name, config=config, dtype=getattr(torch, dtype), output_loading_info=True, **options
        )
        missing = sorted(found["missing_keys"])
        if missing and not classifies:
            # transformers would have it made up of random numbers.
            raise ValueError(f"its files lack {len(missing)} of its weights, such as {missing[0]}")
    if "gguf_file" in options:
        _clear_quantized_mark(model)
    # Before the first scores are taken, so that those after training are of the same weights.
    keep_as_stored(model)
    return model.eval()


def check_target_modules(
    names: Sequence[str] | str | None, skeleton: nn.Module, key: str = "adapter.target_modules"
) -> None:
    """Refuse a name that no module has. A string is `all-linear` or a regular expression.

    Args:
        names: What to adapt.
        skeleton: The model, its weights read or not.
        key: What the user gave them as, for error messages.

    Raises:
        InputError: With the nearest name there is.
    """
    modules = [name for name, module in skeleton.named_modules() if name and not list(module.children())]
    endings = {name.rpartition(".")[2] for name in modules} - {""}
    if isinstance(names, str):
        try:
            found = names == "all-linear" or any(re.fullmatch(names, name) for name in modules)
        except re.error as error:
            raise InputError(f"{key}={names!r} is not a regular expression: {error}") from None
        if not found:
            raise InputError(f"{key}={names!r} matches no module{did_you_mean(names, endings)}")
        return
    for name in names or ():
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise InputError(f"{key}: no module of the model is named {name!r}{did_you_mean(name, endings)}")


def _bitsandbytes(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _clear_quantized_mark(model: PreTrainedModel) -> None:
    """Let a de-quantized model say so: the mark it keeps would have it refused by `save_pretrained` and `Trainer`."""
    if not all(parameter.is_floating_point() for parameter in model.parameters()):
        raise InputError("the GGUF file's weights stayed quantized; give a model that can be de-quantized")
    model.hf_quantizer = None
    for holder, mark in (
        (model, "is_quantized"),
        (model, "quantization_method"),
        (model.config, "quantization_config"),
    ):
        if mark in vars(holder):
            delattr(holder, mark)


@contextmanager
def _one_line_errors(source: Source) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged file makes its readers stumble in any way
        name = str(Path(source.name) / source.options["gguf_file"]) if "gguf_file" in source.options else source.name
        raise InputError(f"cannot load the model {name!r}: {one_line(error)}") from None
