"""The folder of a run: what it holds, and how it stays whole when the machine stops at any moment.

    recipe.yaml     the recipe with every default spelled out
    metrics.json    losses, scores, timings, versions; its `status` says how far the run is
    train.log       what happened when
    checkpoints/    what a stopped run continues from
    start/          what `method: lora-ga` has taken out of the base weights
    tensorboard/    its curves, where `training.report_to` asks for them
    adapter/        the adapter, as PEFT loads it
    adapter-lora/   the same as a plain LoRA
    model/          instead of both, the whole model where `method: full` trained it
    .lock           held by the process that works on the run

Whatever is written gets a temporary name first and is renamed when it is whole. Trainer writes its checkpoints under
their final name; one counts as complete when it holds `complete.json`, written last, and every file that one lists,
with the sum it lists for it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from ..errors import InputError, one_line
from ..files.whole import sha256, temporary_names, write_folder, write_text
from ..recipes.reading import load_as
from ..recipes.shared import Section

COMPLETE = "complete.json"

_PROGRESS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "seconds": (int, float),
    "loss": list,
    "peak_memory_bytes": (int, type(None)),
}

# What may differ when a run is continued: it changes where results lie and how much memory is used, not the results.
MAY_DIFFER = {"output", "description", "evaluation.batch_size", "training.report_to"}

# What a run of a method did that was begun before there was a key for it.
_BEFORE = {method: {"directions.keep_prelaunch": False} for method in ("lora-init", "lora-tsd")}


class RunFolder:
    """Paths of a run's files, and the verbs that write them."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.json"
        self.log = self.path / "train.log"
        self.checkpoints = self.path / "checkpoints"
        self.start = self.path / "start"
        self.adapter = self.path / "adapter"
        self.adapter_lora = self.path / "adapter-lora"
        self.model = self.path / "model"

    def check_free(self) -> None:
        """Refuse a folder that exists.

        Raises:
            InputError: It does.
        """
        if not (self.path.exists() or self.path.is_symlink()):
            return
        hint = "resume=true continues the run in it; " if self.recipe.is_file() else ""
        raise InputError(
            f"output={str(self.path)!r} exists and is not overwritten: {hint}output=FOLDER names a new one"
        )

    def check_resumable(self, recipe: Section) -> None:
        """Refuse to continue what is not there, or was begun with another recipe.

        Raises:
            InputError: With the keys that differ, or the link that leads elsewhere.
        """
        linked = [p for p in (self.checkpoints, self.metrics, *self._by_step()) if p.is_symlink()]
        if linked:
            raise InputError(f"resume=true, and {str(linked[0])!r} is a symbolic link; put what it names in its place")
        if not self.recipe.is_file():
            raise InputError(
                f"resume=true, and output={str(self.path)!r} holds no run to continue; remove resume=true to begin one"
            )
        begun = flat(load_as(type(recipe), str(self.recipe)).model_dump())
        said = flat(yaml.safe_load(self.recipe.read_text(encoding="utf-8")))
        before = _BEFORE.get(str(begun.get("method")), {})
        begun |= {key: value for key, value in before.items() if key not in said}
        now = flat(recipe.model_dump())
        # The labels of a classifier may come from its data, and are in the recipe that was kept.
        unsaid = {"task.labels"} if now.get("task.labels") is None else set()
        for key in sorted((begun.keys() | now.keys()) - MAY_DIFFER - unsaid):
            if begun.get(key) != now.get(key):
                raise InputError(
                    f"resume=true, and {key}={now.get(key)!r} differs from {begun.get(key)!r}, with which the run in "
                    f"{str(self.path)!r} was begun; give the same recipe, or output=FOLDER for a new run"
                )

    def create(self, recipe: Section, metrics: dict[str, Any]) -> None:
        """Make the folder with its recipe and first metrics: all of it, or nothing.

        Raises:
            InputError: It cannot be made there.
        """

        def fill(folder: Path) -> None:
            (folder / self.recipe.name).write_text(recipe.to_yaml(), encoding="utf-8")
            (folder / self.metrics.name).write_text(_json(metrics), encoding="utf-8")

        try:
            write_folder(self.path, fill)
        except OSError as error:
            raise InputError(f"output={str(self.path)!r} cannot be made: {error}; name another folder") from None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other process from working on the run meanwhile. The lock goes with its process, however it ends.

        Raises:
            InputError: Another process is working on it.
        """
        with locked(self.path, "output"):
            yield

    def read_metrics(self) -> dict[str, Any]:
        """The metrics so far.

        Raises:
            InputError: They cannot be read.
        """
        try:
            content = json.loads(self.metrics.read_text(encoding="utf-8"))
            sections = isinstance(content["data"], dict) and isinstance(content.get("score", {}), dict)
            if not (sections and content["status"]):
                raise ValueError("data, score or status is not what a run writes")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"{str(self.metrics)!r} is damaged ({type(error).__name__}: {one_line(error)}); bring it back, or "
                "give output=FOLDER for a new run"
            ) from None
        return dict(content)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Replace the metrics."""
        write_text(self.metrics, _json(metrics))

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step lies, if there is one."""
        return self.checkpoints / f"checkpoint-{step}"

    def mark_complete(self, checkpoint: Path, progress: dict[str, Any]) -> None:
        """Declare a checkpoint complete, keeping `progress` beside it."""
        files = [p for p in checkpoint.rglob("*") if p.is_file() and p.name != COMPLETE]
        sums = {p.relative_to(checkpoint).as_posix(): sha256(p) for p in files}
        write_text(checkpoint / COMPLETE, _json({"sha256": sums, "progress": progress}))

    def last_complete(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint and its progress, or None."""
        for checkpoint in reversed(self._by_step()):
            progress = _progress_of(checkpoint)
            if progress is not None:
                return checkpoint, progress
        return None

    def drop_incomplete(self) -> list[str]:
        """Remove what a stopped process left half-written, and return the names.

        Raises:
            InputError: It cannot be removed.
        """
        dropped = {checkpoint for checkpoint in self._by_step() if _progress_of(checkpoint) is None}
        for kept in (self.start, self.adapter, self.adapter_lora, self.model):
            dropped.update(self.path.glob(temporary_names(kept)))
        dropped.update(self.checkpoints.glob(".checkpoint-*.part"))
        try:
            for folder in dropped:
                shutil.rmtree(folder)
        except OSError as error:
            raise InputError(f"a half-written folder cannot be removed: {one_line(error)}") from None
        return sorted(folder.name for folder in dropped)

    def keep_newest(self, num: int) -> None:
        """Remove all but the newest `num` checkpoints."""
        for checkpoint in self._by_step()[:-num]:
            shutil.rmtree(checkpoint)

    def _by_step(self) -> list[Path]:
        found = [p for p in self.checkpoints.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))


@contextmanager
def locked(folder: Path, given: str) -> Iterator[None]:
    """Keep every other process from working in `folder` meanwhile; `given` is what the user gave it as.

    Raises:
        InputError: Another process is working in it.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"{given}={str(folder)!r} is being worked on by another process; wait for it or stop it first"
        ) from None
    except OSError as error:
        raise InputError(f"{given}={str(folder)!r} cannot be written: {one_line(error)}") from None
    try:
        yield
    finally:
        lock.release()


def _progress_of(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint recorded of its run; None for one that is not complete, or not as it was written."""
    try:
        record = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
        progress: dict[str, Any] = record["progress"]
        # A link, or a name that climbs, leads out of the checkpoint: nothing that a run wrote.
        whole = all(
            (checkpoint / name).resolve() == checkpoint.resolve() / name and sha256(checkpoint / name) == digest
            for name, digest in record["sha256"].items()
        )
        known = all(isinstance(progress[key], expected) for key, expected in _PROGRESS.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return progress if whole and known else None


def _json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys of a recipe's sections with dots between them."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
