"""Does a run that was stopped, at any moment, end with the same adapter as one that was not?

    python tests/harness/stop_runs.py kill --count 50     # SIGKILL
    python tests/harness/stop_runs.py term --count 50     # SIGTERM, what schedulers of clusters send
    python tests/harness/stop_runs.py full --count 20     # a full disk; root, for a small file system of its own

Each trial trains a tiny model from a recipe in a process of its own, stops it, continues it with `resume=true` (and
stops some of those once more) until it finishes. Then both adapters must equal those of the uninterrupted run byte for
byte, and losses and scores in `metrics.json` too; nothing half-written may be left. Half of the moments are uniform
over the run; the other half lie in the windows where files or the adapter's phase change.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets  # noqa: F401  (so that it is read once, and not by every process)
import transformers

from peft_tsd import cli
from peft_tsd.language import training
from peft_tsd.runs.folder import RunFolder
from peft_tsd.schedule import stepping as schedule
from support import text_models

WINDOWS = {
    "creation": (RunFolder, "create"),
    "transition": (schedule, "transition"),
    "checkpoint": (transformers.Trainer, "_save_checkpoint"),
    "completion": (RunFolder, "mark_complete"),
    "adapter": (training, "_save"),
    "export": (training, "export_lora"),
    "metrics": (RunFolder, "write_metrics"),
}


class Moment(NamedTuple):
    """Seconds after the start of the process or, with a window's name, of its `nth` opening."""

    seconds: float
    window: str | None = None
    nth: int = 0


class Ended(NamedTuple):
    """How a process ended."""

    code: int
    """Its exit code, or less than zero: the signal it died from."""
    inside: str | None
    """The window that was open when it was stopped."""
    windows: list[tuple[str, int, float]]
    """Those it passed through: name, how many of that name came before, seconds."""
    seconds: float
    printed: str


def attempt(
    recipe: Path, overrides: list[str], stop: Moment | None, number: int, on_enter: Callable[[str, int], None] | None
) -> Ended:
    """`peft-tsd train` in a process of its own, which gets the signal `number` at the moment `stop`."""
    receiver, sender = os.pipe()
    printed = recipe.parent / "printed"
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(receiver)
            out = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            _watch(sender, on_enter)
            code = cli.main(["train", str(recipe), *overrides])
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(sender)
    start = time.perf_counter()
    due = start + stop.seconds if stop and stop.window is None else None
    opened: dict[str, float] = {}
    passed: list[tuple[str, int, float]] = []
    counts: Counter[str] = Counter()
    inside = None
    rest = ""
    while True:
        wait = None if due is None else max(0.0, due - time.perf_counter())
        if not select.select([receiver], [], [], wait)[0]:
            os.kill(pid, number)
            inside, due, stop = (list(opened) or [None])[-1], None, None
            continue
        data = os.read(receiver, 65536).decode()
        if not data:
            break
        *lines, rest = (rest + data).split("\n")
        for line in lines:
            verb, name = line.split()
            if verb == "enter":
                opened[name] = time.perf_counter()
                if stop and stop.window == name and counts[name] == stop.nth:
                    due = opened[name] + stop.seconds
            else:
                passed.append((name, counts[name], time.perf_counter() - opened.pop(name)))
                counts[name] += 1
    os.close(receiver)
    _, status = os.waitpid(pid, 0)
    return Ended(
        os.waitstatus_to_exitcode(status), inside, passed, time.perf_counter() - start, printed.read_text("utf-8")
    )


