"""Which methods of PEFT can be given directions, and why the others cannot."""

from __future__ import annotations

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner

REFUSED: dict[str, str] = {}


def refusal(config: PeftConfig) -> str | None:
    """Why the method of `config` has no directions, in one line; None where it can have them."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind in REFUSED:
        return REFUSED[kind]
    if config.is_prompt_learning or config.is_adaption_prompt:
        return "it changes what the model is given, and no weight"
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if tuner is None or not issubclass(tuner, BaseTuner):
        return "it has no layers of its own whose change of a weight could be read"
    return None
