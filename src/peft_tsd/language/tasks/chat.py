"""Conversations: rows with `messages`, of which the assistant's turns are learned.

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

The tokenizer's own chat template writes them down. Which tokens are the assistant's is said by the `{% generation %}`
markers of the template; by those of the training template that TRL has for it (`get_training_chat_template`); or, for
any other template that writes a conversation turn by turn, by what each assistant's turn adds to the text before it.
TRL packs the rows (`pack_dataset`, best fit decreasing, no conversation split) and trains on them (`language.sft`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import RecipeError, did_you_mean, one_line
from ..sections import Data, Task
from .cut import Cut
from .decoding import write_texts
from .generation import IGNORED, Batch, Causal, normalize
from .sources import Row, stored, unseen

Turn = tuple[str, str]
"""The role and what it says."""


class Said(NamedTuple):
    """What the assistant says last."""

    reply: str
    answer: str | None
    """What a right reply is, where the data say so."""


class Conversation(NamedTuple):
    """A conversation that ends with the assistant. Its last field is the answer, as in `sources.Example`."""

    asked: tuple[Turn, ...]
    """All turns before the last."""
    said: Said

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*_messages(self.asked), {"role": "assistant", "content": self.said.reply}]


def load_conversations(data: Data, seed: int) -> tuple[list[Conversation], list[Conversation]]:
    """Conversations to train on, and to score on; none of the latter asks what one of the former does, or twice.

    Raises:
        RecipeError: A file or dataset is not there, or a row is no conversation.
    """
    rows, test_rows = stored(data, seed)
    train = [_conversation(row, number, data) for number, row in enumerate(rows, 1)]
    fresh = unseen([_conversation(row, number, data) for number, row in enumerate(test_rows, 1)], train, _asked)
    test = list(islice(fresh, data.test_size))
    if not train or not test:
        raise RecipeError(
            f"data.name={data.name!r} gives {len(train)} conversations to train on and {len(test)} to score on, not "
            "counting those trained on; both need one at least"
        )
    return train, test


def _asked(conversation: Conversation) -> tuple[Turn, ...]:
    return conversation.asked


def _conversation(row: Row, number: int, data: Data) -> Conversation:
    def refuse(what: str) -> RecipeError:
        return RecipeError(f"data.name={data.name!r}: {what} (row {number} of those read)")

    if "messages" not in row:
        raise refuse(f"there is no column 'messages'{did_you_mean('messages', map(str, row))}")
    turns: list[Turn] = []
    for message in row["messages"] or ():
        role, content = (message.get(key) if isinstance(message, dict) else None for key in ("role", "content"))
        if not (isinstance(role, str) and isinstance(content, str)):
            raise refuse(f"a message is a mapping with a text for 'role' and for 'content'; got {str(message)[:80]}")
        turns.append((role, content))
    given = row.get(data.answer)
    answer = None if given is None else str(given).strip()
    if answer and turns and turns[-1][0] != "assistant":
        turns.append(("assistant", answer))
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    if len(turns) < 2 or turns[0][0] == "assistant":
        raise refuse("a conversation begins with another's turn and has one of the assistant after it")
    return Conversation(tuple(turns[:-1]), Said(turns[-1][1], answer or None))


class Chat(Causal):
    """The loss is taken on the assistant's turns alone, with what ends them."""

    loses = "their end"
    """What a row too long loses."""

    def __init__(self, task: Task, tests: Sequence[Conversation]) -> None:
        self._task = task
        self._has_answers = bool(tests) and all(one.said.answer is not None for one in tests)
        self.metric = "exact_match" if self._has_answers else "token_accuracy"

    def encode(
        self,
        examples: Sequence[Conversation],
        tokenizer: PreTrainedTokenizerBase,
        *,
        leave_out: bool = False,
        cut: Cut | None = None,
    ) -> list[Batch]:
        """Rows of `input_ids` and `labels`, with `task.packing` also `seq_lengths`; those to score are not packed.

        A conversation that is too long loses its end, which `cut` counts, and is left out where nothing of the
        assistant remains.
        """
        cut = cut or Cut()
        rows = []
        for ids, learned in assistant_tokens([one.messages for one in examples], tokenizer):
            cut.row(len(ids) - self._task.max_length)
            labels = [id if said else IGNORED for id, said in zip(ids, learned, strict=True)]
            row = {"input_ids": ids[: self._task.max_length], "labels": labels[: self._task.max_length]}
            if any(label != IGNORED for label in row["labels"]):
                rows.append(row)
        if examples and not rows and not leave_out:
            raise RecipeError(
                f"task.max_length={self._task.max_length}: none of {len(examples)} conversations has come to the "
                "assistant's first turn by then; raise it"
            )
        return packed(rows, self._task.max_length) if self._task.packing and not leave_out else rows

    def collator(
        self, tokenizer: PreTrainedTokenizerBase, base_model: PreTrainedModel
    ) -> Callable[[Sequence[Batch]], Batch]:
        """Rows to a batch, padded on the right: a conversation is read from its beginning."""
        pad = tokenizer.pad_token_id

        def collate(rows: Sequence[Batch]) -> Batch:
            def padded(values: Iterable[list[int]], fill: int) -> torch.Tensor:
                return pad_sequence([torch.tensor(one) for one in values], batch_first=True, padding_value=fill)

            return {
                "input_ids": padded((row["input_ids"] for row in rows), pad),
                "attention_mask": padded(([1] * len(row["input_ids"]) for row in rows), 0),
                "labels": padded((row["labels"] for row in rows), IGNORED),
            }

        return collate

    @torch.inference_mode()
    def answers(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Conversation],
        batch_size: int,
        on_batch: Callable[[int], None] = lambda done: None,
    ) -> list[tuple[int, int]]:
        """How many are right, of how many: of each conversation, whether its last turn is written as its answer;
        without answers, of each batch, the assistant's tokens that the model finds most likely, each after what was
        really said."""
        if not self._has_answers:
            return self._likely_tokens(model, tokenizer, examples, batch_size, on_batch)
        prompts = [
            tokenizer(_rendered(tokenizer, _messages(one.asked), prompt=True), add_special_tokens=False)["input_ids"]
            for one in examples
        ]
        texts = write_texts(
            model,
            tokenizer,
            [ids[-self._task.max_length :] for ids in prompts],
            max_new_tokens=self._task.max_new_tokens,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        return [(int(normalize(text) == normalize(one.said.answer or "")), 1) for one, text in zip(examples, texts)]

    def metrics(self, examples: Sequence[Conversation], answers: Sequence[tuple[int, int]]) -> dict[str, float]:
        """The share of what is right."""
        count = sum(number for _, number in answers)
        return {self.metric: sum(right for right, _ in answers) / count if count else 0.0}

    def _likely_tokens(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        examples: Sequence[Conversation],
        batch_size: int,
        on_batch: Callable[[int], None],
    ) -> list[tuple[int, int]]:
        rows = self.encode(examples, tokenizer, leave_out=True)
        collate = self.collator(tokenizer, model)
        found = []
        for start in range(0, len(rows), batch_size):
            batch = {key: x.to(model.device) for key, x in collate(rows[start : start + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]
            guesses = model(**batch).logits[:, :-1].argmax(-1)
            learned = labels != IGNORED
            found.append((int((guesses == labels)[learned].sum()), int(learned.sum())))
            on_batch(min(batch_size, len(rows) - start))
        on_batch(len(examples) - len(rows))
        return found


def packed(rows: list[Batch], length: int) -> list[Batch]:
    """Rows filled with whole conversations up to `length` tokens; `seq_lengths` says where each ends."""
    check_installed()
    from datasets import Dataset
    from trl import pack_dataset

    return list(pack_dataset(Dataset.from_list(rows), length, "bfd")) if rows else rows


def check_installed() -> None:
    """Refuse to go on without TRL.

    Raises:
        RecipeError: It is not installed.
    """
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        raise RecipeError(f"task.family=chat needs the package {error.name}: pip install 'peft-tsd[chat]'") from None


def assistant_tokens(
    chats: Sequence[list[dict[str, str]]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[list[int], list[bool]]]:
    """The tokens of each conversation, and which of them are the assistant's.

    Raises:
        RecipeError: The tokenizer has no chat template, or one that does not tell.
    """
    if tokenizer.chat_template is None:
        raise RecipeError(
            "task.family=chat, and the tokenizer has no chat template; give a model that was made to chat"
        )
    if not tokenizer.is_fast:
        raise RecipeError("task.family=chat needs a fast tokenizer, which knows where in a text its tokens lie")
    template = training_template(tokenizer)
    return [
        _by_turns(tokenizer, chat) if template is None else _by_markers(tokenizer, chat, template) for chat in chats
    ]


def training_template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The tokenizer's template, or TRL's for it, with markers around what the assistant says; None where neither is.

    Raises:
        RecipeError: As `check_installed`.
    """
    check_installed()
    from trl.chat_template_utils import get_training_chat_template

    own = tokenizer.chat_template["default"] if isinstance(tokenizer.chat_template, dict) else tokenizer.chat_template
    if re.search(r"\{%-?\s*generation\s*-?%\}", own):
        return str(own)
    try:
        found = get_training_chat_template(tokenizer)
    except ValueError:  # none that TRL knows
        return None
    return None if found is None else str(found)


def _by_markers(
    tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], template: str
) -> tuple[list[int], list[bool]]:
    try:
        found = tokenizer.apply_chat_template(
            chat, chat_template=template, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except (TemplateError, TypeError, ValueError) as error:
        raise _cannot_write(chat, error) from None
    return list(found["input_ids"]), [bool(said) for said in found["assistant_masks"]]


def _by_turns(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]]) -> tuple[list[int], list[bool]]:
    """By what each turn adds: of the assistant's, what comes after the header with which a reply is asked for."""
    whole = _rendered(tokenizer, chat)
    spans = []
    for i, message in enumerate(chat):
        if message["role"] == "assistant":
            before, after = _rendered(tokenizer, chat[:i], prompt=True), _rendered(tokenizer, chat[: i + 1])
            if not (whole.startswith(after) and after.startswith(before)):
                raise RecipeError(
                    "task.family=chat: the tokenizer's chat template writes a turn otherwise once others follow, so "
                    "that the assistant's tokens cannot be told; give it one with {% generation %} markers"
                )
            spans.append((len(before), len(after)))
    read = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    learned = [any(start < stop and end > begin for begin, stop in spans) for start, end in read["offset_mapping"]]
    return list(read["input_ids"]), learned


def _rendered(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, str]], *, prompt: bool = False) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt))
    except (TemplateError, TypeError, ValueError) as error:
        raise _cannot_write(chat, error) from None


def _cannot_write(chat: list[dict[str, str]], error: Exception) -> RecipeError:
    return RecipeError(
        f"data: the tokenizer's chat template cannot write a conversation of {', '.join(m['role'] for m in chat)}: "
        f"{one_line(error)}"
    )


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]
