"""`peft-tsd push`."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from ..files.cards import CARD
from ..language.pushing import assemble, push, sizes
from .screen import DONE, near, screen


def push_run(arguments: argparse.Namespace) -> int:
    with screen(), tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "repository"
        if arguments.out is not None:
            folder = Path(arguments.out).expanduser()
        if arguments.dry_run or arguments.out is not None:
            files = assemble(arguments.run_folder, arguments.name, folder)
            for name, size in sizes(folder, files).items():
                print(f"{size:>12,}  {name}")
            print(f"\n{(folder / CARD).read_text(encoding='utf-8')}")
            print(f"nothing was pushed{'' if arguments.out is None else f'; the files lie in {near(folder)}'}")
            return DONE
        pushed = push(arguments.run_folder, arguments.name, folder, private=not arguments.public)
    print(f"{len(pushed.files)} files   {pushed.url}")
    return DONE
