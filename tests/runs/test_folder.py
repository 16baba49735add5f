"""Run folders that were locked, moved, filled up, damaged, or made to do harm."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import Trainer

from peft_tsd import cli
from peft_tsd.errors import InputError
from peft_tsd.files.whole import write_text
from peft_tsd.language import progress, training
from peft_tsd.language.evaluating import evaluate, find_run
from peft_tsd.language.recipe import load_recipe
from peft_tsd.models.origin import fingerprint, write_origin
from peft_tsd.runs.folder import RunFolder
from peft_tsd.runs.stopping import Interrupted
from support import text_models


@pytest.fixture
def place(tmp_path):
    return text_models.place_in(tmp_path, 20)


def run(recipe: Path, *overrides: str) -> training.Result:
    return training.train(load_recipe(str(recipe), ["evaluation.before=false", *overrides]))


@pytest.fixture
def stopped(place, monkeypatch) -> Path:
    """The recipe in a run folder with one checkpoint, of step 5, stopped by SIGTERM."""
    write = progress.file_only

    def watched(message: str) -> None:
        write(message)
        if message.startswith("step 4:"):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(progress, "file_only", watched)
        with pytest.raises(Interrupted) as caught:
            run(text_models.write_recipe(place))
    assert caught.value.signal == signal.SIGTERM
    assert [p.name for p in (place / "run" / "checkpoints").iterdir()] == ["checkpoint-5"]
    return place / "run" / "recipe.yaml"


def bits(folder: Path) -> dict[str, bytes]:
    return {a: (folder / a / "adapter_model.safetensors").read_bytes() for a in ("adapter", "adapter-lora")}


def refused(recipe: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        run(recipe, "resume=true", *overrides)
    assert str(caught.value).isprintable()
    assert not (recipe.parent / "adapter").exists()
    return str(caught.value)


def test_a_moved_run_continues_where_it_is_now(place, stopped):
    moved = place / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move(stopped.parent, moved)
    run(moved / "recipe.yaml", "resume=true")
    assert not stopped.parent.exists()
    run(place / "tiny.yaml", f"output={place / 'whole'}")
    assert bits(moved) == bits(place / "whole")
    # Another run of the same recipe still goes where it is told to.
    assert load_recipe(str(moved / "recipe.yaml"), ["output=other"]).output == str(Path("other").absolute())


def test_sigterm_ends_with_143_and_says_how_to_go_on(place, stopped, monkeypatch, capsys):
    def interrupted(recipe):
        raise Interrupted(Path(recipe.output), signal.SIGTERM)

    monkeypatch.setattr("peft_tsd.language.train", interrupted)
    assert cli.main(["train", str(stopped)]) == 143
    assert "resume=true" in capsys.readouterr().err


def test_a_run_that_another_holds_is_refused(stopped):
    with FileLock(stopped.parent / ".lock"):
        assert "is being worked on by another process" in refused(stopped)


@pytest.mark.long
def test_two_processes_do_not_work_on_one_run(stopped):
    code = f"""
import sys
from peft_tsd.runs.folder import RunFolder
with RunFolder({str(stopped.parent)!r}).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "locked\n"
    assert "is being worked on by another process" in refused(stopped)
    other.kill()  # and the lock goes with it
    other.communicate()
    run(stopped, "resume=true")


def test_a_base_with_other_weights_is_refused(place, stopped):
    weights = place / "model" / "model.safetensors"
    state = load_file(weights)
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    whole = weights.read_bytes()
    save_file(state, weights, metadata={"format": "pt"})
    assert "has other weights than when the run" in refused(stopped)
    weights.write_bytes(whole)
    run(stopped, "resume=true")
    adapter = stopped.parent / "adapter"
    evaluate(str(adapter))
    save_file(state, weights, metadata={"format": "pt"})
    for path in (
        stopped.parent,
        adapter,
        stopped.parent / "adapter-lora",
        stopped.parent / "checkpoints/checkpoint-12",
    ):
        with pytest.raises(InputError, match="was trained on other weights"):
            evaluate(str(path))


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(place, stopped, name):
    folder = RunFolder(stopped.parent)
    checkpoint, progress = folder.last_complete()
    harmed = place / "harmed"
    hostile = place / "hostile"
    torch.save({"x": Harm(harmed)}, hostile)
    shutil.copy(hostile, checkpoint / name)
    folder.mark_complete(checkpoint, progress)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(hostile, weights_only=True)
    if name == "training_args.bin":  # written by Trainer, and never read
        run(stopped, "resume=true")
    else:
        assert "checkpoint-5' cannot be continued from" in refused(stopped)
    assert not harmed.exists()
    torch.load(hostile, weights_only=False)
    assert harmed.exists()


