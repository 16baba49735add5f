"""From pre-launch over the transition to the dash."""

from .callback import TsdCallback
from .stepping import advance, identify_from_gradients

__all__ = ["TsdCallback", "advance", "identify_from_gradients"]
