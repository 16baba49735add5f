"""Several processes find and train what one process does, and continue each other's checkpoints."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_tsd.tuner.phase import adapted_layers
from support import directions, in_processes, reference, tiny
from support.places import ROOT
from support.waiting import PATIENCE

WORKER = Path(in_processes.__file__)
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed (DS_BUILD_OPS=0 pip install deepspeed)",
)
GRADIENTS = {"prelaunch_steps": 0, "dash_unit": "sigma", "direction_budget": "global"}
SKETCHED = {"prelaunch_steps": 0, "direction_source": "gradient"}
EXPERTS = {**SKETCHED, "target_modules": ["experts.0", "experts.1", "head"]}
AUTO = {"prelaunch_steps": "auto", "prelaunch_min": 2, "prelaunch_max": 5, "settled_agreement": 0.99}


def spec_of(place: Path, loop: str, engine: str, method: str = "lora-tsd", **changes) -> dict:
    number = len(list(place.glob("*")))
    fixed = {"loop": loop, "engine": engine, "method": method, "steps": 6, "changes": {}, "out": str(place / "out")}
    return {**fixed, "result": str(place / f"{number}-{engine}-{method}.json"), **changes}


def launch(processes: int, *specs: dict) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "tests"))),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "DS_BUILD_OPS": "0",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [*command, str(WORKER), json.dumps(specs)], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )


def train(processes: int, *specs: dict) -> list[dict]:
    done = launch(processes, *specs)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(Path(spec["result"]).read_text()) for spec in specs]
    for result in results:
        assert len(result["digests"]) == processes
        assert len(set(result["digests"])) == 1, "the processes hold different directions"
        assert not [name for name in result["sent"] if "directions" in name and not name.endswith(("a0", "b0"))]
        assert set(result["held"]) == {"Tensor"}, "directions are not whole in every process"
    return results


def alone(method: str = "lora-tsd", *, more: dict | None = None, **changes) -> dict:
    """What one process does, with all rows of each batch."""
    spec = {"loop": "torch", "engine": "none", "method": method, "steps": 6, "changes": changes}
    return in_processes.trained({**spec, **(more or {})})


def assert_same(result: dict, other: dict, *, steps: int | None = None) -> None:
    directions.assert_same(result["found"], other["found"])
    assert result["identified_at"] == other["identified_at"]
    assert result["losses"][:steps] == pytest.approx(other["losses"][:steps], abs=2e-4)


def test_two_processes(tmp_path):
    cases = [
        ("ddp", "lora-tsd", {}, {}),
        ("ddp", "lora-init", {"init_reading": "orthonormal"}, {}),
        ("ddp", "lora-dash", {"init_lora_weights": "pissa"}, {}),
        ("fsdp2", "lora-dash", GRADIENTS, {}),
        ("fsdp2", "lora-tsd", AUTO, {}),
        ("fsdp2", "lora-tsd", SKETCHED, {}),
        # All tokens of the first expert are in one process, and all of the second's in the other.
        ("none", "lora-tsd", EXPERTS, {"experts": True, "steps": 0}),
    ]
    specs = []
    for number, (engine, method, changes, more) in enumerate(cases):
        result = str(tmp_path / f"{number}.json")
        specs.append(spec_of(tmp_path, "torch", engine, method, changes=changes, result=result, **more))
    for (engine, method, changes, more), result in zip(cases, train(2, *specs), strict=True):
        assert result["kind"] == ("DTensor" if engine == "fsdp2" else "Tensor")
        expected = alone(method, more=more, **changes)
        assert_same(result, expected)
        if changes.get("direction_source") == "gradient":  # whose indices and rates say nothing of where they point
            assert_same_spaces(result, expected)
            assert all(found[0] for found in result["found"].values()), "a layer has no directions"


@pytest.mark.long
def test_two_forward_passes_before_a_backward_pass(tmp_path):
    """What DDP writes to in between, no backward pass can use."""
    specs = [spec_of(tmp_path, "torch", "ddp", method, twice=True) for method in ("lora-tsd", "loha")]
    for result, method in zip(train(2, *specs), ("lora-tsd", "loha"), strict=True):
        assert not [name for name in result["sent"] if "directions" in name]
        assert_same(result, alone(method))


def assert_same_spaces(result: dict, other: dict) -> None:
    """The leading directions of every layer span the same spaces, on both sides of the weight, and σ is the same."""
    for name, spaces in result["spaces"].items():
        assert result["sigma"][name] == pytest.approx(other["sigma"][name], rel=1e-3), name
        for mine, theirs in zip(spaces, other["spaces"][name], strict=True):
            mine, theirs = torch.tensor(mine).double(), torch.tensor(theirs).double()
            outside = mine - theirs @ (theirs.mT @ mine)
            assert float(torch.linalg.matrix_norm(outside, 2)) < 1e-3, name


@pytest.mark.long
def test_directions_of_the_gradient_are_those_of_one_process(tmp_path):
    """By sketches, over the same rows: whole in each process, sharded, and sharded with weights of four bits."""
    cases = [("ddp", {}), ("fsdp2", {}), ("fsdp2", {})]
    if importlib.util.find_spec("bitsandbytes"):
        cases.append(("fsdp2", {"four_bits": True}))
    specs = [
        spec_of(tmp_path, "torch", engine, changes=SKETCHED, result=str(tmp_path / f"{number}.json"), steps=4, **more)
        for number, (engine, more) in enumerate(cases)
    ]
    results = train(2, *specs)
    for (engine, more), result in zip(cases, results, strict=True):
        assert result["kind"] == ("DTensor" if engine == "fsdp2" else "Tensor")
        spec = {"loop": "torch", "engine": "none", "method": "lora-tsd", "steps": 4, "changes": SKETCHED, **more}
        expected = in_processes.trained(spec)
        assert_same(result, expected)
        assert_same_spaces(result, expected)
    first, again = results[1:3]
    assert first["digests"] == again["digests"], "the same processes find other directions a second time"


@pytest.mark.long
def test_what_sharded_layers_learned_before_directions_of_the_gradient_is_kept(tmp_path):
    changes = {"prelaunch_steps": 2, "direction_source": "gradient"}
    (result,) = train(2, spec_of(tmp_path, "trainer", "fsdp2", changes=changes))
    (expected,) = train(1, spec_of(tmp_path, "trainer", "ddp", changes=changes))
    assert result["identified_at"] == 2
    assert_same(result, expected)
    assert_same_spaces(result, expected)


@pytest.mark.long
def test_processes_that_begin_with_different_directions_are_refused(tmp_path):
    for spec in (spec_of(tmp_path, "torch", "ddp", apart=1), spec_of(tmp_path, "trainer", "fsdp2", apart=1)):
        done = launch(2, spec)
        assert done.returncode != 0
        # The launcher ends the second one where the first is quicker to fail.
        error = r"\[rank[01]\]: ValueError: Process 1 holds other directions of adapter 'default' than process 0"
        assert re.search(error, done.stderr), done.stderr[-3000:]


@pytest.mark.long
def test_four_processes(tmp_path):
    methods = ["lora-tsd", "lora-init", "lora-dash"]
    results = train(4, *(spec_of(tmp_path, "torch", "fsdp2", method) for method in methods))
    for method, result in zip(methods, results, strict=True):
        assert result["kind"] == "DTensor"
        assert_same(result, alone(method))


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@needs_deepspeed
def test_zero(tmp_path, engine):
    methods = ["lora-dash", "lora-init", "lora-tsd"]
    results = train(2, *(spec_of(tmp_path, "torch", engine, method) for method in methods))
    for method, result in zip(methods, results, strict=True):
        assert result["kind"] == ("split" if engine == "zero3" else "Tensor")
        # LoRA-TSD counts the steps of Δσ anew too, so that it moves otherwise from there on.
        assert_same(result, alone(method), steps=3 if method == "lora-tsd" else None)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
@needs_deepspeed
def test_directions_of_the_gradient_with_zero_are_those_of_one_process(tmp_path, engine):
    (result,) = train(2, spec_of(tmp_path, "torch", engine, changes=SKETCHED))
    assert result["kind"] == ("split" if engine == "zero3" else "Tensor")
    expected = alone(**SKETCHED)
    assert_same(result, expected)
    assert_same_spaces(result, expected)


@pytest.mark.long
def test_accelerate(tmp_path):
    assert_same(*train(2, spec_of(tmp_path, "accelerate", "ddp")), alone())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Trainer's run in two processes that nothing stopped, by engine: its folder and result."""
    done = {}

    def get(engine: str) -> tuple[Path, dict]:
        if engine not in done:
            place = tmp_path_factory.mktemp(engine)
            done[engine] = place / "out", *train(2, spec_of(place, "trainer", engine))
        return done[engine]

    return get


