"""Runs, each in a process of its own, several at once, continued where they were stopped.

A process of its own gives every run its own peak of memory and, where there are several, a GPU of its own; and a run
that fails takes no other with it. Processes are forked from one that has read the libraries and nothing else, so that
a run starts at once. When the comparison is killed its runs end with it, and others at work in its folder take them
over (`sharing`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
import transformers
from tqdm.auto import tqdm

from ..errors import InputError, one_line
from ..language.recipe import Recipe, check_recipe
from ..language.training import train
from ..runs.folder import RunFolder
from ..runs.stopping import Interrupted
from .gpus import VISIBLE, visible_gpus
from .sharing import Claim, Failure

TAKEN = 75
"""The exit code of a process that finds another at work on its run."""

TICK = 1.0
"""Seconds between two looks at what others do."""


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
    """Do what is left of `runs`, and wait for those that others do.

    Args:
        runs: In this order.
        at_once: How many at one time here; they share the processor's cores, and its GPUs where these are fewer.
        log: The file for what they print.
        title: Shown before the progress bar.

    Returns:
        What went wrong, by the runs' names.

    Raises:
        InputError: As `finished`, before anything is started.
        Stopped: By Ctrl-C; the runs at work here were stopped at a point they can go on from.
    """
    left = [run for run in runs if finished(run) is None]
    failures = {run.name: Claim(run.recipe.output).failure() for run in left}
    errors: dict[str, str] = {}
    working: dict[Any, tuple[Run, int, Any, Any]] = {}
    if not left:
        return errors
    gpus = visible_gpus()
    free = list(range(at_once))
    with (
        _quiet_children(),
        _stoppable() as stopped,
        tqdm(total=len(runs), initial=len(runs) - len(left), desc=title, unit="run") as bar,
    ):
        if gpus and at_once > len(gpus):
            bar.write(f"--jobs {at_once} on {len(gpus)} GPU{'s' * (len(gpus) > 1)}: runs share them", file=sys.stderr)

        def end(run: Run, error: str | None) -> None:
            if error is not None:
                errors[run.name] = error
                bar.write(f"{run.name}: {error}", file=sys.stderr)
            bar.update()

        start = _starter(at_once, log)
        while working or (left and not stopped()):
            elsewhere = 0
            for run in list(left):
                if stopped():
                    break
                state = _look(run, failures[run.name])
                if state == "taken":
                    elsewhere += 1
                elif state != "free":
                    left.remove(run)
                    end(run, state.error if isinstance(state, Failure) else None)
                elif free:
                    left.remove(run)
                    slot = free.pop(0)
                    process, receiver = start(run, gpus[slot % len(gpus)] if gpus else None)
                    working[process.sentinel] = (run, slot, process, receiver)
            others = [f"{elsewhere} in other processes"] if elsewhere else []
            bar.set_postfix_str(", ".join([run.name for run, *_ in working.values()] + others))
            for sentinel in _wait(list(working)):
                run, slot, process, receiver = working.pop(sentinel)
                process.join()
                free.append(slot)
                if process.exitcode == TAKEN:
                    left = [one for one in runs if one in left or one is run]
                    continue
                error = _outcome(process, receiver)
                if stopped():
                    error = None
                elif error is not None and process.exitcode < 0:
                    Claim(run.recipe.output).fail(error)
                end(run, error)
        if stopped():
            raise Stopped
    return errors


def _look(run: Run, before: Failure | None) -> Literal["free", "taken", "done"] | Failure:
    """Whether a run is free to be done here, or what became of it elsewhere: what went wrong since `before`, if so."""
    claim = Claim(run.recipe.output)
    if claim.is_taken():
        return "taken"
    try:
        if finished(run) is not None:
            return "done"
    except InputError as error:
        return Failure(str(error), "")
    failure = claim.failure()
    return "free" if failure is None or failure == before else failure


def _starter(at_once: int, log: Path) -> Callable[[Run, str | None], tuple[Any, Any]]:
    """What starts a run on a GPU, and gives its process and where it says what went wrong."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    context = _context()

    def start(run: Run, gpu: str | None) -> tuple[Any, Any]:
        receiver, sender = context.Pipe(duplex=False)
        content = run.recipe.model_dump()
        process = context.Process(target=_work, args=(content, threads, gpu, str(log), sender), name=run.name)
        process.start()
        sender.close()
        return process, receiver

    return start


def _wait(sentinels: list[Any]) -> list[Any]:
    """Those of processes that have ended, after a while at most."""
    if not sentinels:
        time.sleep(TICK)
        return []
    return connection.wait(sentinels, timeout=TICK)


def _outcome(process: Any, receiver: Any) -> str | None:
    if process.exitcode == 0:
        return None
    try:
        return str(receiver.recv())
    except EOFError:
        ended = f"signal {-process.exitcode}" if process.exitcode < 0 else f"exit code {process.exitcode}"
        return f"its process ended with {ended}; look for lack of memory, or use fewer --jobs"


def _work(content: dict[str, Any], threads: int, gpu: str | None, log: str, sender: Any) -> None:
    """What the process of a run does."""
    _end_with_parent()
    if gpu is not None:
        os.environ[VISIBLE] = gpu  # nothing has used CUDA in this process, nor in the one it was forked from
    with open(log, "a", encoding="utf-8", buffering=1) as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    if gpu is not None:
        print(f"{content['output']}: {VISIBLE}={os.environ[VISIBLE]}", flush=True)

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    claim = Claim(content["output"])
    with claim.take() as mine:
        if not mine:
            sys.exit(TAKEN)
        claim.begin()
        try:
            recipe = check_recipe(content)
            train(recipe.model_copy(update={"resume": RunFolder(recipe.output).recipe.is_file()}))
        except Interrupted:
            sys.exit(130)
        except Exception as error:
            known = isinstance(error, InputError)
            if not known:
                traceback.print_exc()
            text = str(error) if known else f"{type(error).__name__}: {one_line(error)} (more in {log})"
            claim.fail(text)
            sender.send(text)
            sys.exit(2 if known else 1)


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
    """No progress bars but the comparison's own, no warning of tokenizers about forking; and no import that asks
    whether there is a GPU sets CUDA up, which would not work in what is forked later."""
    wanted = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
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
