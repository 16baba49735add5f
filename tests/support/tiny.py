"""Tiny models, a config for them and a training loop of one's own."""

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from peft_tsd import TsdConfig, advance


def llama() -> LlamaForCausalLM:
    """Two layers; q and down square or wide, v wide (grouped heads)."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    """Conv1D layers, which store (in, out)."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32)).eval()


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_labels=3
    )
    return BertForSequenceClassification(config).eval()


class ConvNet(nn.Module):
    """Convolutions of a 1x1 and a strided 3x3 kernel, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 12, 3, stride=2, padding=1)
        self.second = nn.Conv2d(12, 10, 1)
        self.head = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3)))


def tokens(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


LLAMA_TARGETS = ["q_proj", "v_proj", "down_proj"]


def config(method: str = "lora-tsd", **changes) -> TsdConfig:
    settings = {
        "r": 4,
        "lora_alpha": 8,
        "prelaunch_steps": 3,
        "direction_source": "weight",
        "num_directions": 5,
        "dash_lr_ratio": 20.0,
        "target_modules": LLAMA_TARGETS,
    }
    return TsdConfig(method=method, **{**settings, **changes})


def train(model: nn.Module, steps: int, inputs=None, optimizer=None, lr: float = 1e-2, start: int = 0) -> list[float]:
    """A loop of one's own: `steps` steps of AdamW, the schedule advanced after each; on text from that of `start`."""
    optimizer = optimizer or torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for step in range(start, start + steps):
        loss = model(inputs).square().mean() if inputs is not None else language_loss(model, step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, optimizer)
        losses.append(loss.item())
    return losses


def language_loss(model: nn.Module, step: int) -> torch.Tensor:
    # The first weight may be offloaded.
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return model(**batch(step, device)).loss


def batch(step: int, device="cpu") -> dict[str, torch.Tensor]:
    ids = tokens(4, 9, seed=step).to(device)
    return {"input_ids": ids, "labels": ids}
