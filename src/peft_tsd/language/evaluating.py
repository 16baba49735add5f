"""Scoring what a run has trained."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import RecipeError
from ..files.adapters import CONFIG
from ..models.origin import check_base, fingerprint
from ..runs.folder import RunFolder
from ..runs.machine import current_device
from ..tuner.checking import check_adapter, check_onto
from ..tuner.opening import put_onto
from .preparing import prepare
from .recipe import Recipe, load_recipe


def evaluate(
    path: str, recipe: Recipe | None = None, change: Callable[[Recipe], Recipe] = lambda r: r
) -> dict[str, Any]:
    """Score the adapter of a run folder, or an adapter folder, native or exported.

    Args:
        path: A run folder (its `adapter/` is scored, or its `model/`), or an adapter's own folder.
        recipe: On what to score; by default the recipe of the run that the adapter lies in.
        change: Applied to that recipe.

    Raises:
        RecipeError: No adapter or no recipe is there, or the recipe cannot be carried out.
    """
    folder = Path(path).expanduser()
    run = RunFolder(folder)
    if run.model.is_dir():
        return _evaluate(change(recipe or find_run(folder)), run.model)
    adapter = folder if (folder / CONFIG).is_file() else run.adapter
    if not (adapter / CONFIG).is_file():
        found = "no finished adapter" if folder.is_dir() else "no such folder"
        raise RecipeError(f"{path!r}: {found}; give a run folder that has adapter/, or an adapter's folder")
    return _evaluate(change(recipe or find_run(folder)), adapter)


def _evaluate(recipe: Recipe, trained: Path) -> dict[str, Any]:
    whole = not (trained / CONFIG).is_file()
    base_name = recipe.model.name
    config = None if whole else check_adapter(trained)
    if whole:
        recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"name": str(trained)})})
    job = prepare(recipe, to_train=False)
    if config is not None:
        check_onto(trained, config, job.load_skeleton(), base_name)
    model = job.load_base()
    if not whole:
        check_base(trained, fingerprint(model), base_name)
        model = put_onto(model, trained, base_name)
    started = time.perf_counter()
    scores = job.scores(model.to(current_device()), "scoring")
    return {
        ("whole_model" if whole else "adapter"): str(trained),
        "model": base_name,
        "metric": job.task.metric,
        "score": job.average(scores),
        "questions": job.questions,
        **({"tasks": scores, "left_out": job.material.left_out} if job.is_suite else {}),
        "seconds": round(time.perf_counter() - started, 2),
    }


def find_run(path: Path) -> Recipe:
    """The recipe of the run that `path`, the run folder or an adapter or checkpoint in it, belongs to.

    That a folder is there does not make the code trusted which its recipe would have run: whoever does trust it says
    so again, with `model.trust_remote_code=true`.

    Raises:
        RecipeError: There is none.
    """
    for folder in (path, *path.absolute().parents[:2]):
        if (folder / "recipe.yaml").is_file():
            recipe = load_recipe(str(folder / "recipe.yaml"))
            model = recipe.model.model_copy(update={"trust_remote_code": False})
            return recipe.model_copy(update={"model": model})
    raise RecipeError(f"no recipe.yaml in or above {str(path)!r}; say on what to score it with --recipe RECIPE")
