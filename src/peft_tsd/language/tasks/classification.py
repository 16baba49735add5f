"""Texts that belong to one of a few labels, scored by accuracy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...errors import RecipeError
from ..sections import Task
from .cut import Cut
from .scored import Scored
from .sources import Example

Batch = dict[str, Any]

MOST_LABELS = 1000
"""More different answers than this are no labels but texts."""


class Classification(Scored):
    """The prompt is read by a model with a classification head; the answer is one of `labels`."""

    metric = "accuracy"
    peft_task_type = "SEQ_CLS"
    loses = "the end of their text"
    """What a row too long loses."""

    def __init__(self, task: Task, train: Sequence[Example]) -> None:
        found = Counter(example.answer for example in train)
        self.labels = task.labels or sorted(found)
        if not 2 <= len(self.labels) <= MOST_LABELS:
            raise RecipeError(
                f"task.family=classify needs 2 to {MOST_LABELS} labels, and the training rows have {len(self.labels)} "
                f"different answers, such as {self.labels[0][:60]!r}; check data.answer, or use task.family=generate"
            )
        unknown = sorted(set(found) - set(self.labels))
        if unknown:
            raise RecipeError(
                f"the training rows hold {unknown[0]!r}, which is not one of task.labels={self.labels!r}"
            )
        self._task = task

    @property
    def auto_class(self) -> Any:
        return AutoModelForSequenceClassification

    @property
    def config_fields(self) -> dict[str, Any]:
        return {
            "num_labels": len(self.labels),
            "id2label": dict(enumerate(self.labels)),
            "label2id": {label: i for i, label in enumerate(self.labels)},
        }

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        leave_out: bool = False,
        cut: Cut | None = None,
    ) -> list[Batch]:
        """Rows of token ids and `labels`; `leave_out` examples whose label is none of those, `cut` counts what is
        lost."""
        if leave_out:
            examples = [example for example in examples if example.answer in self.labels]
        if not examples:
            return []
        encoded = tokenizer(
            [example.prompt for example in examples], truncation=True, max_length=self._task.max_length
        )
        if cut is not None:
            texts = [example.prompt for example in examples]
            cut.rows(
                encoded["input_ids"],
                self._task.max_length,
                lambda places: tokenizer([texts[i] for i in places], verbose=False)["input_ids"],
            )
        index = {label: i for i, label in enumerate(self.labels)}
        return [
            {"input_ids": ids, "attention_mask": mask, "labels": index[example.answer]}
            for example, ids, mask in zip(examples, encoded["input_ids"], encoded["attention_mask"], strict=True)
        ]

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, base_model: PreTrainedModel
    ) -> Callable[[Sequence[Batch]], Batch]:
        """Rows to a batch, padded on the tokenizer's side."""
        return padded(tokenizer)

    def answers(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[int]:
        """Of each of `examples`, the label that the model gives the highest score."""
        encoded = tokenizer(
            [example.prompt for example in examples], truncation=True, max_length=self._task.max_length
        )
        guesses: list[int] = logits(model, tokenizer, encoded, batch_size, on_batch).argmax(-1).tolist()
        return guesses

    def metrics(self, examples: Sequence[Example], answers: Sequence[int]) -> dict[str, float]:
        """The share of right answers; an unknown label counts as wrong."""
        right = sum(self.labels[g] == example.answer for g, example in zip(answers, examples, strict=True))
        return {self.metric: right / len(examples)}

    @staticmethod
    def majority(examples: Sequence[Example]) -> float:
        """What answering always the most frequent label would score."""
        return Counter(example.answer for example in examples).most_common(1)[0][1] / len(examples)


def padded(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[Batch]], Batch]:
    """What makes a batch of rows of tokens with their labels, padded on the tokenizer's side."""
    pad = DataCollatorWithPadding(tokenizer)
    return lambda rows: dict(pad(list(rows)))


@torch.inference_mode()
def logits(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Any,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """A classifier's outputs for texts that `tokenizer` encoded, shape (texts, labels), float32, on the CPU."""
    count = len(encoded["input_ids"])
    order = sorted(range(count), key=lambda i: -len(encoded["input_ids"][i]))
    found: list[Tensor] = []
    for start in range(0, count, batch_size):
        chosen = order[start : start + batch_size]
        rows = {key: [encoded[key][i] for i in chosen] for key in encoded}
        inputs = tokenizer.pad(rows, return_tensors="pt").to(model.device)
        found.append(model(**inputs).logits.float().cpu())
        on_batch(len(chosen))
    sorted_logits = torch.cat(found)
    return torch.empty_like(sorted_logits).index_copy_(0, torch.tensor(order), sorted_logits)
