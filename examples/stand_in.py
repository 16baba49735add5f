"""A stand-in for a real model, so that every example runs in seconds: a tiny random Llama, its tokenizer, questions.

It learns to add, a little. Give the examples `--model HuggingFaceTB/SmolLM2-135M-Instruct`, or any other, for more.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)


def load(name: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of that name and its tokenizer, or the stand-in."""
    if name is None:
        return _tiny_llama(), _tokenizer()
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(name), tokenizer


def questions(number: int = 64) -> list[dict[str, str]]:
    """Sums: `prompt` and `completion`."""
    pairs = [(i % 10, i // 10 % 10) for i in range(number)]
    return [{"prompt": f"{a} plus {b} is", "completion": f" {a + b}."} for a, b in pairs]


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> dict[str, list[int]]:
    """One question as a model is trained on it; only the completion counts."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def _tiny_llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=258,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
    )


def _tokenizer() -> PreTrainedTokenizerBase:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = Tokenizer(models.BPE({letter: i for i, letter in enumerate(["<pad>", "<end>", *alphabet])}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<pad>", eos_token="<end>")
