"""Other processes, waited for as long as a loaded machine may need; and a run that stands still where one likes.

    python -m support.waiting PLACE LINE FILE -- train recipe.yaml

is `peft-tsd train recipe.yaml`, which stands still after the line of its log that begins with LINE, until FILE is
there. PLACE is the module that writes the log.
"""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from peft_tsd import cli
from support.places import ROOT

PATIENCE = 1200.0
"""Seconds; only what hangs takes longer, on any machine."""


def until(there: Callable[[], bool], process: subprocess.Popen) -> None:
    """Wait for `process` to get somewhere."""
    deadline = time.monotonic() + PATIENCE
    while not there():
        assert process.poll() is None, f"it ended with {process.returncode}"
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.02)


def signalled(number: int, line: str, log: Path, arguments: list[str], writer: str) -> tuple[int, str]:
    """The command line in a process that gets signal `number` after `line` of its log.

    Returns:
        Its exit code, and what it wrote to stderr.
    """
    go = log.parent.parent / "go"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "support.waiting", writer, line, str(go), "--", *arguments]
    process = subprocess.Popen(
        command, cwd=go.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until(lambda: log.is_file() and line in log.read_text(), process)
    process.send_signal(number)
    go.touch()
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def main() -> int:
    place, line, go, _, *arguments = sys.argv[1:]
    module = importlib.import_module(place)
    write = module.file_only

    def watched(message: str) -> None:
        write(message)
        if message.startswith(line):
            while not Path(go).exists():
                time.sleep(0.02)

    module.file_only = watched
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
