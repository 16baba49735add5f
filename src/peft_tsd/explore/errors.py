"""What `explore` raises where something given to it cannot be used."""


class ExploreError(ValueError):
    """Something the user gave cannot be explored. The message is one line: what was given, and what to do."""
