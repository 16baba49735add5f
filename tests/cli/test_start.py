"""`--help` and `--version` come at once: without PyTorch."""

import subprocess
import sys

import pytest

import peft_tsd

CODE = """
import sys
from peft_tsd_command import main
sys.argv = ["peft-tsd", *{given!r}]
try:
    main()
finally:
    print("loaded:", [name for name in ("torch", "peft", "transformers") if name in sys.modules], file=sys.stderr)
"""


def start(*given):
    return subprocess.run([sys.executable, "-c", CODE.format(given=given)], capture_output=True, text=True)


@pytest.mark.parametrize("given", [("--help",), ("train", "--help"), ("--version",), ("nothing",)], ids=str)
def test_what_the_parser_answers_loads_nothing(given):
    done = start(*given)
    assert "loaded: []" in done.stderr, done.stderr
    assert done.returncode == (2 if given == ("nothing",) else 0)
    if given == ("--version",):
        assert done.stdout == f"peft-tsd {peft_tsd.__version__}\n"
    elif given == ("--help",):
        assert "explore" in done.stdout


@pytest.mark.long
def test_a_verb_is_carried_out():
    done = start("recipes")
    assert "smollm2-family" in done.stdout
    assert "'torch'" in done.stderr


@pytest.mark.long
def test_a_reader_that_ends_before_the_output_is_no_error():
    """As `peft-tsd recipes | head -1` has one."""
    command = subprocess.Popen(
        [sys.executable, "-m", "peft_tsd", "recipes"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    command.stdout.close()
    errors = command.stderr.read()
    assert command.wait() == 141
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors
