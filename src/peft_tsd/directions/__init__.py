"""Task-specific directions: the definitions of the paper, as pure functions on tensors.

They know nothing of PEFT, files or processes. See `definitions` for what the words mean.
"""

from .change import LowRank
from .definitions import (
    CoreBases,
    Selection,
    TaskSpecificDirections,
    change_rates,
    core_bases,
    core_coordinates,
    direction,
    global_coordinates,
    task_specific_directions,
)

__all__ = [
    "CoreBases",
    "LowRank",
    "Selection",
    "TaskSpecificDirections",
    "change_rates",
    "core_bases",
    "core_coordinates",
    "direction",
    "global_coordinates",
    "task_specific_directions",
]
