"""What does starting cost: the import, and building the adapter?

    python benchmarks/startup.py

Interpreters that import PEFT, and PEFT and this package, are started in turn; and LoRA and LoRA-TSD adapters are
built in turn on one model (12 Llama blocks, 512 wide). Reported: medians, and the difference or ratio of the two,
with quartiles.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel

from peft_tsd import TsdConfig, __version__

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def import_seconds(second: str) -> float:
    """Seconds that `import second` takes after `import peft`, in an interpreter of its own."""
    code = f"import time, peft; t = time.perf_counter(); {second}; print(time.perf_counter() - t)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


def build_seconds(config: LoraConfig) -> float:
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_hidden_layers": 12}
    model = LlamaModel(LlamaConfig(vocab_size=128, **shape))
    start = time.perf_counter()
    get_peft_model(model, config)
    return time.perf_counter() - start


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return middle, low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    added = [import_seconds("import peft_tsd") - import_seconds("pass") for _ in range(args.rounds)]
    ratios = []
    for _ in range(args.rounds):
        lora = build_seconds(LoraConfig(r=8, target_modules=TARGETS))
        ratios.append(build_seconds(TsdConfig(r=8, target_modules=TARGETS)) / lora)
    where = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{where}; torch {torch.__version__}")
    for name, values in (("import peft_tsd adds to import peft, s", added), ("building LoRA-TSD / LoRA", ratios)):
        middle, low, high = quartiles(values)
        print(f"{name:40} {middle:7.3f}  ({low:.3f}-{high:.3f})")
    if args.out:
        results = {"import_added_seconds": quartiles(added), "build_ratio": quartiles(ratios)}
        setting = {"machine": where, "torch": torch.__version__, "peft_tsd": __version__}
        args.out.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
