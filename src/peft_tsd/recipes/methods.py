"""The methods a recipe can name: this package's, and what they are compared with. Each is a row of one table.

lora-tsd, lora-dash, lora-init                       directions on top of LoRA (`TsdConfig`)
lora, dora, pissa, adalora, loha, vera, oft          PEFT's own, from the same `adapter` settings
lora-ga, eva                                         the same, started from the first training batches
dora-dash, adalora-dash, loha-dash, vera-dash, …     directions beside those (`DashConfig`)
full                                                 every parameter of the model, no adapter
base                                                 nothing is trained
"""

from __future__ import annotations

from typing import Literal, NamedTuple


class Row(NamedTuple):
    """What is to be known of a method."""

    trains: Literal["adapter", "model", "nothing"] = "adapter"
    directions: Literal["own", "beside", "none"] = "none"
    """`own`: of `TsdConfig`. `beside`: those that `DashConfig` puts beside a method of PEFT's."""
    has_rank: bool = True
    resumes: bool = True
    """Whether a stopped run goes on: PEFT saves none of AdaLoRA's statistics."""
    from_batches: bool = False
    """Whether its adapter starts from the first training batches, before it is trained."""
    on_quantized: bool = False
    """Whether a recipe can have it with `model.quantization`."""


METHODS: dict[str, Row] = {
    "lora-tsd": Row(directions="own", on_quantized=True),
    "lora-dash": Row(directions="own", on_quantized=True),
    "lora-init": Row(directions="own", on_quantized=True),
    "lora": Row(on_quantized=True),
    "dora": Row(on_quantized=True),
    "pissa": Row(),
    "adalora": Row(resumes=False),
    "loha": Row(),
    "vera": Row(),
    "oft": Row(),
    "lora-ga": Row(from_batches=True),
    "eva": Row(from_batches=True),
    "dora-dash": Row(directions="beside"),
    "adalora-dash": Row(directions="beside", resumes=False),
    "loha-dash": Row(directions="beside"),
    "vera-dash": Row(directions="beside"),
    "oft-dash": Row(directions="beside"),
    "full": Row(trains="model", has_rank=False),
    "base": Row(trains="nothing", has_rank=False, on_quantized=True),
}
