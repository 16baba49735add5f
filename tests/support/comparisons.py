"""Rows of a comparison's results."""

import json

from peft_tsd.compare.plan import Cell
from peft_tsd.compare.results import row_of

# What a run measures rather than computes.
MEASURED = {"seconds", "start_seconds", "seconds_per_step", "peak_memory_bytes", "phase_change"}


def computed(out):
    """What the runs of the comparison in `out`, and those that were tuned, came to."""
    content = json.loads((out / "results.json").read_text())
    return [
        [{key: value for key, value in row.items() if key not in MEASURED} for row in content[part]]
        for part in ("runs", "tuned")
    ]


def row(method, seed, score, *, rank=4, task=None, variation=(), variant=None, held_out=None, **more):
    metrics = {
        "score": {"metric": "accuracy", "after": score, "questions": 10, "loss": held_out},
        "trainable_parameters": 5,
        "total_parameters": 10,
        "steps": 3,
        "seconds_per_step": 0.5,
        "peak_memory_bytes": 2**20,
        "seconds": 2.0,
        "phase_change": None,
        "loss": [],
        "data": {},
        "versions": {},
        "machine": {},
        **more,
    }
    return row_of(Cell(task, method, rank, variation, seed, variant), metrics, {"optimizer": {"learning_rate": 1e-3}})
