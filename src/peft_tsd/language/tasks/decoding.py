"""Greedy writing, many prompts at a time.

Prompts of nearly one length share a batch, padded on the left, with a key-value cache. What all of them begin with is
read once. A row ends at an end token, or where its answer is complete, what it says is cut there, and it leaves the
batch: the texts are those a loop over single prompts would give.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerBase, StoppingCriteria
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


@torch.inference_mode()
def write_texts(
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
    ends = _end_tokens(model, tokenizer)

    def text_of(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def ended(i: int, ids: list[int]) -> bool:
        return ids[-1] in ends or (complete is not None and complete(i, text_of(ids)))

    texts = [""] * len(prompts)
    # Longest first: rows of a batch have nearly one length, and a batch too large for memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        written = _write_batch(
            model,
            [prompts[i] for i in rows],
            max_new_tokens,
            tokenizer.pad_token_id,
            ends,
            lambda row, ids, rows=rows: ended(rows[row], ids),  # type: ignore[misc]
        )
        for i, ids in zip(rows, written, strict=True):
            texts[i] = text_of(ids)
        on_batch(len(rows))
    return texts


def _write_batch(
    model: Any,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    pad: int,
    ends: Sequence[int],
    ended: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """The tokens written after each prompt."""
    batch = {key: value.to(model.device) for key, value in pad_left(prompts, pad).items()}
    ids, mask = batch["input_ids"], batch["attention_mask"]
    width = ids.shape[1]
    cache = read_beginning(model, prompts)
    rows = list(range(len(prompts)))
    written: list[list[int]] = [[] for _ in prompts]
    while True:
        generation = GenerationConfig(
            max_length=width + max_new_tokens,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            pad_token_id=pad,
            eos_token_id=list(ends) or None,
        )
        stop = _HalfEnded(ended, rows, width)
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            generation_config=generation,
            stopping_criteria=[stop],
            # Processes keep in step by every pass (`distributed.passes`), not by every text.
            synced_gpus=False,
        )
        ids = output.sequences
        for row, new in zip(rows, ids[:, width:].tolist(), strict=True):
            written[row] = new[: stop.lengths.get(row)]
        left = [k for k, row in enumerate(rows) if row not in stop.lengths]
        if not left or ids.shape[1] == width + max_new_tokens:
            return written
        rows = [rows[k] for k in left]
        ids = ids[left]
        mask = torch.nn.functional.pad(mask[left], (0, ids.shape[1] - mask.shape[1]), value=1)
        # A model that keeps something else reads the rows again.
        cache = output.past_key_values if isinstance(output.get("past_key_values"), DynamicCache) else None
        if cache is not None:
            cache.batch_select_indices(torch.tensor(left, device=ids.device))


class _HalfEnded(StoppingCriteria):
    """Notes where rows end, and stops a batch of which half have, so that it can go on without them."""

    def __init__(self, ended: Callable[[int, list[int]], bool], rows: Sequence[int], width: int) -> None:
        self._ended = ended
        self._rows = rows
        self._width = width
        self.lengths: dict[int, int] = {}
        """New tokens of the rows that ended."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        for row, ids in zip(self._rows, input_ids[:, self._width :].tolist(), strict=True):
            if row not in self.lengths and self._ended(row, ids):
                self.lengths[row] = len(ids)
        over = 2 * len(self.lengths) >= len(self._rows)
        return torch.tensor([over or row in self.lengths for row in self._rows], device=input_ids.device)


def read_beginning(model: Any, rows: Sequence[Sequence[int]], leave: int = 1) -> DynamicCache | None:
    """A cache of what all rows begin with, read once, for the batch that `pad_left` makes of them.

    It holds the first n columns of the batch, n being the tokens that all rows have in common. A row's text stays in
    one piece: shorter rows have padding there, and the end of their beginning is read again with the rest of them. So
    a model that counts positions or windows by columns sees what it does without a cache.

    Args:
        model: A causal language model.
        rows: Token ids.
        leave: Least columns left to read.

    Returns:
        None where nothing is shared, or for a model that does not keep keys and values of all these tokens.
    """
    shared = common_beginning(rows, leave)
    if len(rows) == 1 or shared == 0:
        return None
    read = model(input_ids=torch.tensor([rows[0][:shared]], device=model.device), use_cache=True)
    past = read.get("past_key_values")
    if not isinstance(past, DynamicCache) or not all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.keys.shape[-2] == shared
        for layer in past.layers
    ):
        return None
    width = max(map(len, rows))
    padding = torch.tensor([width - len(row) for row in rows])[:, None]
    columns = (torch.arange(shared) - padding).clamp(min=0).to(model.device)  # (rows, shared)
    return DynamicCache(
        [
            (keys[0][:, columns].transpose(0, 1), values[0][:, columns].transpose(0, 1), window)
            for keys, values, window in past
        ]
    )


def common_beginning(rows: Sequence[Sequence[int]], leave: int = 1) -> int:
    """Tokens that all rows begin with, `leave` of each one at least left over."""
    most = max(0, min(map(len, rows)) - leave)
    return next((n for n in range(most) if any(row[n] != rows[0][n] for row in rows)), most)


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
