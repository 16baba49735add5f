"""One layer of each type, by itself."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D


def conv1d(inner: int, out: int) -> Conv1D:
    layer = Conv1D(out, inner)
    nn.init.normal_(layer.bias)
    return layer


class One(nn.Module):
    """One layer to adapt, called `layer`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


LAYERS = {
    "tall": lambda: (nn.Linear(9, 14), (3, 5, 9)),
    "wide": lambda: (nn.Linear(14, 9, bias=False), (3, 14)),
    "square": lambda: (nn.Linear(10, 10), (2, 10)),
    "conv1d": lambda: (conv1d(9, 14), (3, 5, 9)),
    "conv2d": lambda: (nn.Conv2d(3, 11, 3, stride=2, padding=1), (2, 3, 8, 7)),
    "conv2d 1x1": lambda: (nn.Conv2d(9, 10, 1, bias=False), (2, 9, 4, 4)),
    "conv2d same": lambda: (nn.Conv2d(4, 8, 3, padding="same"), (2, 4, 5, 5)),
}
