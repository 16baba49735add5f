"""What does a step under DDP take, with directions left out of what it sends around at each forward pass, and without?

    python benchmarks/ddp_buffers.py [--hidden 256] [--layers 4] [--steps 30]

Two processes with gloo on this machine, one thread each; a Llama of random weights, LoRA-TSD past its transition on q,
v and down. Both are built in the same processes and take turns, step by step; the median of each is printed, in ms.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from peft_tsd import TsdConfig, advance


def wrapped(args: argparse.Namespace, *, sends: bool) -> tuple[DistributedDataParallel, torch.optim.Optimizer]:
    torch.manual_seed(0)
    shape = {"hidden_size": args.hidden, "intermediate_size": 3 * args.hidden, "num_hidden_layers": args.layers}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **shape))
    config = TsdConfig(r=8, prelaunch_steps=1, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base, config)
    if sends:
        model.base_model._ddp_params_and_buffers_to_ignore = []
    ddp = DistributedDataParallel(model)
    return ddp, torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-3)


def step(ddp: DistributedDataParallel, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    dist.barrier()
    start = time.perf_counter()
    ddp(ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    advance(ddp, optimizer)
    return time.perf_counter() - start


def work(rank: int, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method="tcp://127.0.0.1:29511", rank=rank, world_size=2)
    both = {"left out": wrapped(args, sends=False), "sent": wrapped(args, sends=True)}
    ids = torch.randint(0, 256, (2, 32))
    taken: dict[str, list[float]] = {name: [] for name in both}
    for i in range(args.steps + 3):
        for name, (ddp, optimizer) in both.items():
            seconds = step(ddp, optimizer, ids)
            if i >= 3:  # the transition, and warming up
                taken[name].append(seconds)
    if rank == 0:
        for name, (ddp, _) in both.items():
            sent = [buffer for key, buffer in ddp.named_module_buffers.items() if "directions" in key]
            size = sum(buffer.nbytes for buffer in sent) / 2**20
            print(
                f"{name:>8}: {1000 * statistics.median(taken[name]):.1f} ms; {len(sent)} tensors, {size:.1f} MiB sent"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    torch.multiprocessing.spawn(work, (parser.parse_args(),), nprocs=2)
