"""Two processes, each with its own data, find and decide what one process with all of it does."""

import pytest
import torch
from peft import get_peft_model
from torch.nn.parallel import DistributedDataParallel

import tiny
from peft_tsd import advance, identify_from_gradients

pytestmark = pytest.mark.slow

CONFIGS = {
    "gradients": {"prelaunch_steps": 0},
    "auto": {"prelaunch_steps": "auto", "prelaunch_min": 4, "prelaunch_max": 12, "settled_agreement": 0.95},
}


def batch(step: int, ranks: range) -> dict[str, torch.Tensor]:
    ids = torch.cat([tiny.tokens(2, 9, seed=10 * step + rank) for rank in ranks])
    return {"input_ids": ids, "labels": ids}


def trained(kind: str, ranks: range, wrap=lambda model: model):
    model = get_peft_model(tiny.llama().double(), tiny.config(**CONFIGS[kind]))
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if kind == "gradients":
        identify_from_gradients(wrapped, [batch(100, ranks), batch(101, ranks)], optimizer)
    for step in range(14):
        wrapped(**batch(step, ranks)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(wrapped, optimizer)
    found = model.directions()
    return found.prelaunch_steps, [one.indices.tolist() for one in found.values()]


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {kind: trained(kind, range(rank, rank + 1), DistributedDataParallel) for kind in CONFIGS}
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_agree_with_one(tmp_path):
    torch.multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    assert first == {kind: trained(kind, range(2)) for kind in CONFIGS}
