"""From the command line's words to the verb's function, and from its result to an exit code."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr
from io import StringIO

from ..errors import InputError
from ..files.adapters import CONFIG
from ..recipes.reading import kind_of
from ..runs.processes import launched, read_slurm
from ..runs.together import ProcessGoneError, together
from .parser import make_parser
from .screen import BAD_INPUT, FAILED, INTERRUPTED, UNREAD
from .values import adapter_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 130 interrupted, 143 terminated."""
    read_slurm()
    with redirect_stderr(StringIO()) if os.environ.get("RANK", "0") != "0" else nullcontext():
        arguments = _parsed(argv)
    try:
        if launched() > 1:
            return together(lambda: _one_of_several(arguments), _say)
        code = _verb(arguments)(arguments)
        sys.stdout.flush()
        return code
    except InputError as error:
        return _say(error)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        return UNREAD
    except KeyboardInterrupt:
        print("peft-tsd: interrupted", file=sys.stderr)
        return INTERRUPTED


def _nobody_reads() -> bool:
    """Whether what reads the output has ended, as in `peft-tsd recipes | head -1`; nothing is written to it then."""
    try:
        print(flush=True)  # what failed before is forgotten
    except BrokenPipeError:
        # What is still to be written at the interpreter's end goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes key=value before or after the options, and not on both sides.
    if rest and not ("overrides" in arguments and all(re.fullmatch(r"[\w.]+=.*", given, re.DOTALL) for given in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _one_of_several(arguments: argparse.Namespace) -> int:
    if arguments.run != ("language", "train"):
        raise InputError(
            f"WORLD_SIZE={launched()}: several processes can do `peft-tsd train`, and no other verb; start this one "
            "without torchrun, accelerate launch or srun"
        )
    return _verb(arguments)(arguments)


def _say(error: BaseException) -> int:
    """Say an error, and give the exit code."""
    if isinstance(error, InputError):
        for complaint in error.args:
            print(f"peft-tsd: {complaint}", file=sys.stderr)
        return BAD_INPUT
    if isinstance(error, ProcessGoneError):
        print(f"peft-tsd: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return FAILED


def _verb(arguments: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """The function of a verb. Its module alone is imported: no verb loads, or needs, what another works with."""
    module, function = arguments.run
    if module == "language" and _is_of_diffusion(arguments):
        for package in ("diffusers", "PIL"):
            if importlib.util.find_spec(package) is None:
                raise InputError("teaching a diffusion model needs more packages: pip install 'peft-tsd[diffusion]'")
        module = "dreambooth"
    verb: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f".{module}", __package__), function)
    return verb


def _is_of_diffusion(arguments: argparse.Namespace) -> bool:
    if arguments.run == ("language", "export"):
        return any(adapter_folder(arguments.adapter).glob(f"*/{CONFIG}"))
    return arguments.run != ("language", "evaluate") and kind_of(arguments.recipe) == "dreambooth"
