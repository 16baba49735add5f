"""The command `peft-tsd`."""

from .main import main

__all__ = ["main"]
