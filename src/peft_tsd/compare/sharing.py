"""Several comparisons of one folder, on one machine or many, share out its runs. In the folder lie

    .lock               held while results, or what follows, are written
    .at-work/           a file for each comparison that is at work, with its runs' settings, and the lock it holds
    runs/…/.NAME.lock   held by the process that works on the run NAME
    runs/…/.NAME.failed what went wrong in it last

All locks are the kernel's (flock): they go with their process, however it ends, and on a file system that machines
share with the machine. So what a dead process held is free, and nothing has to be guessed from clocks.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from ..errors import InputError
from ..files.whole import write_text
from ..runs.folder import MAY_DIFFER, flat

PATIENCE = 600.0
"""Seconds that a comparison waits for another to write its results, which takes it one or two."""


class Failure(NamedTuple):
    """What went wrong in a run."""

    error: str
    id: str
    """Another one each time."""


class Claim:
    """Who works on a run, and what went wrong in it last."""

    def __init__(self, output: str | Path) -> None:
        """
        Args:
            output: The run's folder, which need not exist.
        """
        path = Path(output)
        self._lock = path.with_name(f".{path.name}.lock")
        self._failed = path.with_name(f".{path.name}.failed")

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Hold it, or say False where another process does."""
        self._lock.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self._lock, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def is_taken(self) -> bool:
        """Whether a process works on the run."""
        if not self._lock.exists():
            return False
        with self.take() as mine:
            return not mine

    def failure(self) -> Failure | None:
        """What went wrong last, if anything did since it was last begun."""
        try:
            return Failure(**json.loads(self._failed.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def begin(self) -> None:
        """What went wrong before is over."""
        self._failed.unlink(missing_ok=True)

    def fail(self, error: str) -> None:
        """Have others know what went wrong, so that none of them tries it again."""
        write_text(self._failed, json.dumps(Failure(error, uuid.uuid4().hex)._asdict()))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Keep other comparisons from writing their results into `out` meanwhile.

    Raises:
        InputError: One has been at it for minutes.
    """
    lock = FileLock(out / ".lock", timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(
            f"--out={str(out)!r} is held by another process (for a whole comparison, if it is an older version's); "
            "wait for it or stop it first"
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def at_work(out: Path, settings: Mapping[str, Mapping[str, Any]]) -> Iterator[bool]:
    """Be one of those that work in `out`, and say whether there are others.

    Args:
        out: The comparison's folder.
        settings: The recipe of each run, by its folder under `out`.

    Raises:
        InputError: Another is at work there that does one of these runs with other settings.
    """
    folder = out / ".at-work"
    folder.mkdir(exist_ok=True)
    own = folder / f"{uuid.uuid4().hex}.json"
    lock = FileLock(own.with_suffix(".lock"), timeout=0)
    with writing(out):
        others = [content for path in folder.glob("*.json") if (content := _of_one_at_work(path)) is not None]
        for other in others:
            for name in settings.keys() & other.keys():
                _check_alike(out, name, settings[name], other[name])
        lock.acquire()
        write_text(own, json.dumps(settings))
    try:
        yield bool(others)
    finally:
        own.unlink(missing_ok=True)
        lock.release()
        own.with_suffix(".lock").unlink(missing_ok=True)


def _of_one_at_work(path: Path) -> dict[str, Any] | None:
    """The runs of the comparison whose file this is; None, and the file removed, where it has ended."""
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    except Timeout:
        with suppress(FileNotFoundError):  # it has just ended
            return dict(json.loads(path.read_text(encoding="utf-8")))
    return None


def _check_alike(out: Path, name: str, mine: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    ours, theirs = flat(dict(mine)), flat(dict(other))
    for key in sorted((ours.keys() | theirs.keys()) - MAY_DIFFER):
        if ours.get(key) != theirs.get(key):
            raise InputError(
                f"--out={str(out)!r}: {key}={ours.get(key)!r} differs from {theirs.get(key)!r}, with which another "
                f"comparison that is at work there does {name}; give the same settings, or another folder"
            )
