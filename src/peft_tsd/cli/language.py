"""Verbs on language models."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

from .. import compare as comparing
from .. import language
from ..distributed.sharded import is_main_process
from ..errors import InputError
from ..export import export_lora
from ..export.gguf import find_converter, write_gguf
from ..files.adapters import CONFIG
from ..language.recipe import apply_overrides, load_recipe
from ..recipes.reading import find_recipe
from ..runs.stopping import Interrupted
from .screen import BAD_INPUT, DONE, INTERRUPTED, near, say_how_to_resume, screen
from .summary import summary
from .values import adapter_folder, numbers, rates, values_of


def train(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    with screen():
        try:
            result = language.train(recipe)
        except Interrupted as interrupted:
            say_how_to_resume(interrupted.folder)
            return 128 + interrupted.signal
    text = summary(result)  # what is sharded is read by all
    if is_main_process():
        print(text)
    return DONE


def compare(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out or Path("comparisons") / find_recipe(arguments.recipe).stem).expanduser()
    plan = comparing.make_plan(
        arguments.recipe,
        arguments.overrides,
        methods=_listed(arguments.methods),
        variants=_listed(arguments.variants),
        ranks=numbers("--ranks", arguments.ranks),
        seeds=numbers("--seeds", arguments.seeds) or (),
        tasks=_listed(arguments.tasks),
        rates=rates("--rates", arguments.rates),
        vary=dict(values_of("--vary", given) for given in arguments.vary),
        tune=values_of("--tune", arguments.tune) if arguments.tune is not None else None,
        validation_size=arguments.validation_size,
    )
    with screen():
        try:
            result = comparing.compare(plan, out, jobs=arguments.jobs, command=shlex.join(["peft-tsd", *sys.argv[1:]]))
        except comparing.Stopped:
            print(f"interrupted; the same command continues, with what is done in {near(out)}", file=sys.stderr)
            return INTERRUPTED
    print(f"\n{result.document}\nresults   {near(out / 'results.json')}\nreport    {near(out / 'report.html')}")
    return DONE if all(row["status"] == "finished" for row in result.rows) else BAD_INPUT


def _listed(given: str | None) -> list[str] | None:
    return None if given is None else given.split(",")


def evaluate(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    with screen():
        score = language.evaluate(arguments.path, recipe, lambda found: apply_overrides(found, arguments.overrides))
    print(json.dumps(score, indent=2))
    return DONE


def export(arguments: argparse.Namespace) -> int:
    adapter = adapter_folder(arguments.adapter)
    if arguments.kohya:
        raise InputError(f"--kohya is for the adapters of diffusion models, and {arguments.adapter!r} holds none")
    if not (adapter / CONFIG).is_file():
        raise InputError(f"{arguments.adapter!r} holds no {CONFIG}; give an adapter's folder or a run folder")
    out = Path(arguments.out).expanduser()
    gguf = None if arguments.gguf is None else Path(arguments.gguf).expanduser()
    # What cannot be converted is said before anything is written.
    converter = None if gguf is None else find_converter(arguments.converter, out, gguf)
    if gguf is not None and gguf.exists():
        raise InputError(f"--gguf {arguments.gguf!r} exists and is not overwritten; name another file")
    try:
        print(export_lora(adapter, out, rank=arguments.rank))
        if gguf is not None and converter is not None:
            write_gguf(out, gguf, converter, arguments.base)
            print(f"GGUF: {near(gguf)}")
    except (ValueError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from None
    return DONE
