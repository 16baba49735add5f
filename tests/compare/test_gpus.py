"""Each run has a GPU of its own where there are several: what its process sees, before CUDA is set up in it."""

import re
import subprocess
import sys

import pytest

from peft_tsd.compare import compare, gpus, make_plan
from support import text_models


@pytest.mark.parametrize(
    ("given", "count", "visible"),
    [
        (None, 0, []),
        (None, 3, ["0", "1", "2"]),
        ("", 0, []),
        ("-1", 0, []),
        ("5, 2", 2, ["5", "2"]),
        ("5,-1,2", 1, ["5"]),
        ("GPU-8932f937,GPU-ab", 2, ["GPU-8932f937", "GPU-ab"]),
        ("MIG-c0ffee", 1, ["MIG-c0ffee"]),
    ],
)
def test_those_that_are_visible_are_given_as_they_are_named(monkeypatch, given, count, visible):
    monkeypatch.setattr(gpus, "gpu_count", lambda: count)
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    if given is not None:
        monkeypatch.setenv(gpus.VISIBLE, given)
    assert gpus.visible_gpus() == visible


@pytest.mark.parametrize(("given", "jobs", "seen"), [("4,MIG-a", 3, {"4", "MIG-a"}), (None, 1, set())])
def test_a_run_sees_its_own(tmp_path, monkeypatch, capsys, given, jobs, seen):
    monkeypatch.setattr(gpus, "gpu_count", lambda: len(seen))
    monkeypatch.delenv(gpus.VISIBLE, raising=False)
    if given:
        monkeypatch.setenv(gpus.VISIBLE, given)
    text_models.place_in(tmp_path, 30)
    recipe = text_models.write_recipe(tmp_path, training={"steps": 2}, directions={"prelaunch_steps": 1})
    plan = make_plan(str(recipe), methods=["base"], seeds=[0, 1, 2] if seen else [0])
    compare(plan, tmp_path / "out", jobs=jobs)
    told = re.findall(r"seed-\d: CUDA_VISIBLE_DEVICES=(\S+)", (tmp_path / "out" / "runs.log").read_text())
    assert set(told) == seen
    assert len(told) == 3 * bool(seen)
    assert capsys.readouterr().err.count("--jobs 3 on 2 GPUs: runs share them") == bool(seen)


@pytest.mark.long
def test_what_runs_are_forked_from_does_not_set_cuda_up():
    """No process that is forked from it could use CUDA then. Whether there is a GPU may be asked: NVML says."""
    program = """
import torch
def set_up():
    raise SystemExit("CUDA is set up")
torch.cuda._lazy_init = set_up
import peft_tsd.language.training
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
