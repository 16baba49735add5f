"""What leaves the library: a pipeline's adapters as one LoRA file of diffusers, or in kohya's keys.

Each adapter is a LoRA of a higher rank (see `peft_tsd.export`), so the file is exact. Its rank is one and its scaling
1 everywhere, which is what readers take them to be where a file says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..export.factors import lora_scaling, truncate
from ..export.lora import ExportReport, as_lora, check_rank, convert
from ..export.pipelines import DIFFUSERS_FILE, in_component
from ..export.ranks import OneRank, of_one_rank
from ..files.adapters import PREFIX
from ..files.whole import write_file, write_folder
from ..models.wrapped import adapted_model
from ..tuner.config import TsdConfig
from ..tuner.opening import read_adapter
from ..tuner.settings import DirectionSettings
from .adapters import component_names

KOHYA_FILE = "kohya_lora_weights.safetensors"


class _Component(NamedTuple):
    """The plain LoRA of one component, of scaling 1."""

    name: str
    state: dict[str, Tensor]
    errors: dict[str, float]


def save_lora_weights(
    folder: str | Path,
    *,
    rank: int | None = None,
    kohya: bool = False,
    weight_name: str = DIFFUSERS_FILE,
    **components: nn.Module | None,
) -> ExportReport:
    """Write the adapters of a pipeline's models as the LoRA file that `pipe.load_lora_weights` reads, exactly.

    It takes the place of `get_peft_model_state_dict` and the pipeline's `save_lora_weights` at the end of diffusers'
    training scripts:

        ```py
        >>> targets = ["to_q", "to_k", "to_v", "to_out.0"]
        >>> unet.add_adapter(TsdConfig(r=8, lora_alpha=16, target_modules=targets, prelaunch_steps=100))
        >>> ...  # the script's training, with advance(unet, optimizer) after each optimizer step
        >>> save_lora_weights(args.output_dir, unet=unet, text_encoder=text_encoder_one, text_encoder_2=None)
        >>> pipe.load_lora_weights(args.output_dir)  # anywhere, without this package
        ```

    Args:
        folder: Where to write it; made if it is not there. A file of the same name is replaced.
        rank: Compress to at most this rank, and report the relative error of each layer. Exact by default.
        kohya: Also write the file that AUTOMATIC1111's and other WebUIs load; for UNets only.
        weight_name: What the file is called.
        components: The models by their names in the pipeline, wrapped or not; those that are None, or carry no
            adapter, are left out. An adapter may be of `TsdConfig`, `DashConfig` or a plain `LoraConfig`.

    Raises:
        ValueError: No model carries an adapter, or one that is no LoRA; `kohya` with a transformer; or `rank` is not a
            positive integer. Nothing is written then.
    """
    check_rank(rank)
    made = []
    for name, model in components.items():
        if model is not None and getattr(adapted := adapted_model(model), "peft_config", None):
            made.append(_of_model(name, adapted, rank))
    if not made:
        given = ", ".join(name for name, model in components.items() if model is not None)
        raise ValueError(
            f"There is no adapter to save ({given or 'no model was given'}); give the adapted models by their names "
            "in the pipeline: save_lora_weights(FOLDER, unet=unet, text_encoder=text_encoder)."
        )
    _check_kohya(kohya, components)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    filled = _together(made, rank)
    _write(folder, filled, kohya, weight_name)
    return ExportReport(folder, filled.rank, _errors(made), filled.ranks)


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
    check_rank(rank)
    names = component_names(adapters)
    if not names:
        raise ValueError(f"{str(adapters)!r} holds no adapter of a pipeline; give the adapter/ of a run folder.")
    _check_kohya(kohya, names)
    made = [_of_folder(Path(adapters) / name, rank) for name in names]
    filled = _together(made, rank)
    write_folder(out, lambda folder: _write(folder, filled, kohya, DIFFUSERS_FILE))
    return ExportReport(out, filled.rank, _errors(made), filled.ranks)


def _check_kohya(kohya: bool, names: Iterable[str]) -> None:
    if kohya and "transformer" in names:
        raise ValueError(
            "kohya's keys have no form for a transformer's adapter that others agree on; leave kohya out."
        )


def _together(components: Iterable[_Component], rank: int | None) -> OneRank:
    tensors: dict[str, Tensor] = {}
    for component in components:
        tensors |= in_component({k: x.float().contiguous() for k, x in component.state.items()}, component.name)
    return of_one_rank(tensors, at_least=rank)


def _errors(components: Iterable[_Component]) -> dict[str, float]:
    return {f"{part.name}.{layer}": error for part in components for layer, error in part.errors.items()}


def _write(folder: Path, filled: OneRank, kohya: bool, weight_name: str) -> None:
    write_file(folder / weight_name, partial(save_file, filled.state, metadata={"format": "pt"}))
    if kohya:
        content = _kohya(filled.state)
        write_file(folder / KOHYA_FILE, partial(save_file, content, metadata={"ss_network_module": "networks.lora"}))


def _of_folder(folder: Path, rank: int | None) -> _Component:
    config, state = read_adapter(folder)
    if isinstance(config, TsdConfig):
        _, state, errors = as_lora(config, state, rank)
    else:
        state, errors = _scaled(config, state, rank)
    return _Component(folder.name, state, errors)


def _of_model(name: str, model: nn.Module, rank: int | None) -> _Component:
    configs: dict[str, PeftConfig] = model.peft_config  # type: ignore[assignment]
    if any(isinstance(config, DirectionSettings) for config in configs.values()):
        _, state, errors = convert(model, None, rank)
    else:
        adapter = next(iter(configs))
        state, errors = _scaled(configs[adapter], get_peft_model_state_dict(model, adapter_name=adapter), rank)
    return _Component(name, {key: x.detach().cpu() for key, x in state.items()}, errors)


def _scaled(
    config: PeftConfig, state: dict[str, Tensor], rank: int | None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """A plain LoRA with its scaling written into B, and into B's bias.

    Raises:
        ValueError: It is none.
    """
    if getattr(config.peft_type, "value", config.peft_type) != "LORA" or getattr(config, "use_dora", False):
        raise ValueError(f"An adapter of type {config.peft_type} is no plain LoRA, which is what pipelines load.")
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
