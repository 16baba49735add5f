"""What `explore` raises where something given to it cannot be used."""


class ExploreError(ValueError):
    """Something the user gave cannot be explored. The message is one line: what was given, and what to do."""


def one_line(error: BaseException) -> str:
    """The message of an error from elsewhere, on one line and not too long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."
