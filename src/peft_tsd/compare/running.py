"""Runs, each in a process of its own, several at once, continued where they were stopped.

A process of its own gives every run its own peak of memory, and a run that fails takes no other with it. Processes are
forked from one that has read the libraries and nothing else, so that a run starts at once. When the comparison is
killed its runs end with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import transformers
from tqdm.auto import tqdm

from ..errors import InputError, one_line
from ..language.recipe import Recipe, check_recipe
from ..language.training import train
from ..runs.folder import RunFolder
from ..runs.stopping import Interrupted


class Run(NamedTuple):
    """A run to do."""

    name: str
    recipe: Recipe


class Stopped(Exception):
    """The user stopped the comparison; what is done is kept."""


def finished(run: Run) -> dict[str, Any] | None:
    """The metrics of a run that was done before, or None.

    Raises:
        InputError: Its folder holds a run with other settings.
    """
    folder = RunFolder(run.recipe.output)
    if not folder.path.exists():
        return None
    folder.check_resumable(run.recipe)
    metrics = folder.read_metrics()
    return metrics if metrics["status"] == "finished" else None


def run_all(runs: Sequence[Run], *, at_once: int, log: Path, title: str) -> dict[str, str]:
    """Do what is left of `runs`.

    Args:
        runs: In this order.
        at_once: How many at one time; they share the processor's cores.
        log: The file for what they print.
        title: Shown before the progress bar.

    Returns:
        What went wrong, by the runs' names.

    Raises:
        InputError: As `finished`, before anything is started.
        Stopped: By Ctrl-C; the runs at work were stopped at a point they can go on from.
    """
    left = deque(run for run in runs if finished(run) is None)
    errors: dict[str, str] = {}
    working: dict[Any, tuple[Run, Any, Any]] = {}
    if not left:
        return errors
    threads = max(1, (os.cpu_count() or 1) // at_once)
    context = _context()
    with (
        _quiet_children(),
        _stoppable() as stopped,
        tqdm(total=len(runs), initial=len(runs) - len(left), desc=title, unit="run") as bar,
    ):
        while working or (left and not stopped()):
            while left and len(working) < at_once and not stopped():
                run = left.popleft()
                receiver, sender = context.Pipe(duplex=False)
                content = run.recipe.model_dump()
                process = context.Process(target=_work, args=(content, threads, str(log), sender), name=run.name)
                process.start()
                sender.close()
                working[process.sentinel] = (run, process, receiver)
            bar.set_postfix_str(", ".join(run.name for run, *_ in working.values()))
            for sentinel in connection.wait(list(working), timeout=1.0):
                run, process, receiver = working.pop(sentinel)
                process.join()
                error = _outcome(process, receiver)
                if error is not None and not stopped():
                    errors[run.name] = error
                    bar.write(f"{run.name}: {error}", file=sys.stderr)
                bar.update()
        if stopped():
            raise Stopped
    return errors


def _outcome(process: Any, receiver: Any) -> str | None:
    if process.exitcode == 0:
        return None
    try:
        return str(receiver.recv())
    except EOFError:
        ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        return f"its process ended with {ended}; look for lack of memory, or use fewer --jobs"


def _work(content: dict[str, Any], threads: int, log: str, sender: Any) -> None:
    """What the process of a run does."""
    _end_with_parent()
    with open(log, "a", encoding="utf-8", buffering=1) as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    try:
        recipe = check_recipe(content)
        train(recipe.model_copy(update={"resume": RunFolder(recipe.output).recipe.is_file()}))
    except Interrupted:
        sys.exit(130)
    except InputError as error:
        sender.send(str(error))
        sys.exit(2)
    except Exception as error:
        traceback.print_exc()
        sender.send(f"{type(error).__name__}: {one_line(error)} (more in {log})")
        sys.exit(1)


def _end_with_parent() -> None:
    """Have this process end when the comparison is killed, so that no two ever work on one run."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _context() -> Any:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__module__])
    return context


@contextmanager
def _quiet_children() -> Iterator[None]:
    """No progress bars but the comparison's own, and no warning of tokenizers about forking."""
    wanted = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ctrl-C reaches the runs too; this process waits until they have stopped."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()
        print("\nstopping the runs at their next safe point", file=sys.stderr)

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
