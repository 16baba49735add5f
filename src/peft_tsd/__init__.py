"""Fine-tuning along task-specific directions, as a method of Hugging Face PEFT.

LoRA-Dash, LoRA-Init and LoRA-TSD of Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in
Parameter Efficient Fine-Tuning", arXiv 2409.01035. (Not the tangent-space spectral descent that shares the acronym.)
Importing the package registers the method with PEFT.
"""

import importlib
from typing import Any

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .adapter_files import check_adapter
from .config import TsdConfig, TsdType
from .dash.config import DashConfig
from .dash.model import DashModel, register
from .export import ExportReport, export_lora
from .model import Directions, LayerDirections, PrelaunchWarning, TsdModel
from .schedule import TransitionError, TsdCallback, advance, identify_from_gradients

# What peft.utils.register_peft_method does, for a type that is no member of PEFT's own enumeration.
PEFT_TYPE_TO_CONFIG_MAPPING[TsdType.TSD] = TsdConfig
PEFT_TYPE_TO_TUNER_MAPPING[TsdType.TSD] = TsdModel
PEFT_TYPE_TO_PREFIX_MAPPING[TsdType.TSD] = TsdModel.prefix
register()

__version__ = "0.1.0"

__all__ = [
    "DashConfig",
    "DashModel",
    "Directions",
    "ExportReport",
    "LayerDirections",
    "PrelaunchWarning",
    "TransitionError",
    "TsdCallback",
    "TsdConfig",
    "TsdModel",
    "advance",
    "check_adapter",
    "export_lora",
    "identify_from_gradients",
]


def __getattr__(name: str) -> Any:
    # `peft_tsd.explore` needs no import of its own, and costs nothing before it is used.
    if name == "explore":
        return importlib.import_module("peft_tsd.explore")
    raise AttributeError(f"module 'peft_tsd' has no attribute {name!r}")
