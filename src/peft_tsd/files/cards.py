"""What stands beside an adapter's weights for whoever finds the folder: a model card, and the tokenizer."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from .adapters import file_in

CARD = "README.md"

HOW_TO_LOAD = (
    "An adapter of the package peft-tsd: install it and `import peft_tsd` before PeftModel.from_pretrained, which "
    "without it ends in KeyError. `peft-tsd export FOLDER OUT` makes a plain LoRA of it, which needs nothing."
)
"""What the configuration of a native adapter says of itself."""

_BEGIN, _END = "<!-- peft-tsd -->", "<!-- /peft-tsd -->"

# What tokenizers of transformers are saved as.
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
)  # fmt: skip


def native_text(method: str, base: str | None) -> str:
    """The section of a native adapter's card."""
    return f"""
## How to load this adapter

An adapter of the method {method} ([task-specific directions](https://arxiv.org/abs/2409.01035)), of PEFT type TSD or
DASH, which PEFT knows once the package `peft-tsd` has been imported. Without it loading ends in `KeyError`.

```py
import peft_tsd
from peft import PeftModel

model = PeftModel.from_pretrained(base, FOLDER)  # base: {base or "the model it was trained on"}
```

`peft-tsd export FOLDER OUT` (or `peft_tsd.export_lora`) makes a plain LoRA of it, the same function, which PEFT, vLLM
and others load without this package.
"""


def export_text(rank: int, exact: bool, base: str | None, pipelines: bool) -> str:
    """The section of an export's card."""
    pipe = "\npipe.load_lora_weights(FOLDER)  # a pipeline of diffusers, in place of the above" if pipelines else ""
    return f"""
## How to load this LoRA

A plain LoRA of rank {rank} and scaling 1 in all layers, {"exactly" if exact else "by compression nearly"} the function
of an adapter trained along task-specific directions. It needs nothing but what loads it; the package `peft-tsd`, which
made it, need not be installed.

```py
from peft import PeftModel

model = PeftModel.from_pretrained(base, FOLDER)  # base: {base or "the model it was trained on"}{pipe}
```
"""


def write_card(folder: Path, section: str, base: str | None, tags: tuple[str, ...]) -> None:
    """Write the card of an adapter, or put `section` into the one that PEFT wrote, in place of an earlier one.

    Args:
        folder: The adapter's, with or without a card.
        section: Markdown.
        base: The base model's name, where it is known.
        tags: For the hub.
    """
    path = folder / CARD
    card = ModelCard.load(path) if path.is_file() else ModelCard(f"---\n{ModelCardData()}\n---\n")
    card.data["library_name"] = "peft"
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), *tags})
    if base is not None:
        card.data["base_model"] = base
    rest = re.sub(f"\n*{_BEGIN}.*{_END}\n*", "", card.text, flags=re.DOTALL)
    card.text = f"\n{_BEGIN}\n{section.strip()}\n{_END}\n{rest}"
    card.save(path)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of the tokenizer that lies beside an adapter, if one does; links out of the folder are refused.

    Raises:
        AdapterError: There is such a link.
    """
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(file_in(source, name), target / name)
