"""Writing many prompts at a time: the texts are those of a loop over single prompts."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import text_models
from peft_tsd.tasks.decoding import write


@pytest.fixture(params=[text_models.llama_folder, text_models.gpt2_folder])
def model(request, tmp_path):
    return AutoModelForCausalLM.from_pretrained(request.param(tmp_path / "model")).eval()


def prompts(count: int = 11) -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(2, 300, (1 + i * 5 % 7,), generator=draw).tolist() for i in range(count)]


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


def test_batches_write_what_single_prompts_do(model):
    tokenizer = text_models.tokenizer()
    expected = [by_hand(model, tokenizer, prompt, 9) for prompt in prompts()]
    assert len(set(expected)) > 3
    for batch_size in (1, 4, 50):
        done: list[int] = []
        texts = write(model, tokenizer, prompts(), max_new_tokens=9, batch_size=batch_size, on_batch=done.append)
        assert texts == expected
        assert sum(done) == len(expected)


def test_a_row_ends_where_it_is_complete(model):
    """Each at its own length, whatever the others of its batch do, and none is asked again after."""
    tokenizer = text_models.tokenizer()
    expected = [by_hand(model, tokenizer, p, 9, lambda text, i=i: len(text) > i) for i, p in enumerate(prompts())]
    over: set[int] = set()

    def complete(i: int, text: str) -> bool:
        assert i not in over
        if len(text) > i:
            over.add(i)
        return len(text) > i

    for batch_size in (1, 4, 50):
        over.clear()
        assert (
            write(model, tokenizer, prompts(), max_new_tokens=9, batch_size=batch_size, complete=complete) == expected
        )


def test_the_end_token_ends_a_row(model):
    """The token that every text would have is made the end: nothing of it or after it is kept."""
    tokenizer = text_models.tokenizer()
    first = by_hand(model, tokenizer, prompts()[0], 3)
    with torch.no_grad():
        best = model(torch.tensor([prompts()[0]])).logits[0, -1].argmax().item()
    model.generation_config.eos_token_id = best
    texts = write(model, tokenizer, prompts(), max_new_tokens=3, batch_size=50)
    assert first
    # It is no special token of the tokenizer, so it is in the text, as its last one.
    assert texts[0] == tokenizer.decode([best])


def test_nothing_to_write():
    assert write(None, text_models.tokenizer(), [], max_new_tokens=3, batch_size=2) == []
