"""Stopping a run so that it can be continued: the first Ctrl-C or SIGTERM asks, a second one stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from ..distributed.sharded import is_main_process
from .processes import gathered, highest

T = TypeVar("T")


class Interrupted(Exception):
    """A run was stopped by a signal, SIGINT (Ctrl-C) or SIGTERM; `folder` can be continued."""

    def __init__(self, folder: Path, number: int = signal.SIGINT) -> None:
        super().__init__(folder)
        self.folder = folder
        self.signal = int(number)


class Stop:
    """Whether the user asked to stop."""

    def __init__(self, folder: Path) -> None:
        self.requested: int | None = None
        """The signal that did."""
        self._folder = folder

    def agreed(self) -> bool:
        """Whether any of the processes was asked to stop, by when each has come here."""
        self.requested = highest(self.requested or 0) or None
        return self.requested is not None

    def check(self) -> None:
        """Be such a safe point, to which every process comes.

        Raises:
            Interrupted: The user asked to stop.
        """
        self.agreed()
        self.check_here()

    def check_here(self) -> None:
        """Be a safe point of this process alone, in work that is done side by side.

        Raises:
            Interrupted: It was asked to stop.
        """
        if self.requested is not None:
            raise Interrupted(self._folder, self.requested)


def side_by_side(work: Callable[[], T], within: AbstractContextManager[Any] | None = None) -> list[T]:
    """What `work` gives in each process, by its rank; every process must ask, and gets all of it.

    Args:
        work: It may be stopped in one process before it is in another.
        within: What is left after the work, and after a stop too.

    Raises:
        Interrupted: In every process, where it was stopped in any.
    """
    mine: T | None = None
    stopped: Interrupted | None = None
    with within or nullcontext():
        try:
            mine = work()
        except Interrupted as interrupted:
            stopped = interrupted
    found: list[T] = []
    for theirs, other in gathered((mine, stopped)):
        if other is not None:
            raise other
        found.append(theirs)  # type: ignore[arg-type]
    return found


@contextmanager
def interruptible(folder: Path) -> Iterator[Stop]:
    """Within it, Ctrl-C and SIGTERM ask for `folder`'s run to stop at the next safe point."""
    stop = Stop(folder)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def ask(number: int, frame: FrameType | None) -> None:
        stop.requested = number
        restore()
        again = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        if is_main_process():
            print(f"\nstopping at the next safe point; {again} once more stops at once", file=sys.stderr)

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    except KeyboardInterrupt:
        raise Interrupted(folder) from None
    finally:
        restore()
