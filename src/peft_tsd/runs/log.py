"""The log of a run: what is said on the screen goes into its file too, with the time."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import InputError
from .stopping import Interrupted

log = logging.getLogger("peft_tsd")


class _LogFile(logging.FileHandler):
    """A line that finds no room is left out: that the disk is full is said once, by whoever needs the room."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def logging_to(path: Path) -> Iterator[None]:
    handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    names = ("peft_tsd", "transformers", "peft", "py.warnings")
    for name in names:
        logging.getLogger(name).addHandler(handler)
    level = log.level
    log.setLevel(logging.INFO)
    try:
        yield
    except (Interrupted, KeyboardInterrupt):
        log.info("interrupted")
        raise
    except InputError as error:
        file_only(str(error))
        raise
    finally:
        for name in names:
            logging.getLogger(name).removeHandler(handler)
        log.setLevel(level)
        handler.close()


def file_only(message: str) -> None:
    """A line for the log alone; on the screen it would break the progress bar."""
    log.info(message, extra={"file_only": True})
