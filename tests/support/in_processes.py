"""One of several processes that train tiny models together, one after the other.

    PYTHONPATH=tests torchrun --nproc_per_node 2 -m support.in_processes '[{"loop": "trainer", ...}]'

The main process writes losses, directions and the digest of every process's directions to the file `result` of each.
"""

import hashlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from peft import LoHaConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_tsd import DashConfig, TsdCallback, advance, identify_from_gradients
from peft_tsd.distributed.sharded import world
from peft_tsd.tuner import directed
from peft_tsd.tuner.held import FixedDirections
from support import directions, tiny

GLOBAL_BATCH = 4
LR = 1e-2
LOHA = DashConfig(peft=LoHaConfig(r=2, target_modules=tiny.LLAMA_TARGETS), prelaunch_steps=3, num_directions=2)


def rows() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tiny.tokens(64, 9, seed=3)]


class Experts(nn.Module):
    """Of every batch, the first half of the rows is the first expert's, and the others are the second's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 24)
        self.experts = nn.ModuleList(nn.Linear(24, 24) for _ in range(2))
        self.head = nn.Linear(24, 64)

    @staticmethod
    def rows() -> list[dict[str, torch.Tensor]]:
        data = rows()
        for i, row in enumerate(data):
            row["expert"] = torch.tensor(i % GLOBAL_BATCH * 2 // GLOBAL_BATCH)
        return data

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, expert: torch.Tensor) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        parts = [(expert == i, module) for i, module in enumerate(self.experts)]
        logits = torch.cat([self.head(module(hidden[mine])) for mine, module in parts if mine.any()])
        labels = torch.cat([labels[mine] for mine, _ in parts])
        return SimpleNamespace(loss=F.cross_entropy(logits.flatten(0, 1), labels.flatten()))


class Fails(TrainerCallback):
    """One process raises at a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step and dist.get_rank() == 1:
            raise RuntimeError("one process has had enough")


def sent_at_every_step(wrapped) -> list[str]:
    """The buffers that DDP sends around before each forward pass; none where it is not DDP."""
    return sorted(getattr(wrapped, "named_module_buffers", ()))


def in_trainer(spec, model) -> list[float]:
    """transformers' Trainer; TRL's with `loop: trl`."""
    engine = spec["engine"]
    changes = {}
    if engine.startswith("zero"):
        changes["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "zero_optimization": {"stage": int(engine[-1]), "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    settings = {
        "output_dir": spec["out"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": GLOBAL_BATCH // world_size(),
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": not engine.startswith("zero"),
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **changes,
    }
    callbacks = [TsdCallback(batches=2)]
    if "fail_at" in spec:
        callbacks.append(Fails(spec["fail_at"]))
    if spec["loop"] == "trl":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        data = Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows()])
        # Its default, bfloat16, rounds a batch in one process otherwise than its halves in two.
        exact = {"bf16": False, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        arguments = SFTConfig(**settings, **exact)
        trainer = SFTTrainer(model, arguments, train_dataset=data, callbacks=callbacks, processing_class=tokenizer())
    else:
        arguments = TrainingArguments(**settings)
        if engine.startswith("zero"):
            # Without accelerators, Accelerate takes each process for the only one.
            here = {"num_processes": world_size(), "process_index": int(os.environ["RANK"])}
            PartialState._shared_state.update(here, local_process_index=here["process_index"], backend="gloo")
        trainer = Trainer(model, arguments, train_dataset=rows(), callbacks=callbacks)
    if engine == "fsdp2":
        # Accelerate offers FSDP on accelerators alone. All but this choice is its own code, and runs on CPUs.
        shared = trainer.accelerator.state
        shared._shared_state["distributed_type"] = shared.distributed_type = DistributedType.FSDP
        shared.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            state_dict_type="SHARDED_STATE_DICT",
            cpu_ram_efficient_loading=spec.get("from_main", False),
        )
        trainer.is_fsdp_enabled = True
    trainer.train(resume_from_checkpoint=spec.get("resume"))
    spec["sent"] = sent_at_every_step(trainer.model_wrapped)
    if engine == "fsdp2":
        # What Accelerate puts together for save_model() is not there yet on a CPU.
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        model.save_pretrained(spec["out"] + "/final", state_dict=state, is_main_process=dist.get_rank() == 0)
    else:
        trainer.save_model(spec["out"] + "/final")
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def tokenizer():
    from support import text_models

    return text_models.tokenizer()


