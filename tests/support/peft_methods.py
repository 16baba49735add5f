"""Every method that PEFT has registered: a configuration for it, and what DashConfig makes of it.

`PYTHONPATH=tests python -m support.peft_methods` writes docs/methods.md.
"""

import re
import warnings

import peft
import pytest
import torch
from peft import get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_tsd import DashConfig
from peft_tsd.tuner.phase import adapted_layers
from support import tiny
from support.places import ROOT

PAGE = ROOT / "docs" / "methods.md"

TARGETS = ["q_proj", "v_proj", "down_proj"]

# By PEFT's name of the method; a name after a hyphen is a variant of it.
WORKS = {
    "LORA": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "LORA-use_rslora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_rslora=True),
    "LORA-use_dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS, use_dora=True),
    "LORA-mica": lambda: peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="mica"),
    "ADALORA": lambda: peft.AdaLoraConfig(init_r=4, target_r=2, target_modules=TARGETS, total_step=10),
    "ADAMSS": lambda: peft.AdamssConfig(target_modules=["q_proj"]),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=TARGETS),
    "C3A": lambda: peft.C3AConfig(block_size=8, target_modules=TARGETS),
    "DEFT": lambda: peft.DeftConfig(r=4, target_modules=TARGETS),
    "DELORA": lambda: peft.DeloraConfig(r=4, target_modules=TARGETS),
    "FOURIERFT": lambda: peft.FourierFTConfig(n_frequency=20, target_modules=TARGETS),
    "FROD": lambda: peft.FrodConfig(target_modules=TARGETS),
    "GLORA": lambda: peft.GloraConfig(r=4, target_modules=TARGETS),
    "GRALORA": lambda: peft.GraloraConfig(r=4, target_modules=TARGETS),
    "HIRA": lambda: peft.HiraConfig(r=4, target_modules=TARGETS),
    "HRA": lambda: peft.HRAConfig(r=4, target_modules=TARGETS),
    "IA3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
    "LOHA": lambda: peft.LoHaConfig(r=3, alpha=5, target_modules=TARGETS),
    "LOKR": lambda: peft.LoKrConfig(r=3, alpha=5, target_modules=TARGETS),
    "MISS": lambda: peft.MissConfig(r=4, target_modules=TARGETS),
    "MISS-bat": lambda: peft.MissConfig(r=4, target_modules=TARGETS, init_weights="bat"),
    "OFT": lambda: peft.OFTConfig(oft_block_size=8, target_modules=TARGETS),
    "OSF": lambda: peft.OSFConfig(target_modules=TARGETS),
    "PEANUT": lambda: peft.PeanutConfig(r=4, target_modules=TARGETS),
    "PSOFT": lambda: peft.PsoftConfig(r=4, target_modules=TARGETS),
    "PVERA": lambda: peft.PveraConfig(r=4, target_modules=TARGETS),
    "RANDLORA": lambda: peft.RandLoraConfig(r=4, target_modules=TARGETS),
    "ROAD": lambda: peft.RoadConfig(group_size=8, target_modules=TARGETS),
    "SHIRA": lambda: peft.ShiraConfig(r=2, target_modules=TARGETS),
    "SUPERTUNING": lambda: peft.SupertuningConfig(sparsity=0.5, target_modules=TARGETS),
    "TINYLORA": lambda: peft.TinyLoraConfig(target_modules=TARGETS),
    "UNILORA": lambda: peft.UniLoraConfig(target_modules=TARGETS),
    "VBLORA": lambda: peft.VBLoRAConfig(r=2, num_vectors=12, vector_length=8, topk=2, target_modules=TARGETS),
    "VERA": lambda: peft.VeraConfig(r=4, target_modules=TARGETS),
    "WAVEFT": lambda: peft.WaveFTConfig(n_frequency=20, target_modules=TARGETS),
}

