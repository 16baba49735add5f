"""Greedy writing, many prompts at a time.

Prompts of nearly one length share a batch, padded on the left, with a key-value cache. A row ends at an end token, or
where its answer is complete, and what it says is cut there: the texts are those a loop over single prompts would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.inference_mode()
def write(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    complete: Callable[[int, str], bool] | None = None,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """What `model` writes after each prompt, in the prompts' order.

    Args:
        model: A causal language model, with or without an adapter.
        tokenizer: With a padding token.
        prompts: Token ids.
        max_new_tokens: Most tokens written after a prompt.
        batch_size: Prompts a batch.
        complete: Whether the text written after prompt i is complete as it stands; asked after every token.
        on_batch: Called after every batch with the number of its prompts.
    """
    from transformers import GenerationConfig

    ends = _end_tokens(model, tokenizer)
    generation = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=ends or None,
    )
    texts = [""] * len(prompts)
    # Longest first: rows of a batch have nearly one length, and a batch too large for memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = pad_left([prompts[i] for i in rows], tokenizer.pad_token_id).items()
        inputs = {key: value.to(model.device) for key, value in batch}
        width = inputs["input_ids"].shape[1]
        stop = _Ends(tokenizer, rows, width, ends, complete)
        output = model.generate(**inputs, generation_config=generation, stopping_criteria=[stop])[:, width:].tolist()
        written = [ids[:length] for ids, length in zip(output, stop.lengths, strict=True)]
        for i, text in zip(rows, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True):
            texts[i] = text
        on_batch(len(rows))
    return texts


class _Ends(StoppingCriteria):
    """Where each row of a batch ends, and that it does."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        rows: Sequence[int],
        width: int,
        ends: Sequence[int],
        complete: Callable[[int, str], bool] | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._rows = rows
        self._width = width
        self._ends = set(ends)
        self._complete = complete
        self._open = list(range(len(rows)))
        self.lengths: list[int | None] = [None] * len(rows)
        """New tokens of a row, None for one that never ended."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        written = input_ids[self._open, self._width :].tolist()
        texts = (
            self._tokenizer.batch_decode(written, skip_special_tokens=True) if self._complete else [""] * len(written)
        )
        for row, ids, text in zip(list(self._open), written, texts, strict=True):
            if ids[-1] in self._ends or (self._complete and self._complete(self._rows[row], text)):
                self.lengths[row] = len(ids)
                self._open.remove(row)
        ended = torch.ones(len(self._rows), dtype=torch.bool)
        ended[self._open] = False
        return ended.to(input_ids.device)


def pad_left(rows: Sequence[Sequence[int]], pad: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, shape (rows, longest)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :] = torch.tensor(row)
        mask[i, width - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def positions(mask: Tensor) -> Tensor:
    """Position of every token in its own text, so that padding does not move it; 0 on the padding."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokenizer's end token and those the model was released with."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = of_model if isinstance(of_model, list) else [of_model]
    return sorted({end for end in (*ends, tokenizer.eos_token_id) if isinstance(end, int)})