def _watch(sender: int, on_enter: Callable[[str, int], None] | None) -> None:
    """Have this process tell when it enters and leaves each window."""
    counts: Counter[str] = Counter()

    def watched(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            os.write(sender, f"enter {name}\n".encode())
            if on_enter is not None:
                on_enter(name, counts[name])
            counts[name] += 1
            try:
                return work(*args, **kwargs)
            finally:
                os.write(sender, f"leave {name}\n".encode())

        return inner

    for name, (owner, attribute) in WINDOWS.items():
        setattr(owner, attribute, watched(name, getattr(owner, attribute)))


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on how it got there."""
    left = [str(p) for p in folder.rglob("*") if p.name.endswith(".part")]
    assert not left, f"left half-written: {left}"
    metrics = json.loads((folder / "metrics.json").read_text("utf-8"))
    assert metrics["status"] == "finished"
    files = [folder / a / f for a in ("adapter", "adapter-lora") for f in ("adapter_model.safetensors", "origin.json")]
    same = {str(file.relative_to(folder)): file.read_bytes() for file in files}
    same |= {key: metrics[key] for key in ("loss", "score", "steps", "trainable_parameters", "data", "base")}
    return same | {"transition": metrics["phase_change"]["step"], "layers": metrics["phase_change"]["layers"]}


def moments(whole: Ended, count: int, rng: random.Random) -> Iterator[Moment]:
    """Half of them anywhere, half in the windows, each kind of window in turn."""
    kinds = sorted({name for name, *_ in whole.windows})
    for i in range(count):
        if i % 2:
            yield Moment(rng.uniform(0, whole.seconds))
        else:
            name, nth, seconds = rng.choice([w for w in whole.windows if w[0] == kinds[i // 2 % len(kinds)]])
            yield Moment(rng.uniform(0, seconds), name, nth)


def stop_and_continue(place: Path, count: int, number: int, rng: random.Random) -> None:
    recipe = text_models.write_recipe(place)
    whole = attempt(recipe, [], None, number, None)
    assert whole.code == 0, whole.printed
    expected = outcome(place / "run")
    inside: Counter[str] = Counter()
    stopped = 0
    for trial, first in enumerate(moments(whole, count, rng)):
        run = place / f"run-{trial}"
        again = rng.random() < 1 / 3
        stop: Moment | None = first
        for _ in range(6):
            resume = ["resume=true"] if (run / "recipe.yaml").exists() else []
            ended = attempt(recipe, [f"output={run}", *resume], stop, number, None)
            if ended.code == 0:
                break
            assert ended.code == -number or (number == signal.SIGTERM and ended.code == 143), ended.printed
            assert "Traceback" not in ended.printed, ended.printed
            stopped += 1
            inside[ended.inside or "elsewhere"] += 1
            stop = Moment(rng.uniform(0, whole.seconds)) if again else None
            again = False
        assert ended.code == 0, ended.printed
        got = outcome(run)
        for key, value in expected.items():
            assert got[key] == value, f"trial {trial}, stopped at {first}: another {key}"
        shutil.rmtree(run)
    where = ", ".join(f"{name} {n}" for name, n in inside.most_common())
    name = signal.Signals(number).name
    print(f"{count} runs, stopped {stopped} times by {name} ({where}): all ended with the same bits")


@contextmanager
def small_disk(path: Path) -> Iterator[Path]:
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "peft-tsd-test", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", str(path)], check=True)


def fill_and_continue(place: Path, count: int, rng: random.Random) -> None:
    recipe = text_models.write_recipe(place)
    whole = attempt(recipe, [], None, 0, None)
    assert whole.code == 0, whole.printed
    expected = outcome(place / "run")
    refused: Counter[str] = Counter()
    with small_disk(place / "disk") as disk:
        ballast = disk / "ballast"
        kinds = sorted({name for name, *_ in whole.windows} - {"creation"})
        for trial in range(count):
            name, nth, _ = rng.choice([w for w in whole.windows if w[0] == kinds[trial % len(kinds)]])
            room = rng.choice([0, 4096, rng.randrange(200_000)])
            run = disk / "run"

            def fill(window: str, so_far: int, at: tuple[str, int] = (name, nth), room: int = room) -> None:
                if (window, so_far) == at:
                    with ballast.open("wb") as file:
                        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(disk).free - room))

            ended = attempt(recipe, [f"output={run}"], None, 0, fill)
            if ended.code != 0:
                assert ended.code == 2, ended.printed
                said = [line for line in ended.printed.splitlines() if line.startswith("peft-tsd:")]
                assert len(said) == 1, ended.printed
                assert "no room to write" in said[0], said[0]
                assert "Traceback" not in ended.printed, ended.printed
                refused[name] += 1
                checkpoints = [w for w in ended.windows if w[0] == "completion"]
                if len(checkpoints) > (name == "completion"):
                    assert RunFolder(run).last_complete() is not None
                ballast.unlink()
                ended = attempt(recipe, [f"output={run}", "resume=true"], None, 0, None)
                assert ended.code == 0, ended.printed
            ballast.unlink(missing_ok=True)
            got = outcome(run)
            for key, value in expected.items():
                assert got[key] == value, f"trial {trial}, full at {name} {nth} but for {room} bytes: another {key}"
            shutil.rmtree(run)
    where = ", ".join(f"{name} {n}" for name, n in refused.most_common())
    print(
        f"{count} runs on a disk that became full, {sum(refused.values())} of them stopped by it ({where}): all said "
        "so in one line, and continued to the same bits"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("how", nargs="+", choices=["kill", "term", "full"])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    for how in args.how:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            text_models.place_in(place, 20)
            if how == "full":
                fill_and_continue(place, args.count, rng)
            else:
                stop_and_continue(place, args.count, signal.SIGKILL if how == "kill" else signal.SIGTERM, rng)


if __name__ == "__main__":
    main()