REFUSED = {
    "ADAPTION_PROMPT": lambda: peft.AdaptionPromptConfig(target_modules=["self_attn"]),
    "BEFT": lambda: peft.BeftConfig(target_modules=TARGETS),
    "CARTRIDGE": lambda: peft.CartridgeConfig(),
    "CPT": lambda: peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[0], cpt_mask=[1], cpt_tokens_type_mask=[1]),
    "LILY": lambda: peft.LilyConfig(r=2, target_modules=TARGETS),
    "LN_TUNING": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "MULTITASK_PROMPT_TUNING": lambda: peft.MultitaskPromptTuningConfig(num_virtual_tokens=2),
    "POLY": lambda: peft.PolyConfig(r=2, target_modules=TARGETS),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2),
    "P_TUNING": lambda: peft.PromptEncoderConfig(num_virtual_tokens=2),
    "SHADOW": lambda: peft.ShadowConfig(target_modules=r".*layers\.\d+$"),
    "TRAINABLE_TOKENS": lambda: peft.TrainableTokensConfig(token_indices=[1, 2]),
    "XLORA": lambda: peft.XLoraConfig(adapters={"a": "a"}),
}


def registered() -> set[str]:
    """PEFT's own methods."""
    return {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING if kind != "TSD" and not kind.startswith("DASH_")}


def config(kind: str, **changes) -> DashConfig:
    settings = {"prelaunch_steps": 3, "num_directions": 5, "dash_lr_ratio": 20.0}
    return DashConfig(peft=WORKS[kind](), **{**settings, **changes})


def quiet(make, *args, **kwargs):
    """Without PEFT's advice."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make(*args, **kwargs)


def shaken(model, size: float = 0.05):
    """`model` with noise on what its method trains, which then does not stand at its start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not re.search(r"[_.]dash\.", name):
                parameter.add_(size * torch.randn_like(parameter))
    return model


def row(kind: str) -> str:
    """What is measured of a method that works: whether its change is a function of W, and PEFT's word on LoRAs."""
    model = shaken(quiet(get_peft_model, tiny.llama(), config(kind)))
    layer = next(iter(adapted_layers(model, "default").values()))
    change = layer.learned_change("default")
    layer.get_base_layer().weight.data.mul_(2)
    added = torch.allclose(layer.learned_change("default"), change, rtol=1e-6, atol=1e-9)
    converted = layer.has_exact_lora("default")
    name, _, variant = kind.partition("-")
    title = f"{type(WORKS[kind]()).__name__.removesuffix('Config')}" + (f" (`{variant}`)" if variant else "")
    change_is = "added to W" if added else "a function of W"
    return f"| {title} | `{name}` | works | {change_is} | {'exact' if converted else '`rank=`'} | |"


def refusal(kind: str) -> str:
    """What DashConfig says of a method that is refused."""
    with pytest.raises(ValueError, match=r"cannot be given directions: \w") as raised:
        DashConfig(peft=quiet(REFUSED[kind]))
    return str(raised.value)


def page() -> str:
    refused = []
    for kind in REFUSED:
        name, _, reason = refusal(kind).partition("Config cannot be given directions: ")
        refused.append(f"| {name} | `{kind}` | refused | - | - | {reason[0].upper()}{reason[1:]} |")
    return "\n".join([HEAD, *map(row, WORKS), *refused, ""])


HEAD = f"""\
# Directions beside other PEFT methods

`DashConfig(peft=...)` takes the configuration of another method of PEFT's. That method is trained as ever, and Δσ
along directions of each layer is learned beside it: `layer(x) + U diag(Δσ) Vᵀ x`. They are those of the gradient,
found before the first step, or, with `prelaunch_steps`, the paper's, identified after so many steps from the change
the method has made of the layer's weight, ΔW = merged weight − base weight.

The table has every method that PEFT {peft.__version__} registers.
`PYTHONPATH=tests python -m support.peft_methods` writes it, and a test fails where it is out of date, or where a
method is missing. Each that works is checked against dense float64 arithmetic: the directions at the transition, the
output, merge and unmerge, the base without the adapter, save, load (by PEFT, and by transformers' `load_adapter`
where that loads the method alone, AdaLoRA excepted) and resume.

*ΔW* says whether the method adds something to W or makes a new weight of it. *Export* says what `export_lora` needs to
write a plain LoRA. `exact`: nothing, PEFT too converts such an adapter to one. `rank=`: how much to keep of a ΔW that
may be of full rank. The directions are exact in either. The merged weights (`merge_and_unload`) hold everything.
[Quantized](quantized.md) base weights are refused here, and taken by `TsdConfig`.

| method | PEFT type | directions | ΔW | export | why not |
| --- | --- | --- | --- | --- | --- |"""


if __name__ == "__main__":
    PAGE.write_text(page())