def test_a_checkpoint_of_something_else_is_refused(stopped):
    folder = RunFolder(stopped.parent)
    checkpoint, progress = folder.last_complete()
    weights = checkpoint / "adapter_model.safetensors"
    state = load_file(weights)
    name = next(name for name in state if name.endswith("lora_A.weight"))
    save_file({**state, name: torch.full_like(state[name], torch.nan)}, weights)
    write_origin(checkpoint, fingerprint(torch.nn.Linear(1, 1)))
    folder.mark_complete(checkpoint, progress)
    assert "holds NaN or Inf" in refused(stopped)
    weights.unlink()
    torch.save(state, checkpoint / "adapter_model.bin")
    folder.mark_complete(checkpoint, progress)
    assert "adapter_model.bin, which is pickled and not read" in refused(stopped)


@pytest.mark.parametrize("damage", ["bit", "cut", "link", "record", "climb"])
def test_a_damaged_checkpoint_is_not_continued_from(place, stopped, damage):
    folder = RunFolder(stopped.parent)
    checkpoint, _ = folder.last_complete()
    weights, record = checkpoint / "optimizer.pt", checkpoint / "complete.json"
    content = bytearray(weights.read_bytes())
    if damage == "bit":
        content[len(content) // 2] ^= 4
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(content[:-1])
    elif damage == "link":
        weights.rename(place / "optimizer.pt")
        weights.symlink_to(place / "optimizer.pt")
    elif damage == "record":
        record.write_text('{"sha256": {}, "progress": {"step": 5}}')
    else:
        listed = json.loads(record.read_text())
        listed["sha256"]["../../../data.jsonl"] = "0" * 64
        write_text(record, json.dumps(listed))
    assert folder.last_complete() is None
    run(stopped, "resume=true")  # from the beginning, there being no other
    assert "removed half-written checkpoint-5" in folder.log.read_text()
    run(place / "tiny.yaml", f"output={place / 'whole'}")
    assert bits(folder.path) == bits(place / "whole")


def test_links_in_a_run_and_damaged_metrics_are_refused(place, stopped):
    checkpoints = stopped.parent / "checkpoints"
    checkpoints.rename(place / "checkpoints")
    checkpoints.symlink_to(place / "checkpoints")
    assert "checkpoints' is a symbolic link" in refused(stopped)
    checkpoints.unlink()
    (place / "checkpoints").rename(checkpoints)
    metrics = stopped.parent / "metrics.json"
    whole = metrics.read_text()
    for text in ("", "[]", "{}", whole[:50], "[" * 100_000, '{"data": 1, "score": 2, "status": 3}'):
        metrics.write_text(text)
        assert "metrics.json' is damaged" in refused(stopped)
    for base in ("3", '{"x": 1}'):
        metrics.write_text(json.dumps({**json.loads(whole), "base": json.loads(base)}))
        assert "metrics.json' is damaged" in refused(stopped)


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_said_in_one_line(place, monkeypatch, error):
    save = Trainer._save_optimizer_and_scheduler

    def full(self, folder):
        if folder.endswith("-10"):
            raise error
        save(self, folder)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_optimizer_and_scheduler", full)
        with pytest.raises(InputError, match=r"no room to write, with .* MiB free on its disk; checkpoint-5 is whole"):
            run(text_models.write_recipe(place))
    # What was half-written gave its room back.
    assert [p.name for p in (place / "run" / "checkpoints").iterdir()] == ["checkpoint-5"]
    run(place / "run" / "recipe.yaml", "resume=true")


def test_a_text_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    write_text(path, "old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert path.read_text() == "old"


def test_the_recipe_of_a_run_does_not_make_its_code_trusted(stopped):
    """Of a folder from elsewhere; a recipe that the user names is another matter."""
    content = stopped.read_text()
    assert "trust_remote_code: false" in content
    stopped.write_text(content.replace("trust_remote_code: false", "trust_remote_code: true"))
    assert load_recipe(str(stopped)).model.trust_remote_code
    assert not find_run(stopped.parent).model.trust_remote_code


@pytest.mark.parametrize("method", ["lora", "lora-dash", "lora-tsd"])
def test_a_run_begun_before_what_pre_launch_learned_was_kept_goes_on_as_it_began(place, method):
    recipe = load_recipe(str(text_models.write_recipe(place)), [f"method={method}"])
    folder = RunFolder(recipe.output)
    folder.create(recipe, {})
    lines = folder.recipe.read_text().splitlines()
    folder.recipe.write_text("\n".join(line for line in lines if "keep_prelaunch" not in line))
    if method != "lora-tsd":
        folder.check_resumable(recipe)
        return
    with pytest.raises(InputError, match=r"directions.keep_prelaunch=True differs from False, with which the run"):
        folder.check_resumable(recipe)
    same = load_recipe(str(text_models.write_recipe(place)), ["method=lora-tsd", "directions.keep_prelaunch=false"])
    folder.check_resumable(same)
