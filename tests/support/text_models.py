"""Tiny models with tokenizers in folders, data in files, and recipes over them."""

import json
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# Of an optimizer with which any run diverges on any processor: A grows by 1e30 a step and overflows at the second.
# (A large rate alone need not: a hidden state whose square overflows is normalized to zero.)
DIVERGES = {"learning_rate": 1e15, "weight_decay": 1e15, "max_grad_norm": 0.0}


def rows(count: int, start: int = 0) -> list[dict[str, str]]:
    """Questions of varying length with answers of one or more tokens."""
    found = []
    for i in range(start, start + count):
        a, b = i % 10, i // 10 % 10
        found.append({"question": f"{'please ' * (i % 3)}what is {WORDS[a]} and {i}?", "answer": WORDS[(a + b) % 10]})
    return found


def place_in(folder: Path, count: int) -> Path:
    """`folder`, with a tiny Llama in `model` and so many rows in `data.jsonl`."""
    llama_folder(folder / "model")
    jsonl(folder / "data.jsonl", rows(count))
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, so that any text can be read, of 300 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([row["question"] + " " + row["answer"] for row in rows(50)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<end>")


def llama_folder(path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    return _save(LlamaForCausalLM(config), path)


def gpt2_folder(path: Path) -> Path:
    """Absolute positions."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=1, bos_token_id=1)
    return _save(GPT2LMHeadModel(config), path)


_SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def qwen2_folder(path: Path) -> Path:
    """One layer sees everything, the other six tokens."""
    torch.manual_seed(0)
    types = ["full_attention", "sliding_attention"]
    return _save(
        Qwen2ForCausalLM(Qwen2Config(**_SMALL, sliding_window=6, use_sliding_window=True, layer_types=types)), path
    )


def mistral_folder(path: Path) -> Path:
    """Every layer sees twelve tokens."""
    torch.manual_seed(0)
    return _save(MistralForCausalLM(MistralConfig(**_SMALL, sliding_window=12)), path)


def gpt_neo_folder(path: Path) -> Path:
    """Absolute positions, and a window of six that the cache knows nothing of."""
    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=300,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
        max_position_embeddings=64,
        eos_token_id=1,
        bos_token_id=1,
    )
    return _save(GPTNeoForCausalLM(config), path)


def mamba_folder(path: Path) -> Path:
    """No attention: a state instead of keys and values."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, eos_token_id=1, pad_token_id=0)
    return _save(MambaForCausalLM(config), path)


def bert_folder(path: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return _save(BertForSequenceClassification(config), path)


def _save(model, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def jsonl(path: Path, content: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def write_recipe(folder: Path, **sections) -> Path:
    """A recipe over a tiny Llama: 12 steps, of them 4 of pre-launch; `sections` replaces keys in its sections."""
    content = {
        "model": {"name": str(folder / "model")},
        "data": {"name": str(folder / "data.jsonl"), "test_size": 6},
        "task": {"family": "generate", "max_new_tokens": 4},
        "method": "lora-tsd",
        "adapter": {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["q_proj", "down_proj"]},
        "directions": {"prelaunch_steps": 4, "num_directions": 3},
        "optimizer": {"learning_rate": 0.01},
        "training": {"steps": 12, "batch_size": 3, "save_every": 5},
        "evaluation": {"batch_size": 4},
        "output": str(folder / "run"),
    }
    for name, section in sections.items():
        content[name] = {**content[name], **section} if isinstance(section, dict) else section
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def score(task, model, tokenizer, examples, *how) -> dict[str, float]:
    """Every metric of what a model answers to examples of a task; `how` as `answers` takes it."""
    return task.metrics(examples, task.answers(model, tokenizer, examples, *how))
