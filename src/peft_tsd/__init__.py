"""Fine-tuning along task-specific directions, as a method of Hugging Face PEFT.

LoRA-Dash, LoRA-Init and LoRA-TSD of Si et al., "Task-Specific Directions: Definition, Exploration, and Utilization in
Parameter Efficient Fine-Tuning", arXiv 2409.01035. (Not the tangent-space spectral descent that shares the acronym.)
Importing the package registers the method with PEFT.
"""

import importlib
from importlib.metadata import version
from typing import Any

from . import registration as registration  # first: from here on nothing is loaded unchecked
from .dash.config import DashConfig
from .dash.model import DashModel
from .errors import AdapterError, InputError, TransitionError
from .export import ExportReport, export_lora
from .schedule import TsdCallback, advance, identify_from_gradients
from .tuner.checking import check_adapter
from .tuner.config import TsdConfig
from .tuner.model import TsdModel
from .tuner.phase import PrelaunchWarning
from .tuner.table import Directions, LayerDirections
from .tuner.within import directions_in

__version__ = version("peft-tsd")

__all__ = [
    "AdapterError",
    "DashConfig",
    "DashModel",
    "Directions",
    "ExportReport",
    "InputError",
    "LayerDirections",
    "PrelaunchWarning",
    "TransitionError",
    "TsdCallback",
    "TsdConfig",
    "TsdModel",
    "advance",
    "check_adapter",
    "directions_in",
    "export_lora",
    "identify_from_gradients",
]


def __getattr__(name: str) -> Any:
    # `peft_tsd.explore` needs no import of its own, and costs nothing before it is used.
    if name == "explore":
        return importlib.import_module("peft_tsd.explore")
    raise AttributeError(f"module 'peft_tsd' has no attribute {name!r}")
