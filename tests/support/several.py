"""Runs of recipes in several processes, and what they are to be compared by."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from support import text_models
from support.places import ROOT
from support.waiting import PATIENCE


def recipe_in(place: Path, **sections) -> Path:
    """With no dropout, which draws for rows of its own in each process."""
    fixed = {"adapter": {"lora_dropout": 0.0}, "training": {"steps": 12, "batch_size": 4, "save_every": 5}}
    for name, section in sections.items():
        fixed[name] = {**fixed.get(name, {}), **section} if isinstance(section, dict) else section
    return text_models.write_recipe(place, **fixed)


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests")))
    known = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return {**known, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def torchrun(number: int, runs: list[list[str]], *, sharded: bool = False, **more: str) -> None:
    """Do runs in so many processes, one after the other."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
    done = subprocess.run(
        [*command, "-m", "support.in_recipes", json.dumps({"runs": runs, "sharded": sharded})],
        env=environment(**more),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def srun(number: int, *arguments: str, by: str = "peft_tsd", **more: str) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of so many processes, started as SLURM starts the tasks of a step."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": port}
    step |= {"SLURM_NTASKS": str(number), "SLURM_STEP_NUM_TASKS": str(number)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", by, *arguments],
            env=environment(**step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank), **more),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    found = []
    try:
        for process in started:
            output, errors = process.communicate(timeout=PATIENCE)
            found.append((process.returncode, output, errors))
    finally:
        for process in started:
            process.kill()
    return found


def said(ended: list[tuple[int, str, str]]) -> str:
    """All that the processes wrote for the user, but for what other libraries say when they are loaded."""
    return "\n".join(errors for _, _, errors in ended)


def metrics_of(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def change_of(place: Path, run: Path) -> torch.Tensor:
    """What the native adapter adds to the outputs of the model."""
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    ids = torch.arange(2, 42).reshape(4, 10)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        return PeftModel.from_pretrained(base, run / "adapter")(input_ids=ids).logits - before


def assert_same(one: Path, other: Path) -> None:
    """Two runs came to the same, but for the order in which sums were taken."""
    mine, theirs = metrics_of(one), metrics_of(other)
    assert mine["status"] == theirs["status"] == "finished"
    assert [row["step"] for row in mine["loss"]] == [row["step"] for row in theirs["loss"]]
    losses, expected = ([row["loss"] for row in metrics["loss"]] for metrics in (mine, theirs))
    assert losses == pytest.approx(expected, abs=2e-4)
    # One answer that is nearly tied may be another.
    score, reference = mine["score"], theirs["score"]
    assert score["loss"] == pytest.approx(reference["loss"], abs=2e-4)
    assert score["after"] == pytest.approx(reference["after"], abs=1.01 / score["questions"])
    for measured, wanted in zip(mine["evaluations"], theirs["evaluations"], strict=True):
        assert measured["step"] == wanted["step"]
        assert measured["loss"] == pytest.approx(wanted["loss"], abs=2e-4)


def assert_same_adapter(place: Path, one: Path, other: Path) -> None:
    mine, theirs = change_of(place, one), change_of(place, other)
    assert (mine - theirs).norm() < 0.05 * theirs.norm()
