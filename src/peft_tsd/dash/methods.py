"""Which methods of PEFT can be given directions, and why the others cannot. docs/methods.md is the whole list."""

from __future__ import annotations

from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING

from ..tuner.config import REFUSED_FIELDS
from ..tuner.inits import LEAVE_BASE

REFUSED = {
    "BEFT": "it trains biases, and changes no weight",
    "LILY": "the factors a layer uses depend on the input, so that no one change of the weight exists",
    "LN_TUNING": "it trains copies of norms, whose weights are vectors and have no directions",
    "POLY": "the skills a layer uses depend on the task of each row, so that no one change of the weight exists",
    "SHADOW": "it changes what whole blocks are given, and no weight",
    "TRAINABLE_TOKENS": "it trains rows of an embedding, which are looked up and not multiplied with",
    "XLORA": "it mixes finished LoRAs anew for each input, so that no one change of the weight exists",
}

# Of the fields of LoraConfig that TsdConfig refuses, those with which a layer still has one change of its weight.
_ONE_CHANGE = ("use_dora", "use_bdlora", "velora_config")


def refusal(config: PeftConfig) -> str | None:
    """Why the method of `config` cannot be given directions, in one line; None where it can."""
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    if peft_type not in PeftType.__members__:
        return "it is not one of PEFT's own methods"
    if peft_type in REFUSED:
        return REFUSED[peft_type]
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "it changes what the model is given, and no weight"
    if not has_layers(peft_type):
        return "it has no layers of its own, so that there is no change of a weight to read"
    if isinstance(config, LoraConfig):
        for name, reason in REFUSED_FIELDS.items():
            if name not in _ONE_CHANGE and getattr(config, name):
                return f"with {name}={getattr(config, name)!r}, {reason}"
        if peft_type == "LORA" and config.init_lora_weights not in (*LEAVE_BASE, "mica"):
            return (
                f"init_lora_weights={config.init_lora_weights!r} has PEFT write to the base weight; "
                f"TsdConfig(method='lora-dash', init_lora_weights=...) takes such a start without"
            )
    return None


def has_layers(peft_type: str) -> bool:
    """Whether PEFT's method `peft_type` puts layers of its own around those of a model."""
    return getattr(PEFT_TYPE_TO_TUNER_MAPPING.get(peft_type), "tuner_layer_cls", None) is not None
