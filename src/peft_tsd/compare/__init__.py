"""Comparisons: does it beat LoRA on my task, at my budget?

`plan` says which runs, `running` does them, `results` says what they came to, `tables` and `report` show it.
"""

from __future__ import annotations

from .comparing import Comparison, compare
from .plan import METHODS, Cell, Plan, make_plan
from .running import Stopped

__all__ = ["METHODS", "Cell", "Comparison", "Plan", "Stopped", "compare", "make_plan"]
