"""Runs of recipes, stopped where one likes."""

import signal
from pathlib import Path

import torch
from safetensors.torch import load_file

from peft_tsd.language import progress, training, watching
from peft_tsd.language.recipe import load_recipe
from peft_tsd.runs.folder import RunFolder


def run(recipe: Path, *overrides: str) -> training.Result:
    return training.train(load_recipe(str(recipe), overrides))


def interrupt_at(monkeypatch, start: str, where: str = "progress") -> None:
    """Ctrl-C as the log line beginning with `start` is written, by the module `where`."""
    module = {"progress": progress, "watching": watching}[where]
    write = module.file_only

    def watched(message: str) -> None:
        write(message)
        if message.startswith(start):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(module, "file_only", watched)


def assert_same_result(one: RunFolder, other: RunFolder) -> None:
    for adapter in ("adapter", "adapter_lora"):
        left, right = (load_file(getattr(f, adapter) / "adapter_model.safetensors") for f in (one, other))
        assert left.keys() == right.keys()
        for name, tensor in left.items():
            assert torch.equal(tensor, right[name]), name
    left_metrics, right_metrics = one.read_metrics(), other.read_metrics()
    for key in ("loss", "score", "steps", "trainable_parameters", "status", "data"):
        assert left_metrics[key] == right_metrics[key], key
    assert left_metrics["phase_change"]["step"] == right_metrics["phase_change"]["step"]