def in_own_loop(spec, model) -> list[float]:
    """A loop of one's own: bare torch, or Accelerate's with `loop: accelerate`."""
    rank, size = world()
    data = Experts.rows() if spec.get("experts") else rows()
    share = GLOBAL_BATCH // size
    wrapped = model
    if spec["engine"] == "ddp" and spec["loop"] == "torch":
        wrapped = DistributedDataParallel(model)
    elif spec["engine"] == "fsdp2":
        for block in model.get_base_model().model.layers:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
    backward = torch.Tensor.backward
    if spec["engine"].startswith("zero"):
        import deepspeed

        stage = {"stage": int(spec["engine"][-1]), "stage3_param_persistence_threshold": 0}
        # It clips gradients by itself, which no other loop does.
        settings = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        config = {
            "train_micro_batch_size_per_gpu": share,
            "zero_optimization": stage,
            "gradient_clipping": 0,
            **settings,
        }
        wrapped, optimizer, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    elif spec["loop"] == "accelerate":
        accelerator = Accelerator(cpu=True)
        loader = DataLoader(data, batch_size=share)
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        backward = accelerator.backward
        data = [row for batch in loader for row in ({k: v[i] for k, v in batch.items()} for i in range(share))]

    spec["sent"] = sent_at_every_step(wrapped)

    def batch(step: int) -> dict[str, torch.Tensor]:
        start = step * share if spec["loop"] == "accelerate" else step * GLOBAL_BATCH + rank * share
        chosen = [data[(start + i) % len(data)] for i in range(share)]
        return {key: torch.stack([row[key] for row in chosen]) for key in chosen[0]}

    if spec["changes"].get("prelaunch_steps") == 0:
        identify_from_gradients(wrapped, [batch(0), batch(1)], optimizer)
    losses = []
    for step in range(spec["steps"]):
        loss = wrapped(**batch(step)).loss
        if spec.get("twice"):  # two forward passes before one backward pass, as a preference loss has
            loss = (loss + wrapped(**batch(step)).loss) / 2
        if spec["engine"].startswith("zero"):
            wrapped.backward(loss)
            wrapped.step()
        else:
            backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        advance(wrapped, optimizer)
        mean = loss.detach() / size
        if size > 1:
            dist.all_reduce(mean)
        losses.append(float(mean))
    return losses


def four_bits(model):
    """`model`, its adapted layers quantized by bitsandbytes; on a CPU as on an accelerator."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] in tiny.LLAMA_TARGETS:
            packed = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4", compute_dtype=torch.float32
            )
            packed.load_state_dict(layer.state_dict())
            model.set_submodule(name, packed.to("cpu"))
    return model


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def trained(spec) -> dict:
    """What a run ends with, but for the digests of the other processes."""
    config = tiny.config(spec["method"], **spec["changes"]) if spec["method"] != "loha" else LOHA
    base = Experts() if spec.get("experts") else tiny.llama()
    model = get_peft_model(four_bits(base) if spec.get("four_bits") else base, config)
    if spec.get("apart") == int(os.environ.get("RANK", 0)):  # loaded in another process alone
        next(module for module in model.modules() if isinstance(module, FixedDirections)).step += 1
    losses = (in_trainer if spec["loop"] in ("trainer", "trl") else in_own_loop)(spec, model)
    found = model.directions()
    digest = hashlib.sha256()
    for one in found.values():
        for tensor in (one.indices, one.rates, one.u, one.v):
            digest.update(tensor.contiguous().numpy().tobytes())
    fixed = next(module for module in model.modules() if isinstance(module, FixedDirections))
    first = next(parameter for parameter in model.parameters() if parameter.requires_grad)
    return {
        "losses": losses,
        "identified_at": found.prelaunch_steps,
        "found": directions.of(model),
        # Of each layer, U and V of the first two: their order and signs are free, the spaces that they span are not.
        "spaces": {name: [one.u[:, :2].tolist(), one.v[:, :2].tolist()] for name, one in found.items()},
        "sigma": {name: one.sigma.tolist() for name, one in found.items()},
        "digests": [digest.hexdigest()],
        "kind": "split" if hasattr(first, "ds_tensor") else type(first.data).__name__,
        "held": [type(buffer).__name__ for buffer in fixed.buffers()],
        "sent": spec["sent"],
    }


def main() -> None:
    torch.set_num_threads(1)
    specs = json.loads(sys.argv[1])
    first = specs[0]
    if first["loop"] == "torch" and first["engine"].startswith("zero"):
        import deepspeed

        deepspeed.init_distributed("gloo")
    elif first["loop"] == "torch":
        dist.init_process_group("gloo")
    elif first["loop"] == "accelerate":
        Accelerator(cpu=True)
    if first.get("out_of_memory") == int(os.environ["RANK"]):

        def factorize(weight):
            raise RuntimeError("not enough memory")

        directed.Spectrum = factorize
    for spec in specs:
        result = trained(spec)
        digests = [None] * world_size()
        dist.all_gather_object(digests, result["digests"][0])
        if dist.get_rank() == 0:
            Path(spec["result"]).write_text(json.dumps({**result, "digests": digests}))


if __name__ == "__main__":
    main()
