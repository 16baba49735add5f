"""How a model is scored: what it answers, row by row, and the metrics of that.

The two are apart so that several processes can answer, each its share of the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase


class Scored(ABC):
    """What all families have."""

    metric: str
    """The one that counts."""

    @abstractmethod
    def answers(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Any],
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[Any]:
        """What `model` answers to `examples`; `on_batch` hears how many more are done."""

    @abstractmethod
    def metrics(self, examples: Sequence[Any], answers: Sequence[Any]) -> dict[str, float]:
        """Every metric of `answers`, which may be those of several calls, one after the other, as `examples` are."""
