"""Do adapters that come and go leave anything behind?

    python tests/harness/soak.py --steps 10000

One tiny model lives through all the steps. At each of them something happens to its TSD adapters: one is added,
trained (over its transition too), switched to, switched off, saved and loaded again under another name, merged and
unmerged, or removed. Every `--check-every` steps each adapter there is is compared, bit for bit, with the same adapter
loaded from its files onto a fresh model; without adapters the model must compute what a fresh one does. At the end the
memory of the process (resident set size) must be at most 10 % more than after the first tenth of the steps.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import psutil
import torch
from peft import PeftModel, get_peft_model

from peft_tsd import advance
from support import tiny

MOST = 4
"""Adapters at a time."""

METHODS = ["lora-dash", "lora-init", "lora-tsd"]


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.rng = random.Random(seed)
        self.folder = folder
        self.model = get_peft_model(tiny.llama(), self.config(), "a0")
        self.made = 1
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.base = {key: t.clone() for key, t in tiny.llama().state_dict().items()}
        self.done: Counter[str] = Counter()
        self.checked = 0

    def config(self):
        return tiny.config(self.rng.choice(METHODS), prelaunch_steps=self.rng.randint(1, 4), r=self.rng.randint(1, 4))

    def names(self) -> list[str]:
        return list(self.model.peft_config)

    def step(self) -> None:
        acts = ["train"] * 6 + ["switch", "off", "merge", "reload"]
        acts += ["add"] * (len(self.names()) < MOST) + ["remove"] * (len(self.names()) > 1)
        act = self.rng.choice(acts)
        self.done[act] += 1
        getattr(self, act)()

    def add(self) -> None:
        self.model.add_adapter(f"a{self.made}", self.config())
        self.made += 1

    def remove(self) -> None:
        name = self.rng.choice(self.names())
        self.optimizers.pop(name, None)
        self.model.delete_adapter(name)
        self.model.set_adapter(self.rng.choice(self.names()))

    def switch(self) -> None:
        self.model.set_adapter(self.rng.choice(self.names()))

    def off(self) -> None:
        fresh = tiny.llama()
        with torch.no_grad(), self.model.disable_adapter():
            assert torch.equal(self.model(tiny.tokens()).logits, fresh(tiny.tokens()).logits)

    def merge(self) -> None:
        # Merging into the base rounds: it is done to a copy's numbers, which are put back.
        self.model.merge_adapter()
        self.model.unmerge_adapter()
        restored = self.model.get_base_model().state_dict()
        with torch.no_grad():
            for key, tensor in self.base.items():
                stored = restored.get(key, restored.get(key.replace(".weight", ".base_layer.weight")))
                torch.testing.assert_close(stored, tensor, rtol=1e-4, atol=1e-5)
                stored.copy_(tensor)

    def reload(self) -> None:
        name = self.rng.choice(self.names())
        path = self.save(name)
        self.optimizers.pop(name, None)
        other = f"a{self.made}"
        self.made += 1
        self.model.load_adapter(path, other, is_trainable=True)
        self.model.delete_adapter(name)
        self.model.set_adapter(other)

    def train(self) -> None:
        name = self.model.active_adapter
        parameters = [p for key, p in self.model.named_parameters() if f".{name}." in key and p.requires_grad]
        optimizer = self.optimizers.setdefault(name, torch.optim.AdamW(parameters, lr=1e-3))
        ids = tiny.tokens(2, 7, seed=self.rng.randrange(1000))
        self.model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(self.model, optimizer, name)

    def save(self, name: str) -> Path:
        path = self.folder / "saved"
        self.model.save_pretrained(path, selected_adapters=[name])
        return path / name if (path / name).is_dir() else path

    def check(self) -> None:
        """Every adapter computes what it does on a fresh model, and so does the base."""
        active = self.model.active_adapter
        self.off()
        for name in self.names():
            self.model.set_adapter(name)
            fresh = PeftModel.from_pretrained(tiny.llama(), self.save(name))
            with torch.no_grad():
                got, expected = self.model(tiny.tokens()).logits, fresh(tiny.tokens()).logits
            assert torch.equal(got, expected), name
            self.checked += 1
        self.model.set_adapter(active)


class Soaked(NamedTuple):
    """What was done, and what it left."""

    acts: Counter[str]
    checked: int
    """Comparisons of an adapter with itself on a fresh model."""
    sizes: list[float]
    """Resident memory after each step, in MiB."""


def soak(steps: int, check_every: int, seed: int) -> Soaked:
    """Live through `steps` steps; raises AssertionError where a result is another than on a fresh model."""
    torch.manual_seed(seed)
    process = psutil.Process()
    sizes: list[float] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # adapters are saved in their pre-launch too
        living = Soak(Path(folder), seed)
        for step in range(1, steps + 1):
            living.step()
            if step % check_every == 0:
                living.check()
            sizes.append(process.memory_info().rss / 2**20)
    return Soaked(living.done, living.checked, sizes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--check-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    done = soak(args.steps, args.check_every, args.seed)
    tenth = max(1, args.steps // 10)
    start, middle, end = done.sizes[tenth - 1], done.sizes[args.steps // 2], max(done.sizes[-tenth:])
    acts = ", ".join(f"{act} {n}" for act, n in done.acts.most_common())
    print(f"{args.steps} steps in {time.perf_counter() - started:.0f} s: {acts}")
    print(f"{done.checked} adapters compared with a fresh model, all equal bit for bit; the base too")
    print(
        f"memory: {start:.0f} MiB after {tenth} steps, {middle:.0f} in the middle, at most {end:.0f} in the last tenth"
    )
    assert end <= 1.1 * start, "memory grew"


if __name__ == "__main__":
    main()
