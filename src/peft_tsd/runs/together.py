"""How processes that were started together end together: the first error is said, once, and ends all of them.

A process that fails while the others wait for it, or compute, cannot tell them by what they compute with. So each has
a thread that waits for one word in the store by which they met. Whoever fails first takes the right to speak, says its
error and leaves its exit code there; the others end with the same code, and nothing to say. What is half-written then
is as after any sudden end (`folder`).
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from transformers.utils import logging as transformers_logging

from ..distributed.sharded import is_main_process, world
from ..errors import one_line
from .log import file_only
from .processes import ElsewhereError, is_of_another, join

FAREWELL = 20
"""Seconds for which a process waits for the last of the others, so that each hears the word."""


class _Word:
    """The word that ends all, in the store by which they met."""

    def __init__(self) -> None:
        # Each launch of an elastic job is told apart.
        name = f"peft-tsd {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        where = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection that waits is of no other use: the thread has its own.
        self._said, self._heard = (
            PrefixStore(name, TCPStore(*where, is_master=False, wait_for_workers=False)) for _ in range(2)
        )
        self.over = False
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        try:
            self._heard.wait(["code"], timedelta(days=365))
            code, error = int(self._heard.get("code")), self._heard.get("error").decode()
        except Exception:  # who kept the store is gone
            code, error = 1, "another process ended"
        if self.over:
            return
        if is_main_process():
            file_only(error)
        self._leave(self._heard)
        _exit(code)

    def end(self, error: BaseException, say: Callable[[BaseException], int]) -> int:
        """Have `error` end all, and return the exit code, the same in every process.

        Args:
            error: This process's. Where another one has failed before, it goes unsaid.
            say: Says it, and gives the exit code.
        """
        self.over = True
        try:
            if not isinstance(error, ElsewhereError) and self._said.add("failed", 1) == 1:
                code = say(error)
                self._said.set("error", one_line(error))
                self._said.set("code", str(code))
            else:
                self._said.wait(["code"], timedelta(seconds=FAREWELL))
                code = int(self._said.get("code"))
            self._leave(self._said)
        except dist.DistError:
            return 1
        return code

    def close(self) -> None:
        """Nothing is to be said any more, in any process."""
        self.over = True
        self._leave(self._said)

    @staticmethod
    def _leave(store: Store) -> None:
        """Be gone; the main process, which may keep the store, waits for the others."""
        rank, size = world()
        try:
            here = store.add("gone", 1)
            until = time.monotonic() + FAREWELL
            while rank == 0 and here < size and time.monotonic() < until:
                time.sleep(0.05)
                here = store.add("gone", 0)
        except dist.DistError:
            pass


def together(work: Callable[[], int], say: Callable[[BaseException], int]) -> int:
    """Do `work` as one of several processes, and end this one with its exit code; return one where they did not meet.

    Args:
        work: In every process.
        say: Says an error of it on the screen, and gives its exit code.
    """
    try:
        join()
    except (ValueError, RuntimeError) as error:
        return say(error)
    if not is_main_process():
        logging.disable()
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
    word = _Word()
    try:
        code = work()
        dist.barrier()
        word.close()
        atexit._run_exitfuncs()  # of trackers, which finish what they upload
    except Exception as error:
        code = word.end(_gone(error), say)
    return _exit(code)


def _exit(code: int) -> NoReturn:
    """End at once: what waits for others in the background would not let the interpreter end, or would abort it."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _gone(error: Exception) -> Exception:
    """An error of waiting for a process that is no more, in words of our own."""
    if is_of_another(error) and not isinstance(error, ElsewhereError):
        return ProcessGoneError(
            "another process of this run has ended without a word; the launcher may say why. resume=true continues "
            "from the last checkpoint"
        )
    return error


class ProcessGoneError(RuntimeError):
    """One of several processes was ended from outside, and the run with it."""
