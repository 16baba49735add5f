"""What to do with an export: load it with PEFT alone, and the commands with which servers take it.

python examples/trainer.py && python examples/serve.py runs/example-trainer/adapter-lora
python examples/serve.py runs/mine/adapter-lora --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from peft import PeftModel  # and nothing of peft_tsd: an export is a plain LoRA
from safetensors import safe_open

import stand_in

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes

parser = argparse.ArgumentParser()
parser.add_argument("adapter", type=Path, help="the folder that export_lora or `peft-tsd train` wrote")
parser.add_argument("--model", help="a hub name or a folder; without it, the stand-in of the other examples")
args = parser.parse_args()

base, tokenizer = stand_in.load(args.model)
model = PeftModel.from_pretrained(base, str(args.adapter)).eval()
prompt = tokenizer("3 plus 4 is", return_tensors="pt", return_token_type_ids=False)
written = model.generate(**prompt, max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id)
print(f"with PEFT: {tokenizer.decode(written[0], skip_special_tokens=True)!r}\n")

config = json.loads((args.adapter / "adapter_config.json").read_text())
with safe_open(args.adapter / "adapter_model.safetensors", "pt") as file:
    ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if re.search(r"lora_A\.weight$", key)}  # noqa: SIM118
rank, name, base_name = max(ranks), args.adapter.parent.name, args.model or "BASE"
if len(ranks) > 1 or config["rank_pattern"]:
    print(f"Layers have ranks {sorted(ranks)}: servers other than PEFT and vLLM scale or refuse these. Export anew.\n")

limit = next((limit for limit in VLLM_RANKS if limit >= rank), None)
print(f"# vLLM: rank {rank}" + ("" if limit else " is more than it takes; export with rank=512 or less"))
print(f"vllm serve {base_name} --enable-lora --max-lora-rank {limit} --lora-modules {name}={args.adapter}\n")
print("# SGLang")
print(
    f"python -m sglang.launch_server --model-path {base_name} --enable-lora --max-lora-rank {rank} "
    f"--lora-paths {name}={args.adapter}\n"
)
print("# llama.cpp, on a base in GGUF")
print(f"python convert_lora_to_gguf.py --base {base_name} --outfile {name}.gguf {args.adapter}")
print(f"llama-server --model BASE.gguf --lora {name}.gguf\n")
print("# Ollama, with the files of llama.cpp")
print(f"printf 'FROM ./BASE.gguf\\nADAPTER ./{name}.gguf\\n' > Modelfile && ollama create {name} -f Modelfile\n")
if rank % 16:
    print(f"# TGI and LoRAX pad ranks to multiples of 16, and scale rank {rank} wrongly: export_lora(..., rank=16).")
