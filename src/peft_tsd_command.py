"""The program `peft-tsd`: its parser answers `--help` and `--version`, and refuses what it cannot read, at once.

A module by itself, beside the package: importing `peft_tsd` registers its methods with PEFT, and so imports PyTorch,
which takes seconds. The parser is the package's own file, run without the package around it.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Run the command line; see `peft_tsd.cli.main`."""
    package = importlib.util.find_spec("peft_tsd")
    assert package is not None
    assert package.origin is not None
    spec = importlib.util.spec_from_file_location("_parser", Path(package.origin).parent / "cli" / "parser.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.make_parser().parse_known_args()  # ends here where that is all there is to do

    from peft_tsd.cli import main as carry_out

    return carry_out()
