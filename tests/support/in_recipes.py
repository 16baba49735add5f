"""One of several processes that do runs of recipes, as `peft-tsd train` does them.

    PYTHONPATH=tests torchrun --nproc_per_node 2 -m support.in_recipes '{"runs": [["tiny.yaml", "seed=1"], ...]}'

Several runs are done one after the other, for what is made; a single one by the command line, which says how it ends.
`at` sends one process a signal, or has it fail, after so many steps: `{"rank": 1, "step": 7, "signal": 15}`;
`sharded` has FSDP2 and DeepSpeed work on CPUs.
"""

import json
import os
import resource
import sys

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainingArguments

from peft_tsd import diffusion, language
from peft_tsd.cli import main
from peft_tsd.cli.screen import screen
from peft_tsd.language import engines
from peft_tsd.language.progress import Record
from peft_tsd.recipes.reading import kind_of


def meet(at: dict, kind: str) -> None:
    """Have `at` happen in the process it is for, in a recipe of a kind."""

    def taken(steps: int) -> None:
        if int(os.environ["RANK"]) == at["rank"] and steps == at["step"]:
            if "signal" not in at:
                raise RuntimeError("one process has had enough")
            os.kill(os.getpid(), at["signal"])

    if kind == "dreambooth":
        from peft_tsd.diffusion.learner import Learner

        step = Learner.step

        def next_step(self, number):
            taken(number - 1)
            return step(self, number)

        Learner.step = next_step
        return
    on_step_begin = Record.on_step_begin

    def begin(self, args, state, control, **kwargs) -> None:
        on_step_begin(self, args, state, control, **kwargs)
        taken(state.global_step)

    Record.on_step_begin = begin


def shard_on_cpus() -> None:
    """Accelerate offers FSDP and DeepSpeed on accelerators alone. All but this choice is its own code."""
    engines.can_shard = lambda: True
    create = Trainer.create_accelerator_and_postprocess

    def with_fsdp(self) -> None:
        create(self)
        given = getattr(self.args, "fsdp_plugin_args", None)
        if given is not None:
            shared = self.accelerator.state
            shared._shared_state["distributed_type"] = shared.distributed_type = DistributedType.FSDP
            shared.fsdp_plugin = FullyShardedDataParallelPlugin(**given)
            self.is_fsdp_enabled = True

    Trainer.create_accelerator_and_postprocess = with_fsdp
    post_init = TrainingArguments.__post_init__

    def with_deepspeed(self) -> None:
        # Without accelerators, Accelerate takes each process for the only one; and with `use_cpu` for one of DDP.
        self.use_cpu = self.use_cpu and self.deepspeed is None
        post_init(self)
        if self.deepspeed is not None:
            here = {"num_processes": dist.get_world_size(), "process_index": dist.get_rank(), "backend": "gloo"}
            PartialState._shared_state.update(here, local_process_index=dist.get_rank())

    TrainingArguments.__post_init__ = with_deepspeed


def do(runs: list[list[str]], at: dict | None = None, sharded: bool = False) -> int:
    torch.set_num_threads(1)
    if sharded:
        shard_on_cpus()
    if "LARGEST_FILE" in os.environ and os.environ["SLURM_PROCID"] == "0":
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST_FILE"]), resource.RLIM_INFINITY))
    if at is not None:
        meet(at, kind_of(runs[0][0]))
    if len(runs) == 1:
        return main(["train", *runs[0]])
    with screen():
        for recipe, *overrides in runs:
            kind = diffusion if kind_of(recipe) == "dreambooth" else language
            kind.train(kind.load_recipe(recipe, overrides))
    dist.barrier()
    os._exit(0)  # what gloo does in the background may abort an interpreter that ends


if __name__ == "__main__":
    sys.exit(do(**json.loads(sys.argv[1])))
