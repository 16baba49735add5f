"""Questions that a causal language model answers in writing, scored by exact match."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..recipe import RecipeError, Task
from .sources import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

IGNORED = -100
"""The label of a position that is not learned."""

Batch = dict[str, Any]


class Generation:
    """A prompt is followed by the answer and the end token; the loss is taken on these two alone."""

    metric = "exact_match"
    peft_task_type = "CAUSAL_LM"

    def __init__(self, task: Task) -> None:
        self._task = task

    @property
    def auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM

    @property
    def config_fields(self) -> dict[str, Any]:
        return {}

    def encode(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[Batch]:
        """Rows of `prompt` and `answer` token ids."""
        end = tokenizer.eos_token_id
        if end is None:
            raise RecipeError("the tokenizer has no end token, so an answer would never end; give another model")
        # After a plain prompt the answer goes on with the same text, after a space; after a chat's header it begins.
        space = "" if self._task.chat else " "
        answers = tokenizer([space + example.answer for example in examples], add_special_tokens=False)["input_ids"]
        rows = []
        for example, prompt, ids in zip(examples, self._prompts(examples, tokenizer), answers, strict=True):
            answer = [*ids, end]
            if len(answer) >= self._task.max_length:
                raise RecipeError(
                    f"the answer {example.answer[:60]!r}... has {len(answer)} tokens and task.max_length is "
                    f"{self._task.max_length}, which must hold it and a prompt; raise task.max_length"
                )
            room = self._task.max_length - len(answer)
            rows.append({"prompt": prompt[-room:], "answer": answer})
        return rows

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, base_model: PreTrainedModel
    ) -> Callable[[Sequence[Batch]], Batch]:
        """Rows to a batch, padded on the left so that answers end every row and only the last logits are needed."""
        accepted = inspect.signature(base_model.forward).parameters
        pad = tokenizer.pad_token_id

        def collate(rows: Sequence[Batch]) -> Batch:
            batch: Batch = {**pad_left([row["prompt"] + row["answer"] for row in rows], pad)}
            labels = torch.full_like(batch["input_ids"], IGNORED)
            for label, row in zip(labels, rows, strict=True):
                label[-len(row["answer"]) :].copy_(torch.tensor(row["answer"]))
            if "position_ids" in accepted:
                batch["position_ids"] = positions(batch["attention_mask"])
            if "logits_to_keep" in accepted:
                # One more than the longest answer: the logits before a token are the ones that predict it.
                keep = max(len(row["answer"]) for row in rows) + 1
                batch["logits_to_keep"] = keep
                labels = labels[:, -keep:]
            return {**batch, "labels": labels}

        return collate

    @torch.inference_mode()
    def score(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> float:
        """Share of `examples` that greedy generation answers exactly, after `normalize`."""
        from transformers import GenerationConfig

        generation = GenerationConfig(
            max_new_tokens=self._task.max_new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=_end_tokens(model, tokenizer),
        )
        prompts = [ids[-self._task.max_length :] for ids in self._prompts(examples, tokenizer)]
        right = 0
        # Longest first: rows of a batch have nearly one length, and a batch too large for memory fails at once.
        order = sorted(range(len(examples)), key=lambda i: -len(prompts[i]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id).items()
            inputs = {key: value.to(model.device) for key, value in batch}
            output = model.generate(**inputs, generation_config=generation)
            new_tokens = output[:, inputs["input_ids"].shape[1] :]
            texts = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            right += sum(
                normalize(text) == normalize(examples[i].answer) for i, text in zip(chosen, texts, strict=True)
            )
            on_batch(len(chosen))
        return right / len(examples)

    def _prompts(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        texts = [example.prompt for example in examples]
        if not self._task.chat:
            end = tokenizer.eos_token_id
            # Some tokenizers end every text, and so would end the prompt before the answer.
            return [ids[:-1] if ids[-1:] == [end] else ids for ids in tokenizer(texts)["input_ids"]]
        if tokenizer.chat_template is None:
            raise RecipeError("task.chat=true, and the tokenizer has no chat template; set task.chat=false")
        chats = [[{"role": "user", "content": text}] for text in texts]
        headed = tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        prompts: list[list[int]] = tokenizer(headed, add_special_tokens=False)["input_ids"]
        return prompts


def normalize(text: str) -> str:
    """What two equal answers share: lower case, single spaces, no quotes, emphasis or closing punctuation around.

    >>> normalize(' "Mother-in-law". ')
    'mother-in-law'
    >>> normalize("-3.5")
    '-3.5'
    """
    text = " ".join(text.lower().split())
    bare = text.lstrip("\"'`* ").rstrip("\"'`*.,;:!? ")
    # An answer may be a punctuation mark.
    return bare or text


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
