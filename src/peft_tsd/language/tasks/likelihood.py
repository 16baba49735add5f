"""Which of a few continuations a language model finds most likely."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...directions.spectrum import as_double
from .decoding import common_beginning, pad_left, positions, read_beginning


@torch.inference_mode()
def most_likely(
    model: Any,
    prompts: Sequence[list[int]],
    options: Sequence[Sequence[list[int]]],
    pad: int,
    batch_size: int,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[int]:
    """For every prompt the index of its option with the highest `log p(option | prompt)`, the first of equal ones.

    The logarithms of an option's tokens are added up, without dividing by their number: options are whole answers, as
    a model that was trained on them would write them. What all options of a prompt begin with adds the same to each
    and is not counted, so options that differ in their last token alone cost one forward pass together. What all
    contexts of a batch begin with is read once.

    Args:
        model: A causal language model.
        prompts: Token ids.
        options: Token ids of every prompt's options, two different ones at least.
        pad: The padding token.
        batch_size: Contexts a batch; a prompt has one for all its options, or one an option.
        on_batch: Called with the number of prompts, as they are done.
    """
    accepted = inspect.signature(_base(model).forward).parameters
    scores: list[list[float]] = [[0.0] * len(texts) for texts in options]
    # A context (token ids) with the options it is for: (prompt, option, tokens whose probability is asked).
    contexts: dict[tuple[int, tuple[int, ...]], list[tuple[int, list[int]]]] = {}
    for i, (prompt, texts) in enumerate(zip(prompts, options, strict=True)):
        shared = common_beginning(texts)
        for j, text in enumerate(texts):
            contexts.setdefault((i, (*prompt, *text[:-1])), []).append((j, text[shared:]))
    left = [0] * len(prompts)
    for i, _ in contexts:
        left[i] += 1
    order = sorted(contexts, key=lambda key: -len(key[1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        inputs = pad_left([ids for _, ids in chosen], pad)
        if "position_ids" in accepted:
            inputs["position_ids"] = positions(inputs["attention_mask"])
        keep = max(len(asked) for key in chosen for _, asked in contexts[key])
        cache = read_beginning(model, [ids for _, ids in chosen], leave=keep)
        if cache is not None:
            read = cache.get_seq_length()
            inputs |= {name: inputs[name][:, read:] for name in inputs if name != "attention_mask"}
        if "logits_to_keep" in accepted:
            # As indices, as in training (see `Generation.collator`).
            inputs["logits_to_keep"] = torch.arange(-keep, 0) + inputs["input_ids"].shape[1]
        more = {} if cache is None else {"past_key_values": cache}
        logits = model(**{key: value.to(model.device) for key, value in inputs.items()}, **more).logits[:, -keep:]
        logarithms = logits.float().log_softmax(-1).cpu()
        for row, key in enumerate(chosen):
            for j, asked in contexts[key]:
                steps = torch.arange(keep - len(asked), keep)
                scores[key[0]][j] = float(as_double(logarithms[row, steps, torch.tensor(asked)]).sum())
            left[key[0]] -= 1
        on_batch(sum(left[i] == 0 for i in {key[0] for key in chosen}))
    return [max(range(len(row)), key=row.__getitem__) for row in scores]


def _base(model: Any) -> Any:
    """The model under an adapter, whose own `forward` accepts anything."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
