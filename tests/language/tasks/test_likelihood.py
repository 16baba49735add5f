"""The likeliest of several options, against one sequence at a time."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from peft_tsd.language.sections import Task
from peft_tsd.language.tasks.commonsense import READING
from peft_tsd.language.tasks.likelihood import most_likely
from peft_tsd.tasks import Example, Generation
from support import text_models
from support.suites import openbookqa


@pytest.mark.parametrize("shared", [0, 15])
@pytest.mark.parametrize(
    "make", [text_models.llama_folder, text_models.gpt2_folder, text_models.qwen2_folder, text_models.mistral_folder]
)
def test_the_likeliest_option_is_that_of_a_slow_reference(tmp_path, make, shared):
    """Options that share a beginning or not, of one or more tokens, against one sequence at a time with all logits."""
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "model")).eval()
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 300, (count,), generator=draw).tolist()

    beginning = tokens(shared)
    prompts = [beginning + tokens(3 + i % 5) for i in range(14)]
    options = []
    for i in range(14):
        alike = tokens(i % 3)
        options.append([alike + tokens(1 if i % 2 else 1 + j) for j in range(2 + i % 3)])

    expected = []
    for prompt, texts in zip(prompts, options):
        scores = []
        for text in texts:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + text])).logits[0].double().log_softmax(-1)
            scores.append(sum(logits[len(prompt) + k - 1, token].item() for k, token in enumerate(text)))
        expected.append(max(range(len(scores)), key=scores.__getitem__))
    assert len(set(expected)) > 1
    done: list[int] = []
    for batch_size in (1, 4, 100):
        assert most_likely(model, prompts, options, 0, batch_size, done.append) == expected
    assert sum(done) == 3 * len(prompts)


def test_scoring_by_likelihood_counts_right_options(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(text_models.llama_folder(tmp_path / "model")).eval()
    tokenizer = text_models.tokenizer()
    task = Generation(Task(family="commonsense", scoring="likelihood"), READING)
    prompts = [f"{row['instruction']}\n" for row in openbookqa(6)]
    right = []
    for option in ("answer1", "answer2", "answer3", "answer4"):
        asked = [Example(prompt, option) for prompt in prompts]
        right.append(text_models.score(task, model, tokenizer, asked, 4)["accuracy"])
    # Every question has one likeliest option.
    assert sum(right) == pytest.approx(1.0)
