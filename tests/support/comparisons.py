"""Rows of a comparison's results."""

from peft_tsd.compare.plan import Cell
from peft_tsd.compare.results import row_of


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
