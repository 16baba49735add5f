"""Questions that a causal language model answers in writing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ...errors import RecipeError
from ..sections import Task
from .cut import Cut
from .decoding import pad_left, positions, write_texts
from .likelihood import most_likely
from .scored import Scored
from .sources import Example

IGNORED = -100
"""The label of a position that is not learned."""

Batch = dict[str, Any]


class Reading(NamedTuple):
    """How what a model wrote becomes a right or a wrong answer."""

    metric: str
    right: Callable[[Example, str], bool]
    """Whether the text written after an example's prompt gives its answer. Of a suite: refuses an answer that no text
    could give, and is asked so when the data are read."""
    complete: Callable[[Example, str], bool] | None = None
    """Whether no continuation of that text can change `right`; writing stops there."""
    options: Callable[[Example], Sequence[tuple[str, str]]] | None = None
    """The texts that would answer an example, each with the answer it gives; for `task.scoring=likelihood`."""


EXACT_MATCH = Reading("exact_match", lambda example, text: normalize(text) == normalize(example.answer))
"""Right is the answer and nothing else, after `normalize`."""


class Causal(Scored):
    """What every family has whose model writes."""

    peft_task_type = "CAUSAL_LM"

    @property
    def auto_class(self) -> Any:
        return AutoModelForCausalLM

    @property
    def config_fields(self) -> dict[str, Any]:
        return {}


class Generation(Causal):
    """A prompt is followed by the answer and the end token; the loss is taken on these two alone."""

    loses = "the beginning of their prompt; answers stay whole"
    """What a row too long loses."""

    def __init__(self, task: Task, reading: Reading = EXACT_MATCH) -> None:
        self._task = task
        self._reading = reading
        self.metric = reading.metric

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        *,
        leave_out: bool = False,
        cut: Cut | None = None,
    ) -> list[Batch]:
        """Rows of `prompt` and `answer` token ids; `cut` counts what is lost. An answer too long is refused, or left
        out."""
        cut = cut or Cut()
        end = tokenizer.eos_token_id
        if end is None:
            raise RecipeError("the tokenizer has no end token, so an answer would never end; give another model")
        answers = tokenizer([self._continued(e, e.answer) for e in examples], add_special_tokens=False)["input_ids"]
        rows = []
        for example, prompt, ids in zip(examples, self._prompts(examples, tokenizer), answers, strict=True):
            answer = [*ids, end]
            if leave_out and len(answer) >= self._task.max_length:
                cut.left_out += 1
                continue
            if len(answer) >= self._task.max_length:
                raise RecipeError(
                    f"the answer {example.answer[:60]!r}... has {len(answer)} tokens and task.max_length is "
                    f"{self._task.max_length}, which must hold it and a prompt; raise task.max_length"
                )
            room = self._task.max_length - len(answer)
            cut.row(len(prompt) - room)
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
                # As indices: a slice's layout would have torch copy the whole output matrix for every row.
                width = batch["input_ids"].shape[1]
                batch["logits_to_keep"] = torch.arange(width - keep, width)
                labels = labels[:, -keep:]
            return {**batch, "labels": labels}

        return collate

    @torch.inference_mode()
    def answers(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[bool]:
        """Which of `examples` are answered right: by what is written greedily, or by the most likely option."""
        prompts = [ids[-self._task.max_length :] for ids in self._prompts(examples, tokenizer)]
        if self._task.scoring == "likelihood":
            return self._options_chosen(model, tokenizer, examples, prompts, batch_size, on_batch)
        complete = self._reading.complete
        texts = write_texts(
            model,
            tokenizer,
            prompts,
            max_new_tokens=self._task.max_new_tokens,
            batch_size=batch_size,
            complete=None if complete is None else lambda i, text: complete(examples[i], text),
            on_batch=on_batch,
        )
        return [self._reading.right(example, text) for example, text in zip(examples, texts, strict=True)]

    def metrics(self, examples: Sequence[Example], answers: Sequence[bool]) -> dict[str, float]:
        """The share of right answers."""
        return {self.metric: sum(answers) / len(examples)}

    def _options_chosen(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Example],
        prompts: Sequence[list[int]],
        batch_size: int,
        on_batch: Callable[[int], None],
    ) -> list[bool]:
        assert self._reading.options is not None
        options = [self._reading.options(example) for example in examples]
        tokens = [
            tokenizer([self._continued(example, text) for text, _ in texts], add_special_tokens=False)["input_ids"]
            for example, texts in zip(examples, options, strict=True)
        ]
        chosen = most_likely(model, prompts, tokens, tokenizer.pad_token_id, batch_size, on_batch)
        return [
            texts[best][1] == example.answer for example, texts, best in zip(examples, options, chosen, strict=True)
        ]

    def _continued(self, example: Example, text: str) -> str:
        """`text` as it stands after the prompt: after a space, unless a chat's header or white space comes before."""
        return text if self._task.chat or example.prompt[-1:].isspace() else f" {text}"

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
