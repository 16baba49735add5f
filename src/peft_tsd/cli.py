"""The command line: train, evaluate, export, explore, recipes."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import logging
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .choices import combinations
from .recipe import (
    RecipeError,
    apply_overrides,
    choices_of,
    describe,
    find_recipe,
    kind_of,
    load_recipe,
    parse_yaml,
    shipped_recipes,
)

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130  # a run stopped by a signal ends with 128 + its number


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 130 interrupted, 143 terminated."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    # argparse takes key=value before or after the options, and not on both sides.
    if rest and not ("overrides" in arguments and all(re.fullmatch(r"[\w.]+=.*", given, re.DOTALL) for given in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    try:
        result: int = arguments.run(arguments)
    except RecipeError as error:
        print(f"peft-tsd: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("peft-tsd: interrupted", file=sys.stderr)
        return INTERRUPTED
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="peft-tsd", description="Fine-tuning along task-specific directions.")
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")

    train = verbs.add_parser("train", help="train an adapter as a recipe says, and score it before and after")
    train.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a recipe's name (see: peft-tsd recipes)")
    train.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. method=lora training.steps=100")
    train.set_defaults(run=_train)

    compare = verbs.add_parser("compare", help="train and score several methods alike, and say which is better")
    compare.add_argument("recipe", metavar="RECIPE", help="a YAML file, or a recipe's name")
    compare.add_argument("overrides", metavar="key=value", nargs="*", help="for every run, e.g. training.steps=100")
    compare.add_argument("--methods", metavar="M,M", help="by default base,full,lora,dora,pissa,adalora,lora-…")
    compare.add_argument("--ranks", metavar="R,R", help="e.g. 4,8; the recipe's without it")
    compare.add_argument("--seeds", default="0,1,2", metavar="S,S", help="(default 0,1,2)")
    compare.add_argument(
        "--tasks", metavar="T,T", help="of a recipe that has a choice of task; its default without it"
    )
    compare.add_argument(
        "--vary", action="append", default=[], metavar="KEY=V,V", help="e.g. directions.prelaunch_steps=25,50,100"
    )
    compare.add_argument("--tune", metavar="KEY=V,V", help="choose for each method on validation rows: lr=1e-4,1e-3")
    compare.add_argument("--validation-size", type=int, default=200, metavar="N", help="of --tune (default 200)")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default 1)")
    compare.add_argument("--out", metavar="DIR", help="the folder (default comparisons/RECIPE); continued if there")
    compare.set_defaults(run=_compare)

    evaluate = verbs.add_parser("evaluate", help="score an adapter and print JSON")
    evaluate.add_argument("path", metavar="RUN_OR_ADAPTER", help="a run folder, or an adapter's folder")
    evaluate.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. data.test_size=500")
    evaluate.add_argument("--recipe", help="on what to score; by default the recipe of the run")
    evaluate.set_defaults(run=_evaluate)

    export = verbs.add_parser("export", help="write an adapter as a plain LoRA")
    export.add_argument("adapter", metavar="ADAPTER", help="an adapter's folder, or a run folder")
    export.add_argument("out", metavar="OUT", help="the folder to make")
    export.add_argument("--rank", type=int, help="compress to this rank; exact without it")
    export.add_argument("--kohya", action="store_true", help="diffusion models: also in the keys that WebUIs read")
    export.set_defaults(run=_export)

    explore = verbs.add_parser("explore", help="show what fine-tuning changed, along each weight's core directions")
    explore.add_argument("base", metavar="BASE", help="the model before: a hub name, a folder, or a GGUF file")
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
    explore.set_defaults(run=_explore)

    recipes = verbs.add_parser("recipes", help="list the recipes that come with the package, or show one")
    recipes.set_defaults(run=_list_recipes)
    actions = recipes.add_subparsers(metavar="list | show NAME | check [NAME]")
    actions.add_parser("list", help="list them").set_defaults(run=_list_recipes)
    show = actions.add_parser("show", help="print one; with overrides, what it comes to with every default")
    show.add_argument("name", metavar="NAME")
    show.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. rank=16")
    show.set_defaults(run=_show_recipe)
    check = actions.add_parser("check", help="build each one's model without weights and count what it trains")
    check.add_argument("names", metavar="NAME", nargs="*", help="all without it")
    check.set_defaults(run=_check_recipes)
    return parser


def _train(arguments: argparse.Namespace) -> int:
    if kind_of(arguments.recipe) == "dreambooth":
        return _train_dreambooth(arguments)
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from . import training

    with _screen():
        try:
            result = training.train(recipe)
        except training.Interrupted as interrupted:
            _say_how_to_resume(interrupted.folder)
            return 128 + interrupted.signal
    print(_summary(result))
    return DONE


def _compare(arguments: argparse.Namespace) -> int:
    if kind_of(arguments.recipe) == "dreambooth":
        return _compare_dreambooth(arguments)
    from . import compare as comparing

    out = Path(arguments.out or Path("comparisons") / find_recipe(arguments.recipe).stem).expanduser()
    plan = comparing.make_plan(
        arguments.recipe,
        arguments.overrides,
        methods=arguments.methods.split(",") if arguments.methods is not None else comparing.METHODS,
        ranks=_numbers("--ranks", arguments.ranks),
        seeds=_numbers("--seeds", arguments.seeds) or (),
        tasks=arguments.tasks.split(",") if arguments.tasks is not None else None,
        vary=dict(_values("--vary", given) for given in arguments.vary),
        tune=_values("--tune", arguments.tune) if arguments.tune is not None else None,
        validation_size=arguments.validation_size,
    )
    with _screen():
        try:
            result = comparing.compare(plan, out, jobs=arguments.jobs, command=shlex.join(["peft-tsd", *sys.argv[1:]]))
        except comparing.Stopped:
            print(f"interrupted; the same command continues, with what is done in {_near(out)}", file=sys.stderr)
            return INTERRUPTED
    print(f"\n{result.document}\nresults   {_near(out / 'results.json')}\nreport    {_near(out / 'report.html')}")
    return DONE if all(row["status"] == "finished" for row in result.rows) else BAD_INPUT


def _compare_dreambooth(arguments: argparse.Namespace) -> int:
    for option, given in (("--tasks", arguments.tasks), ("--vary", arguments.vary), ("--tune", arguments.tune)):
        if given:
            raise RecipeError(f"{option} {given!r} has no meaning for {arguments.recipe!r}; vary --methods or --ranks")
    if arguments.jobs != 1:
        raise RecipeError(f"--jobs={arguments.jobs} has no meaning for {arguments.recipe!r}; its runs share one GPU")
    command = _diffusion()
    from .stopping import Interrupted

    out = Path(arguments.out or Path("comparisons") / find_recipe(arguments.recipe).stem).expanduser()
    try:
        result = command.compare(
            arguments.recipe,
            arguments.overrides,
            out,
            methods=arguments.methods.split(",") if arguments.methods is not None else None,
            ranks=_numbers("--ranks", arguments.ranks),
            seeds=_numbers("--seeds", arguments.seeds) or (),
            screen=_screen,
        )
    except Interrupted:
        print(f"interrupted; the same command continues, with what is done in {_near(out)}", file=sys.stderr)
        return INTERRUPTED
    print(command.comparison_summary(result, _near))
    return DONE


def _numbers(option: str, given: str | None) -> list[int] | None:
    if given is None:
        return None
    try:
        return [int(number) for number in given.split(",")]
    except ValueError:
        raise RecipeError(f"{option}={given!r} must be whole numbers with commas between, such as 4,8") from None


def _values(option: str, given: str) -> tuple[str, list[Any]]:
    key, equals, values = given.partition("=")
    if not equals or not key or not values:
        raise RecipeError(f"{option} {given!r} must be a key and its values, such as {option} lr=1e-4,1e-3")
    return key, [parse_yaml(value, f"{option} {given!r}") for value in values.split(",")]


def _train_dreambooth(arguments: argparse.Namespace) -> int:
    command = _diffusion()
    from .stopping import Interrupted

    try:
        result = command.run(arguments.recipe, arguments.overrides, _screen)
    except Interrupted as interrupted:
        _say_how_to_resume(interrupted.folder)
        return 128 + interrupted.signal
    print(command.summary(result, _command(), _near))
    return DONE


def _diffusion() -> Any:
    """The part of the package that teaches diffusion models."""
    for module in ("diffusers", "PIL"):
        if importlib.util.find_spec(module) is None:
            raise RecipeError("teaching a diffusion model needs more packages: pip install 'peft-tsd[diffusion]'")
    return importlib.import_module("peft_tsd.diffusion.command")


def _evaluate(arguments: argparse.Namespace) -> int:
    recipe = load_recipe(arguments.recipe) if arguments.recipe else None
    from .training import evaluate

    with _screen():
        score = evaluate(arguments.path, recipe, lambda found: apply_overrides(found, arguments.overrides))
    print(json.dumps(score, indent=2))
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    folder = Path(arguments.adapter).expanduser()
    # A run folder stands for its adapter.
    adapter = folder / "adapter" if (folder / "adapter").is_dir() else folder
    if any(adapter.glob("*/adapter_config.json")):
        return _export_dreambooth(adapter, arguments)
    if arguments.kohya:
        raise RecipeError(f"--kohya is for the adapters of diffusion models, and {arguments.adapter!r} holds none")
    if not (adapter / "adapter_config.json").is_file():
        raise RecipeError(
            f"{arguments.adapter!r} holds no adapter_config.json; give an adapter's folder or a run folder"
        )
    from .export import export_lora

    try:
        print(export_lora(adapter, Path(arguments.out).expanduser(), rank=arguments.rank))
    except (ValueError, OSError) as error:
        raise RecipeError(" ".join(str(error).split())) from None
    return DONE


def _export_dreambooth(adapter: Path, arguments: argparse.Namespace) -> int:
    _diffusion()
    from .diffusion import export_diffusers

    out = Path(arguments.out).expanduser()
    try:
        print(export_diffusers(adapter, out, rank=arguments.rank, kohya=arguments.kohya))
    except (ValueError, OSError) as error:
        raise RecipeError(" ".join(str(error).split())) from None
    return DONE


def _explore(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out).expanduser()
    from . import explore as exploring
    from .explore.command import explore_into, report_lines

    with _screen():
        try:
            result = explore_into(
                out,
                arguments.base,
                arguments.tuned,
                num_directions=arguments.num_directions,
                eps=arguments.eps,
                modules=arguments.modules.split(",") if arguments.modules is not None else None,
                trajectory=arguments.trajectory,
                predicted=arguments.predicted,
                true=arguments.true,
                device=arguments.device,
            )
        except (exploring.ExploreError, OSError) as error:
            raise RecipeError(" ".join(str(error).split())) from None
    print("\n".join([*report_lines(*result), "", f"report   {_near(out / 'report.html')}"]))
    return DONE


def _list_recipes(arguments: argparse.Namespace) -> int:
    width = max(map(len, shipped_recipes()))
    for name, path in shipped_recipes().items():
        print(f"{name:{width}}  {describe(str(path))}")
        for choice, (_, table) in choices_of(str(path)).items():
            print(f"{'':{width}}  {choice}={'|'.join(table)}")
    print("\npeft-tsd recipes show NAME prints one; peft-tsd train NAME runs it.")
    return DONE


def _show_recipe(arguments: argparse.Namespace) -> int:
    if arguments.overrides:
        print(_load(arguments.name, arguments.overrides).to_yaml(), end="")
    else:
        print(find_recipe(arguments.name).read_text(encoding="utf-8"), end="")
    return DONE


def _load(reference: str, overrides: Sequence[str]) -> Any:
    """A recipe of whatever kind it is."""
    if kind_of(reference) == "dreambooth":
        from .diffusion.recipe import load_recipe as load_dreambooth

        return load_dreambooth(reference, overrides)
    return load_recipe(reference, overrides)


def _check_recipes(arguments: argparse.Namespace) -> int:
    from . import recipe_check

    with _screen():
        for name in arguments.names or shipped_recipes():
            check: Any = recipe_check if kind_of(name) is None else _diffusion()
            lines = [name]
            for overrides in combinations(choices_of(name)):
                parts = check.check_recipe_model(_load(name, overrides))
                trained = " + ".join(f"{part} {count:,}" for part, count in parts.items())
                lines.append(f"  {' '.join(overrides):22} {sum(parts.values()):>12,} = {trained}")
            print("\n".join(lines))
    return DONE


@contextmanager
def _screen() -> Iterator[None]:
    """Shows what a run logs, and keeps other libraries' chatter off the screen."""
    import transformers

    transformers.logging.set_verbosity_error()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(lambda record: not getattr(record, "file_only", False))
    logger = logging.getLogger("peft_tsd")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            # What other libraries say to each other's authors.
            warnings.simplefilter("ignore", FutureWarning)
            # Said at every save of an adapter whose base model is no folder with a config.json, such as a GGUF file.
            warnings.filterwarnings("ignore", message="Could not find a config file")
            yield
    finally:
        logger.removeHandler(handler)


