"""The harnesses of docs/reliability.md, for a moment each."""

import os
import subprocess
import sys

import pytest

from harness.soak import soak
from support.places import ROOT
from support.waiting import PATIENCE

HARNESS = ROOT / "tests" / "harness"


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks its runs")
def test_stopped_runs_end_with_the_same_bits():
    command = [sys.executable, str(HARNESS / "stop_runs.py"), "kill", "term", "--count", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all ended with the same bits") == 2


def test_adapters_come_and_go():
    done = soak(steps=120, check_every=40, seed=1)
    assert {"add", "remove", "switch", "reload", "train", "merge", "off"} <= done.acts.keys()
    assert done.checked > 0
