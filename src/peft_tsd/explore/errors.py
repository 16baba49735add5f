"""What `explore` raises where something given to it cannot be used."""

from __future__ import annotations

from ..errors import InputError


class ExploreError(InputError):
    """Something the user gave cannot be explored. The message is one line: what was given, and what to do."""