def _say_how_to_resume(folder: Path) -> None:
    recipe = folder / "recipe.yaml"
    if recipe.is_file():
        command = f"{_command()} train {shlex.quote(_near(recipe))} resume=true"
        print(f"interrupted; to continue:\n  {command}", file=sys.stderr)
    else:
        print("interrupted before anything was written", file=sys.stderr)


def _summary(result: Any) -> str:
    folder, metrics = result.folder, result.metrics
    score, loss = metrics["score"], metrics["loss"]
    before = f"{score['before']:.3f} -> " if "before" in score else ""
    majority = f" (the most frequent label alone: {score['majority']:.3f})" if "majority" in score else ""
    lines = [
        "",
        f"{score['metric']} of {score['questions']} unseen questions: {before}{score['after']:.3f}{majority}",
        *_by_task(score),
        f"trained: {metrics['trainable_parameters']:,} of {metrics['total_parameters']:,} parameters, "
        f"{metrics['seconds_per_step']:.2f} s a step",
    ]
    if loss:
        lines.append(f"loss: {loss[0]['loss']:.3f} at step 1, {loss[-1]['loss']:.3f} at step {loss[-1]['step']}")
    change = metrics["phase_change"]
    if change:
        lines.append(f"directions identified after step {change['step']}, in {change['seconds']:.1f} s")
    if result.model is None:
        lines.append("the run had been finished before; nothing was done")
    elif change:
        from .model import Directions

        directions = result.model.directions()
        most = sorted(directions, key=lambda name: -float(directions[name].rates[:1].sum()))[:5]
        shown = Directions({name: directions[name] for name in most}, directions.prelaunch_steps)
        lines += ["", "most changed layers:", str(shown)]
    lines += ["", f"run folder   {_near(folder.path)}"]
    kept = {
        "adapter": folder.adapter,
        "plain LoRA": folder.adapter if metrics["method"] == "lora" else folder.adapter_lora,
        "model": folder.model,
    }
    there = {name: path for name, path in kept.items() if path.exists()}
    lines += [f"{name:12} {_near(path)}" for name, path in there.items()]
    if there:
        lines += ["next:", f"  {_command()} evaluate {shlex.quote(_near(list(there.values())[-1]))}"]
    if folder.adapter_lora.exists():
        lines += [
            f"  {_command()} export {shlex.quote(_near(folder.adapter))} OUT --rank 8",
            f"  {_command()} train {shlex.quote(_near(folder.recipe))} method=lora output=OTHER   # the baseline",
        ]
    return "\n".join(lines).rstrip()


def _by_task(score: dict[str, Any]) -> list[str]:
    """A line a task of a suite, and what was left out."""
    lines = []
    for name, task in score.get("tasks", {}).items():
        values = [
            f"{metric} {task['before'][metric]:.3f} -> {value:.3f}" if "before" in task else f"{metric} {value:.3f}"
            for metric, value in task["after"].items()
        ]
        lines.append(f"  {name:16} {task['questions']:6} questions   {', '.join(values)}")
    if score.get("left_out"):
        lines.append(f"  left out, no data: {', '.join(score['left_out'])}")
    return lines


def _command() -> str:
    """How one would call this program again: by its name where the shell finds it, or by its path."""
    program = Path(sys.argv[0])
    return "peft-tsd" if shutil.which("peft-tsd") or program.name != "peft-tsd" else _near(program.absolute())


def _near(path: Path) -> str:
    """`path` as one would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


if __name__ == "__main__":
    sys.exit(main())
