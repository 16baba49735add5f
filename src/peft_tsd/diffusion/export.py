"""What leaves the library: a pipeline's adapters as one LoRA file of diffusers, or in kohya's keys.

Each adapter is a LoRA of a higher rank (see `peft_tsd.export`), so the file is exact. Its rank is one and its scaling
1 everywhere, which is what readers take them to be where a file says nothing.
"""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils.save_and_load import load_peft_weights
from safetensors.torch import save_file
from torch import Tensor

from ..export.factors import lora_scaling, truncate
from ..export.lora import ExportReport, as_lora
from ..export.ranks import of_one_rank
from ..files.adapters import PREFIX
from ..files.whole import write_folder
from ..tuner.config import TsdConfig
from .adapters import component_names

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"

KOHYA_FILE = "kohya_lora_weights.safetensors"


def export_diffusers(
    adapters: str | Path, out: str | Path, *, rank: int | None = None, kohya: bool = False
) -> ExportReport:
    """Write the native adapters of a run as a LoRA file, into the new folder `out`.

    `pipe.load_lora_weights(out)` loads it wherever diffusers and PEFT are, without this package.

    Args:
        adapters: The `adapter` folder of a run.
        out: The folder to make; it must not exist.
        rank: Compress to at most this rank, and report the relative error of each layer. Exact by default.
        kohya: Also write the file that AUTOMATIC1111's and other WebUIs load; for UNets only.

    Raises:
        FileExistsError: `out` exists.
        ValueError: `adapters` holds none, a broken one, or with `kohya` one of a transformer; or `rank` is not a
            positive integer.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} exists and is not overwritten. Give a new folder, or remove it first.")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"rank must be a positive integer, or None for an exact export; got {rank!r}.")
    names = component_names(adapters)
    if not names:
        raise ValueError(f"{str(adapters)!r} holds no adapter of a pipeline; give the adapter/ of a run folder.")
    if kohya and "transformer" in names:
        raise ValueError(
            "kohya's keys have no form for a transformer's adapter that others agree on; leave kohya out."
        )
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name in names:
        layers, worse = _component(Path(adapters) / name, rank)
        tensors |= {f"{name}.{key}": tensor for key, tensor in layers.items()}
        errors |= {f"{name}.{layer}": error for layer, error in worse.items()}
    filled = of_one_rank(tensors)
    tensors = filled.state

    def fill(folder: Path) -> None:
        save_file(tensors, folder / DIFFUSERS_FILE, metadata={"format": "pt"})
        if kohya:
            save_file(_kohya(tensors), folder / KOHYA_FILE, metadata={"ss_network_module": "networks.lora"})

    write_folder(out, fill)
    return ExportReport(out, filled.rank, errors, filled.ranks)


def _component(folder: Path, rank: int | None) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The plain LoRA of one component, of scaling 1, by the layers' names; with the errors of its compression."""
    config = PeftConfig.from_pretrained(str(folder))
    state = load_peft_weights(str(folder), device="cpu")
    if isinstance(config, TsdConfig):
        _, found, errors = as_lora(config, state, rank)
    else:
        found, errors = _scaled(config, state, rank)
    return {key.removeprefix(PREFIX): tensor.float().contiguous() for key, tensor in found.items()}, errors


def _scaled(
    config: PeftConfig, state: dict[str, Tensor], rank: int | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A plain LoRA with its scaling written into B, and into B's bias."""
    found, errors = dict(state), {}
    for key in [key for key in state if key.endswith(".lora_A.weight")]:
        layer = key.removesuffix(".lora_A.weight")
        a, b = state[key].float(), state[f"{layer}.lora_B.weight"].float()
        scaling = lora_scaling(config, layer.removeprefix(PREFIX), a.shape[0])
        b = scaling * b
        if rank is not None:
            small_a, small_b, errors[layer.removeprefix(PREFIX)] = truncate(a.flatten(1), b.flatten(1), rank)
            a, b = small_a.reshape(-1, *a.shape[1:]), small_b.reshape(len(b), -1, *b.shape[2:])
        found |= {key: a, f"{layer}.lora_B.weight": b}
        if f"{layer}.lora_B.bias" in state:
            found[f"{layer}.lora_B.bias"] = scaling * state[f"{layer}.lora_B.bias"].float()
    return found, errors


def _kohya(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya

    found: dict[str, Tensor] = convert_state_dict_to_kohya(dict(tensors))
    if not any(key.startswith("lora_te2_") for key in found):
        # A model with one text encoder does not number it.
        found = {key.replace("lora_te1_", "lora_te_", 1): tensor for key, tensor in found.items()}
    return {key: x.contiguous() if x.ndim else torch.tensor(float(x)) for key, x in found.items()}
