"""What a command says, and how it ends."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import transformers

from ..distributed.sharded import is_main_process

# What a signal stopped ends with 128 + its number; UNREAD is that of SIGPIPE.
DONE, FAILED, BAD_INPUT, INTERRUPTED, UNREAD = 0, 1, 2, 130, 141


@contextmanager
def screen() -> Iterator[None]:
    """Shows what a run logs, and keeps other libraries' chatter off the screen."""
    transformers.logging.set_verbosity_error()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    logger = logging.getLogger("peft_tsd")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            # What other libraries say to each other's authors.
            warnings.simplefilter("ignore", FutureWarning)
            # Said at every save of an adapter whose base model is no folder with a config.json, such as a GGUF file.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        logger.removeHandler(handler)


def say_how_to_resume(folder: Path) -> None:
    """Once, where several processes were interrupted."""
    if not is_main_process():
        return
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        command = f"{command_name()} train {shlex.quote(near(recipe))} resume=true"
        print(f"interrupted; to continue:\n  {command}", file=sys.stderr)
    else:
        print("interrupted before anything was written", file=sys.stderr)


def command_name() -> str:
    """How one would call this program again: by its name where the shell finds it, or by its path."""
    program = Path(sys.argv[0])
    return "peft-tsd" if shutil.which("peft-tsd") or program.name != "peft-tsd" else near(program.absolute())


def near(path: Path) -> str:
    """`path` as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
