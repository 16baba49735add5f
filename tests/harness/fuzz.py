"""Can a recipe or an adapter do more than be refused in one line?

    pip install atheris==3.0.0                              # for CPython 3.11 to 3.13
    python tests/harness/fuzz.py recipe --cases 100000
    python tests/harness/fuzz.py adapter --cases 20000

Recipes and adapters changed as `hostile` describes, steered by the branches of this package that they reach
(libFuzzer, through atheris). A recipe must load, or be refused with a RecipeError. An adapter must pass
`check_adapter`, fit its model and export to a plain LoRA, or be refused with a ValueError. Every message
must be one printable line. Any other exception ends the harness with its traceback and the input that caused it.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import atheris
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model

with atheris.instrument_imports(include=["peft_tsd"]):
    import hostile

    from peft_tsd import TsdConfig, export_lora
    from peft_tsd.errors import RecipeError
    from peft_tsd.language.recipe import Recipe, load_recipe
    from peft_tsd.tuner.checking import check_adapter, check_onto
    from support import text_models, tiny


class Draw:
    """`hostile.Choices` from the fuzzer's bytes."""

    def __init__(self, data: bytes) -> None:
        self._provider = atheris.FuzzedDataProvider(data)

    def integer(self, low: int, high: int) -> int:
        return self._provider.ConsumeIntInRange(low, high)

    def data(self, most: int) -> bytes:
        return self._provider.ConsumeBytes(most)


def recipe_case(place: Path, outcomes: Counter[str]) -> Any:
    valid = yaml.safe_load(text_models.write_recipe(place).read_text())
    known = [f"{s}.{k}" for s in valid for k in getattr(Recipe.model_fields[s].annotation, "model_fields", [])]
    known += list(Recipe.model_fields)
    path = place / "changed.yaml"

    def case(choices: Draw) -> None:
        path.write_bytes(hostile.change_recipe(choices, valid, known))
        try:
            load_recipe(str(path), hostile.overrides(choices, known))
            outcomes["loaded"] += 1
        except RecipeError as error:
            hostile.assert_one_line(error)
            outcomes["refused"] += 1

    return case


def adapter_case(place: Path, outcomes: Counter[str]) -> Any:
    valid = []
    for method in ("lora-dash", "lora-init", "lora-tsd"):
        model = get_peft_model(
            tiny.llama(), tiny.config(method, target_modules=["q_proj"], modules_to_save=["lm_head"])
        )
        tiny.train(model, 4)
        folder = place / method
        model.save_pretrained(folder)
        whole = (folder / "adapter_model.safetensors").read_bytes()
        valid.append((json.loads((folder / "adapter_config.json").read_text()), whole))
    lora = place / "lora"
    get_peft_model(tiny.llama(), LoraConfig(r=3, target_modules=["q_proj"])).save_pretrained(lora)
    whole = (lora / "adapter_model.safetensors").read_bytes()
    valid.append((json.loads((lora / "adapter_config.json").read_text()), whole))
    known = [field.name for field in fields(TsdConfig)]
    changed, out = place / "changed", place / "out"
    changed.mkdir()
    with torch.device("meta"):
        config = tiny.llama().config

    def case(choices: Draw) -> None:
        hostile.change_adapter(choices, changed, *hostile.pick(choices, valid), known)
        outcome = "refused"
        try:
            found = check_adapter(changed)
            outcome = "passed, and did not fit"
            with torch.device("meta"):
                skeleton = transformers.LlamaForCausalLM(config)
            check_onto(changed, found, skeleton, "base")
            outcome = "passed, and fitted"
            if isinstance(found, TsdConfig):
                export_lora(changed, out)
                outcome = "passed, fitted and was exported"
        except ValueError as error:
            hostile.assert_one_line(error)
        outcomes[outcome] += 1
        shutil.rmtree(out, ignore_errors=True)

    return case


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recipe", "adapter"])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    outcomes: Counter[str] = Counter()
    place = Path(tempfile.mkdtemp())
    case = (recipe_case if args.what == "recipe" else adapter_case)(place, outcomes)
    started = time.perf_counter()

    def one(data: bytes) -> None:
        case(Draw(data))
        if outcomes.total() == args.cases:
            shutil.rmtree(place)
            shares = ", ".join(f"{n} {name}" for name, n in outcomes.most_common())
            print(
                f"{args.cases} cases of {args.what} in {time.perf_counter() - started:.0f} s: {shares}; nothing else"
            )
            sys.stdout.flush()
            os._exit(0)

    atheris.Setup([sys.argv[0], f"-seed={args.seed}", "-max_len=512", "-len_control=0", "-verbosity=0"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
