"""A tiny Llama, quantized in each of the ways that run on a CPU, and what the libraries say its weights stand for."""

import importlib.util

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)

from support import tiny

TARGETS = ["q_proj", "v_proj", "down_proj"]


def whole() -> LlamaForCausalLM:
    """Wide, tall and square layers, with biases; sizes that every library can cut into groups."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model


def loaded(folder, quantization, dtype=torch.float32):
    """As a user loads it, transformers doing the rest."""
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map="cpu"
    )


def replaced(make):
    """Every linear layer but the head as what `make` makes of it."""
    model = whole()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module))
    return model


def hqq(layer, bits=4):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=bits, group_size=32)
    return HQQLinear(layer, config, compute_dtype=torch.float32, device="cpu")


def packed(layer, cls):
    """With gptqmodel's own packing; rounded to the nearest, in groups of 32."""
    out_size, in_size = layer.weight.shape
    groups = layer.weight.detach().view(out_size, in_size // 32, 32)
    low = groups.amin(-1)
    scales = (groups.amax(-1) - low) / 15
    settings = {"bits": 4, "group_size": 32, "sym": False, "desc_act": False}
    made = cls(**settings, in_features=in_size, out_features=out_size, bias=True, register_buffers=True)
    made.pack(layer.requires_grad_(False), scales, (-low / scales).round(), torch.arange(in_size) // 32)
    made.optimized = True  # as if: compiling takes a minute
    made.post_init()
    return made


def gptq(layer):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return packed(layer, TorchLinear)


def awq(layer):
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear

    return packed(layer, AwqTorchLinear)


def aqlm(layer):
    """Random codes of codebooks of 1024: with those of 256, aqlm's result on a CPU depends on the number of rows."""
    from aqlm import QuantizedLinear

    out_size, in_size = layer.weight.shape
    made = QuantizedLinear(in_size, out_size, 8, 1, 2, 10, bias=True, dtype=torch.float32)
    made.codebooks.data.normal_(std=0.05)
    made.codes.data = torch.randint(0, 1024, made.codes.shape, dtype=made.codes.dtype)
    made.scales.data.uniform_(0.5, 1.5)
    made.bias.data = layer.bias.detach().clone()
    return made


def torchao(name):
    def quantization():
        from torchao import quantization

        return TorchAoConfig(getattr(quantization, name)())

    return quantization


BY_TRANSFORMERS = {
    "bnb-nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "bnb-fp4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_storage=torch.bfloat16
    ),
    "bnb-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "torchao-int8": torchao("Int8WeightOnlyConfig"),
    "torchao-fp8": torchao("Float8WeightOnlyConfig"),
    "quanto-int8": lambda: QuantoConfig(weights="int8"),
}
BY_HAND = {"hqq-4bit": hqq, "hqq-8bit": lambda layer: hqq(layer, 8), "gptq": gptq, "awq": awq, "aqlm": aqlm}
PACKAGES = {
    "bnb": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "hqq": "hqq",
    "gptq": "gptqmodel",
    "awq": "gptqmodel",
    "aqlm": "aqlm",
}
KINDS = [*BY_TRANSFORMERS, *BY_HAND]
MERGEABLE = [kind for kind in KINDS if kind.startswith(("bnb", "torchao", "hqq"))]
EXACT = [kind for kind in KINDS if kind not in ("bnb-8bit", "gptq", "awq")]
"""Those that multiply in float32: the others round activations, or compute in float16."""


def need(package):
    try:
        missing = importlib.util.find_spec(package) is None
    except ModuleNotFoundError:  # the package that it would be a part of
        missing = True
    if missing:
        pytest.skip(f"{package} is not installed")


def quantized(kind, folder):
    """The model of `whole`, which is saved in `folder`, quantized."""
    need(PACKAGES[kind.split("-")[0]])
    torch.manual_seed(1)  # for codes made up at random
    return loaded(folder, BY_TRANSFORMERS[kind]()) if kind in BY_TRANSFORMERS else replaced(BY_HAND[kind])


def library_weight(layer):
    """What the packed weight stands for, (out, in), by what the library that made it has for that."""
    name = type(layer).__name__
    if name == "Linear4bit":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    if name == "Linear8bitLt":
        from bitsandbytes.functional import int8_vectorwise_dequant

        scales = layer.weight.SCB if layer.state.SCB is None else layer.state.SCB
        return int8_vectorwise_dequant(layer.weight.data, scales)
    if name == "HQQLinear":
        return layer.dequantize()
    if name == "TorchLinear":
        return layer.dequantize_weight().T
    if name == "AwqTorchLinear":
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

        return dequantize_gemm(
            qweight=layer.qweight, qzeros=layer.qzeros, scales=layer.scales, bits=4, group_size=32
        ).T
    if name == "QuantizedLinear":
        codes = layer.codes.long() % 1024
        parts = [layer.codebooks[book][codes[..., book]].flatten(1) for book in range(2)]
        return sum(parts).view(layer.out_features, layer.in_features) * layer.scales.view(-1, 1)
    return layer.weight.dequantize()


def dequantized_twin(model):
    """An ordinary Llama with the weights that the quantized one's stand for."""
    twin = whole()
    for name, module in twin.named_modules():
        if type(module) is nn.Linear and name != "lm_head":
            module.weight.data = library_weight(model.get_submodule(name)).detach().float().clone()
            module.bias.data = model.get_submodule(name).bias.detach().float().clone()
    return twin


def each(kinds):
    """Parameters: but for two kinds, of two libraries, the tests of them are long ones."""
    often = ("bnb-nf4", "torchao-int8")
    return [kind if kind in often else pytest.param(kind, marks=pytest.mark.long) for kind in kinds]


def adapted(model, method="lora-tsd", **changes):
    torch.manual_seed(3)
    return get_peft_model(model, tiny.config(method, **{"target_modules": TARGETS, **changes}))


def layers_of(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_directions")}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(tiny.tokens()).logits