@pytest.mark.long
def test_fsdp2_with_the_model_of_the_main_process(tmp_path, whole):
    """Accelerate's cpu_ram_efficient_loading sends the whole state dict of that process around."""
    assert_same(*train(2, spec_of(tmp_path, "trainer", "fsdp2", from_main=True)), whole("fsdp2")[1])


@pytest.mark.long
def test_trl(tmp_path):
    assert_same(*(train(processes, spec_of(tmp_path, "trl", "ddp"))[0] for processes in (2, 1)))


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "others"),
    [
        ("ddp", (1, 1)),
        ("fsdp2", (4, 1)),
        pytest.param("zero2", (2, 2), marks=needs_deepspeed),
        pytest.param("zero3", (2, 2), marks=needs_deepspeed),
    ],
)
def test_checkpoints_of_two_processes_continue_in_others(tmp_path, whole, engine, others):
    """From before and after the transition; what is saved in the end is a whole adapter."""
    first, result = whole(engine)
    assert result["identified_at"] == 3
    for step, processes in zip((2, 4), others, strict=True):
        place = tmp_path / f"from-{step}"
        shutil.copytree(first, place / "out")
        spec = spec_of(place, "trainer", engine, resume=str(place / "out" / f"checkpoint-{step}"))
        assert_same(*train(processes, spec), result)
        saved, other = (load_file(out / "final" / "adapter_model.safetensors") for out in (place / "out", first))
        assert {name: (x.shape, x.dtype) for name, x in saved.items()} == {
            name: (x.shape, x.dtype) for name, x in other.items()
        }
        model, other = (PeftModel.from_pretrained(tiny.llama(), out / "final") for out in (place / "out", first))
        directions.assert_same(directions.of(model), result["found"])
        others = adapted_layers(other, "default")
        for name, layer in adapted_layers(model, "default").items():
            change, expected = reference.effective_change(layer), reference.effective_change(others[name])
            # Adam makes a whole step of the rounding of a gradient that is all but zero: hence not each number.
            assert (change - expected).norm() < 0.1 * expected.norm(), name


