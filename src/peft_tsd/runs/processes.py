"""Several processes that do one run: how they meet, and the few words they have for each other.

`torchrun`, `accelerate launch` and SLURM's `srun` start one process a device. All do the same, side by side, on rows
of their own; what is written, and what is shown, is the main process's (rank 0). With one process, each of these is
what it would be without it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState  # type: ignore[import-untyped]

from ..distributed.sharded import is_main_process, world
from ..errors import InputError, RecipeError, one_line

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)
"""How long a process waits for the others: what the main one does alone, such as an export, must be done by then."""


# What gloo, NCCL and their store say where another process is gone.
_GONE = r"[Cc]onnection (was )?(closed|reset|refused|aborted)|[Bb]roken pipe|remote process|recvValue failed"


class ElsewhereError(RuntimeError):
    """What this process waited for failed in another, which says why."""


def is_of_another(error: BaseException) -> bool:
    """Whether an error is that another process failed, or is no more."""
    gone = isinstance(error, RuntimeError) and re.search(_GONE, str(error)) is not None
    return gone or isinstance(error, ElsewhereError)


def launched() -> int:
    """How many processes were started for this run, before they have met."""
    given = os.environ.get("WORLD_SIZE", "1")
    return int(given) if given.isdecimal() else 1


def read_slurm() -> None:
    """Say in `torchrun`'s variables what SLURM's `srun` says in its own, where it has started several tasks.

    A batch script, and `srun torchrun`, are left alone: the first is no task of a step of several, the second has
    those variables. `MASTER_ADDR` and `MASTER_PORT` that one has set stay.
    """
    said = os.environ
    tasks = said.get("SLURM_STEP_NUM_TASKS", "")
    if "WORLD_SIZE" in said or "RANK" in said or not tasks.isdecimal() or int(tasks) < 2:
        return
    # A shell of a step has the variables of its task; one that was started otherwise has not all of them.
    if said.get("SLURM_NTASKS") != tasks or not {"SLURM_PROCID", "SLURM_LOCALID"} <= said.keys():
        return
    said["RANK"], said["LOCAL_RANK"], said["WORLD_SIZE"] = said["SLURM_PROCID"], said["SLURM_LOCALID"], tasks
    said.setdefault("MASTER_ADDR", _first_host(said.get("SLURM_STEP_NODELIST", "127.0.0.1")))
    # The same in every task, and another one in every step of a job.
    numbers = [int(said.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID")]
    said.setdefault("MASTER_PORT", str(15000 + (numbers[0] + 101 * numbers[1]) % 15000))


def _first_host(nodes: str) -> str:
    """The first of SLURM's list of nodes: `gpu[03-05,9],login` begins with gpu03."""
    begins, numbers, ends = re.match(r"([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)", nodes).groups()  # type: ignore[union-attr]
    return f"{begins}{numbers or ''}{ends}"


def join() -> None:
    """Meet the other processes, if there are any; all of them must come.

    Raises:
        InputError: The launcher did not say where.
    """
    if launched() > 1 and not dist.is_initialized():
        missing = [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise InputError(
                f"WORLD_SIZE={launched()} says that this is one of several processes, and {', '.join(missing)} are "
                "not set: start them with torchrun, accelerate launch or srun, or unset WORLD_SIZE for one process"
            )
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        PartialState(cpu=found is None or found.type == "mps", timeout=PATIENCE)


def only_main(context: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    """`context` in the main process; nothing in the others."""
    return context if is_main_process() else nullcontext()


def by_main(work: Callable[[], T]) -> T:
    """What `work`, done by the main process alone, gives; the others wait for it. Every process must ask.

    Raises:
        ElsewhereError: It failed, in a process that is not the main one; there its own error is raised.
    """
    _, size = world()
    if size == 1:
        return work()
    sent: list[Any] = [None, None]
    failed: Exception | None = None
    if is_main_process():
        try:
            sent[0] = work()
        except Exception as error:
            failed = error
            sent[1] = f"{type(error).__name__}: {one_line(error)}"
    dist.broadcast_object_list(sent, src=0)
    if failed is not None:
        raise failed
    if sent[1] is not None:
        raise ElsewhereError(sent[1])
    found: T = sent[0]
    return found


def gathered(mine: T) -> list[T]:
    """What every process gives, by its rank. Every process must give something."""
    _, size = world()
    found: list[Any] = [mine] * size
    if size > 1:
        dist.all_gather_object(found, mine)
    return found


def own_range(number: int) -> range:
    """Which of so many rows are this process's: as many in each process, or one more."""
    rank, size = world()
    return range(number * rank // size, number * (rank + 1) // size)


def own_rows(rows: Sequence[T]) -> Sequence[T]:
    """Those of `rows` that are this process's."""
    mine = own_range(len(rows))
    return rows[mine.start : mine.stop]


def check_shared_out(rows: int, given: str) -> None:
    """Refuse a batch of which the processes would not have as many rows each.

    Args:
        rows: Of a batch.
        given: What the user gave them as.

    Raises:
        RecipeError: It is one.
    """
    size = launched()
    if rows % size:
        raise RecipeError(
            f"{given} rows are those of a batch in all, and cannot be shared out equally over "
            f"{size} processes; give a multiple of {size}, or start as many processes as divide it"
        )


def check_same_data(read: dict[str, Any]) -> None:
    """Refuse processes that have read other data than each other. Every process must call it.

    Raises:
        RecipeError: They have.
    """
    for rank, other in enumerate(gathered(read)):
        if other != read:
            raise RecipeError(
                f"process {rank} reads other data than another: {other} and {read}; give all the same files"
            )


def highest(number: int) -> int:
    """The highest of the numbers that the processes give."""
    if world()[1] == 1:
        return number
    found = torch.tensor(number, device=PartialState().device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)
