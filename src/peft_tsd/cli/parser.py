"""The command line's verbs and options. `run` is the module in this folder and the function that does a verb."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import shtab

RECIPE = {"bash": "_peft_tsd_recipe", "zsh": "_peft_tsd_recipe"}

COMPLETED_BY = {
    **dict.fromkeys(("recipe", "name", "names"), RECIPE),
    **dict.fromkeys(("adapter", "path", "out", "trajectory"), shtab.DIRECTORY),
    **dict.fromkeys(("base", "tuned"), shtab.FILE),
}
"""What a shell completes an argument of that name by: the name of a recipe or a file, a folder, a file."""

FUNCTIONS = {
    "bash": """\
_peft_tsd_recipe() {{
  compgen -W "{recipes}" -- "$1"
  compgen -f -- "$1"
}}
""",
    "zsh": """\
_peft_tsd_recipe() {{
  _alternative 'recipes:recipe:({recipes})' 'files:file:_files'
}}
""",
}


class PrintCompletion(argparse.Action):
    """Prints the script by which a shell completes the command, and ends the program."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        recipes = " ".join(sorted(path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")))
        completed = make_parser()
        for action in _actions(completed):
            if action.dest in COMPLETED_BY:
                action.complete = COMPLETED_BY[action.dest]  # type: ignore[attr-defined]  # where shtab looks for it
        print(shtab.complete(completed, shell=values, preamble=FUNCTIONS[values].format(recipes=recipes)))
        parser.exit()


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser, and of its verbs."""
    for action in parser._actions:
        yield action
        for verb in action.choices.values() if isinstance(action.choices, dict) else ():
            yield from _actions(verb)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-tsd", description="Fine-tuning along task-specific directions.")
    parser.add_argument("--version", action="version", version=f"peft-tsd {version('peft-tsd')}")
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=sorted(FUNCTIONS),
        metavar="SHELL",
        help="print the script with which bash or zsh completes this command",
    )
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    train = verbs.add_parser("train", help="train an adapter as a recipe says, and score it before and after")
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a recipe's name (see: peft-tsd recipes)")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. method=lora training.steps=100")
    train.set_defaults(run=("language", "train"))

    compare = verbs.add_parser("compare", help="train and score several methods alike, and say which is better")
    compare.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a recipe's name")
    compare.add_argument("overrides", metavar="key=value", nargs="*", help="for every run, e.g. training.steps=100")
    compare.add_argument("--methods", metavar="M,M", help="by default base,full,lora,dora,pissa,adalora,lora-…")
    compare.add_argument("--variants", metavar="V,V", help="instead: rows of the recipe's choice of variant")
    compare.add_argument("--ranks", metavar="R,R", help="e.g. 4,8; the recipe's without it")
    compare.add_argument("--seeds", default="0,1,2", metavar="S,S", help="(default 0,1,2)")
    compare.add_argument(
        "--tasks", metavar="T,T", help="of a recipe that has a choice of task; its default without it"
    )
    compare.add_argument("--rates", metavar="LR,LR", help="do every run with each: held-out loss over learning rate")
    compare.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V,V", help="e.g. directions.prelaunch_steps=25,50,100"
    )
    compare.add_argument("--tune", metavar="KEY=V,V", help="choose for each method on validation rows: lr=1e-4,1e-3")
    compare.add_argument("--validation-size", type=int, default=200, metavar="N", help="of --tune (default 200)")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    compare.add_argument("--out", metavar="DIR", help="the folder (default comparisons/RECIPE); continued if there")
    compare.set_defaults(run=("language", "compare"))

    evaluate = verbs.add_parser("evaluate", help="score an adapter and print JSON")
    evaluate.add_argument("path", metavar="RUN_OR_ADAPTER", help="a run folder, or an adapter's folder")
    evaluate.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. data.test_size=500")
    evaluate.add_argument("--recipe", help="on what to score; by default the recipe of the run")
    evaluate.set_defaults(run=("language", "evaluate"))

    export = verbs.add_parser("export", help="write an adapter as a plain LoRA")
    export.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder, or a run folder")
    export.add_argument("out", metavar="OUT", help="the folder to make")
    export.add_argument("--rank", type=int, help="compress to this rank; exact without it")
    export.add_argument("--kohya", action="store_true", help="diffusion models: also in the keys that WebUIs read")
    export.add_argument("--gguf", metavar="FILE", help="also write this file for llama.cpp and Ollama, by llama.cpp's")
    export.add_argument("--converter", metavar="PATH", help="its convert_lora_to_gguf.py, or its folder; else on PATH")
    export.add_argument("--base", metavar="DIR", help="of --gguf: the base model's folder, for its configuration")
    export.set_defaults(run=("language", "export"))

    push = verbs.add_parser("push", help="upload a finished run to the Hugging Face hub, with a card")
    push.add_argument("run_folder", metavar="RUN", help="a run folder")
    push.add_argument("name", metavar="NAME", help="the repository: OWNER/NAME, or NAME for one of your own")
    push.add_argument("--public", action="store_true", help="make the repository public; it is private without it")
    push.add_argument("--dry-run", action="store_true", help="show the files and the card, and push nothing")
    push.add_argument("--out", metavar="DIR", help="write the files into this folder, and push nothing")
    push.set_defaults(run=("push", "push_run"))

    explore = verbs.add_parser("explore", help="show what fine-tuning changed, along each weight's core directions")
    explore.add_argument(
        "base",
        metavar="BASE",
        nargs="?",
        help="the model before: a hub name, a folder, or a GGUF file; without it, what a run or an adapter names",
    )
    explore.add_argument(
        "tuned", metavar="TUNED", nargs="+", help="the model after: a whole checkpoint, an adapter, or a run folder"
    )
    explore.add_argument("--out", required=True, metavar="DIR", help="the folder to make, for the report and its data")
    explore.add_argument(
        "--num-directions", type=int, default=8, metavar="N", help="task-specific directions a weight (default 8)"
    )
    explore.add_argument("--eps", type=float, default=1e-6, help="ε of the change rate, in σ's unit (default 1e-6)")
    explore.add_argument(
        "--modules", metavar="NAME,NAME", help="only these, e.g. q_proj,k_proj; by default all linear"
    )
    explore.add_argument("--trajectory", metavar="FOLDER", help="rates that DirectionRecorder stored during training")
    explore.add_argument(
        "--predicted", type=int, default=8, metavar="N", help="highest rates of a recorded step compared (default 8)"
    )
    explore.add_argument(
        "--true", type=int, default=8, metavar="N", help="highest rates of the first TUNED compared (default 8)"
    )
    explore.add_argument("--device", default="cpu", help="where to compute: cpu (default) or cuda")
    explore.set_defaults(run=("explore", "explore"))

    recipes = verbs.add_parser("recipes", help="list the recipes that come with the package, or show one")
    recipes.set_defaults(run=("recipes", "list_recipes"))
    actions = recipes.add_subparsers(metavar="list | show NAME | check [NAME]")
    actions.add_parser("list", help="list them").set_defaults(run=("recipes", "list_recipes"))
    show = actions.add_parser("show", help="print one; with overrides, what it comes to with every default")
    show.add_argument("name", metavar="NAME")
    show.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. rank=16")
    show.set_defaults(run=("recipes", "show_recipe"))
    check = actions.add_parser("check", help="build each one's model without weights and count what it trains")
    check.add_argument("names", metavar="NAME", nargs="*", help="all without it")
    check.set_defaults(run=("recipes", "check_recipes"))
    return parser
