"""From the command line's words to the verb's function, and from its result to an exit code."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence

from ..errors import InputError
from ..files.adapters import CONFIG
from ..recipes.reading import kind_of
from .parser import make_parser
from .screen import BAD_INPUT, INTERRUPTED
from .values import adapter_folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 130 interrupted, 143 terminated."""
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes key=value before or after the options, and not on both sides.
    if rest and not ("overrides" in arguments and all(re.fullmatch(r"[\w.]+=.*", given, re.DOTALL) for given in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        return _verb(arguments)(arguments)
    except InputError as error:
        for complaint in error.args:
            print(f"peft-tsd: {complaint}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("peft-tsd: interrupted", file=sys.stderr)
        return INTERRUPTED


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
