"""Writing many prompts at a time: the texts are those of a loop over single prompts."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_tsd.language.tasks.decoding import write_texts
from support import text_models

FAMILIES = [
    text_models.llama_folder,
    text_models.gpt2_folder,
    text_models.gpt_neo_folder,
    text_models.qwen2_folder,
    text_models.mistral_folder,
]


@pytest.fixture(params=FAMILIES)
def model(request, tmp_path):
    return AutoModelForCausalLM.from_pretrained(request.param(tmp_path / "model")).eval()


def prompts(count: int = 11, shared: int = 0) -> list[list[int]]:
    """Of 1 to 7 tokens after `shared` that all begin with."""
    draw = torch.Generator().manual_seed(3)
    beginning = torch.randint(2, 300, (shared,), generator=draw).tolist()
    return [beginning + torch.randint(2, 300, (1 + i * 5 % 7,), generator=draw).tolist() for i in range(count)]


def by_hand(model, tokenizer, prompt: list[int], steps: int, complete=None) -> str:
    """No cache, no padding, no `generate`: the likeliest token again and again."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            best = model(torch.tensor([ids])).logits[0, -1].argmax().item()
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
        if complete and complete(tokenizer.decode(ids[len(prompt) :])):
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("shared", [0, 4, 15])
def test_batches_write_what_single_prompts_do(model, shared):
    """Beginnings shorter and longer than the families' windows."""
    tokenizer = text_models.tokenizer()
    asked = prompts(shared=shared)
    expected = [by_hand(model, tokenizer, prompt, 9) for prompt in asked]
    assert len(set(expected)) > 3
    for batch_size in (1, 4, 50):
        done: list[int] = []
        texts = write_texts(model, tokenizer, asked, max_new_tokens=9, batch_size=batch_size, on_batch=done.append)
        assert texts == expected
        assert sum(done) == len(expected)


def test_a_row_ends_where_it_is_complete(model):
    """Each at its own length, whatever the others of its batch do, and none is asked again after."""
    tokenizer = text_models.tokenizer()
    asked = prompts(shared=4)
    expected = [by_hand(model, tokenizer, p, 9, lambda text, i=i: len(text) > i) for i, p in enumerate(asked)]
    over: set[int] = set()

    def complete(i: int, text: str) -> bool:
        assert i not in over
        if len(text) > i:
            over.add(i)
        return len(text) > i

    for batch_size in (1, 4, 50):
        over.clear()
        texts = write_texts(model, tokenizer, asked, max_new_tokens=9, batch_size=batch_size, complete=complete)
        assert texts == expected


def test_the_end_token_ends_a_row(model):
    """The token that every text would have is made the end: nothing of it or after it is kept."""
    tokenizer = text_models.tokenizer()
    first = by_hand(model, tokenizer, prompts()[0], 3)
    with torch.no_grad():
        best = model(torch.tensor([prompts()[0]])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = best
    texts = write_texts(model, tokenizer, prompts(), max_new_tokens=3, batch_size=50)
    assert first
    # It is no special token of the tokenizer, so it is in the text, as its last one.
    assert texts[0] == tokenizer.decode([best])


def watched(model) -> list[tuple[int, int]]:
    """Rows and columns that the model reads, in the order of its calls."""
    read: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return read


def test_the_beginning_is_read_once_and_ended_rows_leave(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(text_models.llama_folder(tmp_path / "model")).eval()
    read = watched(model)
    asked = prompts(8, shared=15)
    order = sorted(range(8), key=lambda i: -len(asked[i]))
    # The first six end with their second token, the last two never.
    texts = write_texts(
        model,
        text_models.tokenizer(),
        asked,
        max_new_tokens=5,
        batch_size=8,
        complete=lambda i, text: i in order[:6] and read[-1] == (8, 1),
    )
    assert read == [(1, 15), (8, 7), (8, 1), (2, 1), (2, 1), (2, 1)]
    assert len(texts) == 8


def test_a_model_without_keys_and_values_reads_everything(tmp_path):
    """Of prompts of one length: such a model, padded, would read the padding too."""
    model = AutoModelForCausalLM.from_pretrained(text_models.mamba_folder(tmp_path / "model")).eval()
    tokenizer = text_models.tokenizer()
    asked = [[7, 8, 9, token] for token in range(20, 28)]
    expected = [by_hand(model, tokenizer, p, 9, lambda text, i=i: len(text) > i) for i, p in enumerate(asked)]
    texts = write_texts(
        model, tokenizer, asked, max_new_tokens=9, batch_size=8, complete=lambda i, text: len(text) > i
    )
    assert texts == expected


def test_nothing_to_write():
    assert write_texts(None, text_models.tokenizer(), [], max_new_tokens=3, batch_size=2) == []
