"""Does the transition get faster with more processes, and what does it hold in memory?

    python benchmarks/transition.py                        # 1, 2 and 4 processes on CPUs, one thread each
    python benchmarks/transition.py --width 2048 --processes 1,2
    torchrun --nproc_per_node 8 benchmarks/transition.py --worker --device cuda --width 4096 --layers 32

Llama blocks with LoRA-TSD on q, k, v, up and down, once whole in every process (DDP) and once sharded (FSDP2).
Reported: the median seconds of a transition, and over those of one process; whether all processes hold the same bits;
and by how much the peak of the main process's memory grew, in units of the largest weight.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaModel

from peft_tsd import TsdConfig, __version__
from peft_tsd.schedule.transition import transition
from peft_tsd.tuner.phase import adapted_layers

TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]


def peak(device: str) -> int:
    """Bytes: of the process on a CPU, allocated on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def adapted(width: int, layers: int, device: str, sharded: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    model = LlamaModel(config).to(device)
    model = get_peft_model(model, TsdConfig(r=8, num_directions=8, prelaunch_steps=100, target_modules=TARGETS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    if sharded:
        for block in model.base_model.model.layers:
            fully_shard(block)
        fully_shard(model)
    return model


def worker(args: argparse.Namespace) -> None:
    """One process: prints what it measured as JSON, in the main process."""
    local = int(os.environ["LOCAL_RANK"])
    device = "cpu"
    if args.device == "cuda":
        torch.cuda.set_device(local)
        device = f"cuda:{local}"
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    seconds, growth = [], 0
    for _ in range(args.rounds):
        model = adapted(args.width, args.layers, device, args.sharded)
        layers = adapted_layers(model, "default")
        largest = 4 * max(layer.matrix_shape[0] * layer.matrix_shape[1] for layer in layers.values())
        dist.barrier()
        before = peak(args.device)
        start = time.perf_counter()
        transition(layers, "default", None)
        dist.barrier()
        seconds.append(time.perf_counter() - start)
        growth = max(growth, peak(args.device) - before)
    held = model.base_model.directions()
    bits = zlib.crc32(b"".join(one.u.numpy().tobytes() for one in held.values()))
    bits_of_all = [0] * dist.get_world_size()
    dist.all_gather_object(bits_of_all, bits)
    if dist.get_rank() == 0:
        found = {"seconds": statistics.median(seconds), "bits": sorted(set(bits_of_all)), "growth": growth / largest}
        print("RESULT " + json.dumps(found), flush=True)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", action="store_true", help="be one of the processes that torchrun started")
    parser.add_argument("--sharded", action="store_true", help="of a worker: FSDP2")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    results: dict[str, dict[str, dict[str, Any]]] = {"DDP": {}, "FSDP2": {}}
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; {args.layers} blocks, {args.width} wide"
    )
    print(f"{'':<8}{'processes':>9}{'seconds':>10}{'/ one':>8}{'same bits':>12}{'memory / largest weight':>26}")
    for (name, found), processes in itertools.product(results.items(), args.processes.split(",")):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        sizes = [f"--{key}={getattr(args, key)}" for key in ("device", "width", "layers", "rounds")]
        printed = subprocess.run(
            [*command, __file__, "--worker", *sizes, *["--sharded"] * (name == "FSDP2")],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        (line,) = (line for line in printed.splitlines() if line.startswith("RESULT "))
        one = found[processes] = json.loads(line.removeprefix("RESULT "))
        first = next(iter(results["DDP"].values()))
        same = "yes" if one["bits"] == first["bits"] and len(one["bits"]) == 1 else "NO"
        ratio = one["seconds"] / next(iter(found.values()))["seconds"]
        print(f"{name:<8}{processes:>9}{one['seconds']:>10.2f}{ratio:>8.2f}{same:>12}{one['growth']:>26.1f}")
    if args.out:
        args.out.write_text(
            json.dumps({"version": __version__, "torch": torch.__version__, "results": results}, indent=1)
        )


if __name__ == "__main__":
    main()
