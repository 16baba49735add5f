"""The disk of a run: room is asked for before anything is written, and one that is full is said in one line."""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from safetensors import SafetensorError

from ..errors import InputError
from ..recipes.shared import RunRecipe
from .folder import RunFolder


@contextmanager
def room_in(folder: RunFolder) -> Iterator[None]:
    """Within it, an error of writing that finds no room is said in one line, and what was written half is removed.

    Raises:
        InputError: The disk is full.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors gives the reason as text, and torch's writer none.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not (full or re.search(r"No space left|quota exceeded|File too large|inline_container", str(error))):
            raise
        free = shutil.disk_usage(folder.path).free
        with suppress(InputError, OSError):
            folder.drop_incomplete()
        last = folder.last_complete()
        kept = f"{last[0].name} is whole" if last else "there is no checkpoint yet"
        raise InputError(
            f"output={str(folder.path)!r}: no room to write, with {free / 2**20:,.1f} MiB free on its disk; {kept}; "
            "free some or raise the quota, and resume=true continues the run"
        ) from None


def check_disk(recipe: RunRecipe, folder: RunFolder, trained: int, steps: int) -> None:
    """Refuse a run whose files, with `trained` numbers, would not fit.

    Raises:
        InputError: With what is needed and what is free.
    """
    # A saved adapter and its plain export have, at most, A and B, what they had learned before a restart, and the
    # directions with a start along them.
    r, slots = recipe.adapter.r, recipe.directions.settings.direction_slots
    adapter = 4 * trained * ((2 * r + max(r, slots)) / r if recipe.uses_directions else 1)
    # A new checkpoint is written before an old one goes, and holds Adam's two moments too.
    checkpoints = min(recipe.training.keep_checkpoints + 1, -(-steps // recipe.training.save_every))
    needed = int(checkpoints * (adapter + 8 * trained) + 2 * adapter)
    needed += 16 * 2**20  # the tokenizer, the log and the metrics
    where = folder.path
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free < needed:
        raise InputError(
            f"output={str(folder.path)!r} needs about {needed / 2**20:,.0f} MiB and {str(where)!r} has "
            f"{free / 2**20:,.0f} MiB free; free some, or name a folder on another disk with output=FOLDER"
        )
