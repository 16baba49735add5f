"""Where things lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""

DATA = ROOT.parent / "shared" / "data"
"""Public data, which are not part of the project; tests that need them skip where they are absent."""
