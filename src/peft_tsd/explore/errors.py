"""What `explore` raises where something given to it cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import InputError


class ExploreError(InputError):
    """Something the user gave cannot be explored. The message is one line: what was given, and what to do."""


@contextmanager
def explore_errors() -> Iterator[None]:
    """What the rooms below refuse (a model, an adapter's files) as the one error that `explore` promises."""
    try:
        yield
    except ExploreError:
        raise
    except InputError as error:
        raise ExploreError(*error.args) from None