@pytest.mark.long
def test_one_process_that_fails_ends_all_and_the_last_checkpoint_is_whole(tmp_path, whole):
    done = launch(2, spec_of(tmp_path, "trainer", "ddp", fail_at=5))
    assert done.returncode != 0
    assert "one process has had enough" in done.stderr
    spec = spec_of(tmp_path, "trainer", "ddp", resume=str(tmp_path / "out" / "checkpoint-4"))
    assert_same(*train(2, spec), whole("ddp")[1])


@pytest.mark.long
def test_a_process_that_fails_at_the_transition_tells_the_others(tmp_path):
    done = launch(2, spec_of(tmp_path, "torch", "fsdp2", out_of_memory=1))
    assert done.returncode != 0
    error = r"\[rank{}\]: .*TransitionError: Process 1 failed in layer '.*_proj': RuntimeError: not enough memory"
    for rank in range(2):
        assert re.search(error.format(rank), done.stderr), done.stderr[-3000:]


@pytest.mark.long
def test_directions_beside_other_methods_are_found_by_two_processes_and_refused_where_they_are_sharded(tmp_path):
    assert_same(*train(2, spec_of(tmp_path, "torch", "ddp", "loha")), alone("loha"))
    done = launch(2, spec_of(tmp_path, "trainer", "fsdp2", "loha"))
    assert done.returncode != 0
    assert "its parameters are sharded over processes" in done.stderr
    assert not list((tmp_path / "out").glob("checkpoint-*"))
