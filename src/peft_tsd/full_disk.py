"""What a run does where its disk is full."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError

from .errors import RecipeError
from .run_folder import RunFolder


@contextmanager
def room_in(folder: RunFolder) -> Iterator[None]:
    """Within it, an error of writing that finds no room is said in one line, and what was written half is removed.

    Raises:
        RecipeError: The disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors gives the reason as text, and torch's writer none.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (full or re.search(r"No space left|quota exceeded|File too large|inline_container", str(error))):
            raise
        free = shutil.disk_usage(folder.path).free
        with suppress(RecipeError, OSError):
            folder.drop_incomplete()
        last = folder.last_complete()
        kept = f"{last[0].name} is whole" if last else "there is no checkpoint yet"
        raise RecipeError(
            f"output={str(folder.path)!r}: no room to write, with {free / 2**20:,.1f} MiB free on its disk; {kept}; "
            "free some or raise the quota, and resume=true continues the run"
        ) from None
