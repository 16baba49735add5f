"""Batches of rows of similar length, so that little of what a model computes is padding."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

from torch.utils.data import Sampler

from .evaluated import EvaluatedTrainer

POOL = 50
"""Batches that are sorted together: enough for little padding, few enough that a batch differs every epoch."""


class SimilarLengths(Sampler[int]):
    """The order of `lengths.__len__()` rows in which every `batch_size` successive ones are of similar length.

    Rows are shuffled, sorted by length in pools of 50 batches, cut into batches, and the batches are shuffled. The
    order follows from the seed and the epoch alone, so that a run that continues sees what it would have seen.
    (Transformers' `group_by_length` draws from the global random state, and gives a pool's batches from the longest to
    the shortest, which in a mixture is task by task.)

    Args:
        lengths: Of the rows, in tokens.
        batch_size: Rows in a batch.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Accelerate calls this at the beginning of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = random.Random(f"{self.seed} {self.epoch}")
        rows = generator.sample(range(len(self.lengths)), len(self.lengths))
        pool = POOL * self.batch_size
        rows = [
            row
            for start in range(0, len(rows), pool)
            for row in sorted(rows[start : start + pool], key=lambda row: self.lengths[row])
        ]
        batches = [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        # A batch that is not full stays last: the others are cut where they were sorted.
        rest = [batches.pop()] if len(rows) % self.batch_size else []
        generator.shuffle(batches)
        return (row for batch in [*batches, *rest] for row in batch)


class SimilarLengthsTrainer(EvaluatedTrainer):
    """transformers' Trainer with batches of rows of similar length."""

    def _get_train_sampler(self, train_dataset: Any = None) -> SimilarLengths:
        rows = self.train_dataset if train_dataset is None else train_dataset
        # Rows of tasks that write hold a prompt and an answer, the others what the model reads.
        lengths = [sum(len(row.get(key, ())) for key in ("input_ids", "prompt", "answer")) for row in rows]
        return SimilarLengths(lengths, self._train_batch_size, self.args.seed)
