"""A finished run as a repository of the Hugging Face hub.

README.md           the card: what was trained, on what, how it scored, how to load it
adapter_*           the plain LoRA, or where a method has none the adapter itself; or the files of a whole model
tokenizer*, ...
native/             the native adapter, which trains on
recipe.yaml         the recipe; paths of this machine are left out of it
metrics.json        the run's metrics
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub import HfApi

from ..errors import InputError, one_line
from ..files.cards import CARD
from ..files.whole import write_folder
from ..recipes.reading import kind_of
from ..runs.folder import RunFolder
from .card import card_of, check_name
from .recipe import Recipe, load_recipe

NATIVE = "native"


class Pushed(NamedTuple):
    """Where a run went."""

    url: str
    files: list[str]


def assemble(run: str | Path, name: str, out: str | Path) -> list[str]:
    """Write what `push` would upload into the folder `out`, all of it or nothing, and return the files' names.

    Args:
        run: A run folder.
        name: Of the repository, as `OWNER/NAME`, or `NAME` for one of your own.
        out: The folder to make.

    Raises:
        InputError: There is no finished run, no such name can be, or `out` exists.
    """
    folder, recipe, metrics = _finished(Path(run).expanduser())
    check_name(name)
    target = Path(out).expanduser()
    if target.exists() or target.is_symlink():
        raise InputError(f"{str(target)!r} exists and is not overwritten; name another folder")

    def fill(to: Path) -> None:
        kept = next(path for path in (folder.model, folder.adapter_lora, folder.adapter) if path.is_dir())
        _copy(kept, to)
        if kept == folder.adapter_lora:
            _copy(folder.adapter, to / NATIVE)
        (to / "recipe.yaml").write_text(_portable(recipe), encoding="utf-8")
        shutil.copyfile(folder.metrics, to / "metrics.json")
        card_of(recipe, metrics, name, to, NATIVE).save(to / CARD)

    try:
        write_folder(target, fill)
    except OSError as error:
        raise InputError(f"{str(target)!r} cannot be made: {one_line(error)}") from None
    return sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())


def push(run: str | Path, name: str, folder: str | Path, *, private: bool = True, api: HfApi | None = None) -> Pushed:
    """Upload a finished run to the hub, in one commit.

    Args:
        run: A run folder.
        name: Of the repository, which is made where it is not there.
        folder: Where to put the files together; it is made, and left.
        private: Whether a repository that is made is private. One that is there stays what it is.
        api: Of the hub; by default that of `HF_ENDPOINT`, with the token of `hf auth login` or `HF_TOKEN`.

    Raises:
        InputError: As `assemble`; or the hub refuses, or cannot be reached.
    """
    files = assemble(run, name, folder)
    api = api or HfApi()
    try:
        repo = api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo.repo_id, folder_path=folder, commit_message=f"{Path(run).name}, trained with peft-tsd"
        )
    except (OSError, ValueError) as error:  # those of huggingface_hub and of its connections are OSErrors
        raise InputError(
            f"{name!r} cannot be pushed: {one_line(error)}; log in with `hf auth login`, or set HF_TOKEN to a token "
            "that may write"
        ) from None
    return Pushed(str(commit.repo_url), files)


def _finished(path: Path) -> tuple[RunFolder, Recipe, dict[str, Any]]:
    folder = RunFolder(path)
    if not folder.recipe.is_file():
        raise InputError(f"{str(path)!r} is no run folder: it has no recipe.yaml; give one that `peft-tsd train` made")
    if kind_of(str(folder.recipe)) is not None:
        raise InputError(
            f"{str(path)!r} is a run of a diffusion model; upload its LoRA with `hf upload NAME {folder.adapter_lora}`"
        )
    metrics = folder.read_metrics()
    if metrics["status"] != "finished":
        raise InputError(f"{str(path)!r} is not finished; `peft-tsd train {folder.recipe} resume=true` continues it")
    if not any(kept.is_dir() for kept in (folder.adapter, folder.model)):
        raise InputError(
            f"{str(path)!r} has trained nothing (method={metrics['method']}), so there is nothing to push"
        )
    return folder, load_recipe(str(folder.recipe)), metrics


def _copy(source: Path, target: Path) -> None:
    linked = [path for path in source.rglob("*") if path.is_symlink()]
    if linked:
        raise InputError(
            f"{str(linked[0])!r} is a symbolic link, which would upload what it names; put that in its place"
        )
    shutil.copytree(source, target, dirs_exist_ok=True)


def _portable(recipe: Recipe) -> str:
    """The recipe as YAML, without where things lie on this machine."""

    def bare(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: bare(one) for key, one in value.items()}
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    content = bare(recipe.model_dump(exclude={"output"}))
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def sizes(folder: Path, files: list[str]) -> dict[str, int]:
    """Bytes of each file."""
    return {name: (folder / name).stat().st_size for name in files}
