"""Makes the methods known to PEFT: what `peft.utils.register_peft_method` does, for types that are no members of
PEFT's own enumeration. And has every adapter's files checked before a configuration is loaded from them.
"""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from .dash.config import DashConfig, DashType
from .dash.model import make_tuner
from .tuner.checking import check_if_local
from .tuner.config import TsdConfig, TsdType
from .tuner.model import TsdModel
from .tuner.settings import DirectionSettings

DirectionSettings.check_folder = staticmethod(check_if_local)

PEFT_TYPE_TO_CONFIG_MAPPING[TsdType.TSD] = TsdConfig
PEFT_TYPE_TO_TUNER_MAPPING[TsdType.TSD] = TsdModel
PEFT_TYPE_TO_PREFIX_MAPPING[TsdType.TSD] = TsdModel.prefix

for dash_type in DashType:
    PEFT_TYPE_TO_CONFIG_MAPPING[dash_type] = DashConfig
    PEFT_TYPE_TO_TUNER_MAPPING[dash_type] = make_tuner(dash_type)
    # The method's prefix, by which PEFT and transformers know what belongs to an adapter.
    PEFT_TYPE_TO_PREFIX_MAPPING[dash_type] = PEFT_TYPE_TO_PREFIX_MAPPING[dash_type.name]
