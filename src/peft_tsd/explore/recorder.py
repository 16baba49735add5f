"""Watching training: the change rates of every adapted weight, stored every few optimizer steps.

Rates come from the adapter's low-rank factors and one factorization of each frozen weight; no dense ΔW is formed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.trainer_callback import TrainerCallback

from ..directions.change import LowRank, check_matrix
from ..directions.definitions import rates_on
from ..directions.spectrum import Spectrum, as_double
from ..distributed.sharded import is_main_process
from ..files.whole import write_file
from ..models.matrix import as_matrix, is_transposed, no_matrix
from ..models.packed import dequantized, is_quantized
from ..models.wrapped import modules_in_base
from ..tuner.layer import TsdLayer
from .measure import check_settings
from .trajectory import INDEX, read_index, same_norm, step_files, step_name, write_index

MAX_STEP = 10**12


class DirectionRecorder(TrainerCallback):
    """Stores the change rates of every LoRA and TSD layer while it trains, for `Trajectory` and `agreement`.

        ```py
        >>> Trainer(model=model, ..., callbacks=[TsdCallback(), DirectionRecorder("rates", every=10)]).train()
        ```

    In a loop of one's own, after `optimizer.step()`:

        ```py
        >>> if step % 10 == 0:
        ...     recorder.record(model, step)
        ```

    ΔW is the whole effective change: of a TSD layer with what it learned along its directions, and less what LoRA-Init
    started from. The frozen weight is the one in the layer: under an initialization of PEFT's that moves a part of it
    into the adapter (PiSSA, OLoRA), ΔW is measured from what is left. At the step of a transition, a recorder that
    stands before `TsdCallback` in the list sees the layer before it, one that stands behind it after it.

    A run that is resumed goes on in its folder; what had been recorded after the point it resumes from is removed.
    In distributed training only the main process writes, and the weights must be whole in its memory.

    Attributes:
        left_out: The adapted layers that are not recorded, and why; filled at the first step.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every: int = 10,
        *,
        eps: float = 1e-6,
        cache_gib: float = 4.0,
        adapter_name: str | None = None,
    ) -> None:
        """
        Args:
            folder: Where to store them; made if it is not there.
            every: Optimizer steps between records; the last step is recorded too. For Trainers: `record` does as told.
            eps: ε of the change rate, in the unit of σ.
            cache_gib: Factorizations are kept in CPU memory up to this many GiB in total (about 8·k² bytes a weight,
                with k = min(out, in): 134 MB for k = 4096). Those of the remaining layers are computed anew each time.
            adapter_name: The adapter to record; the first active one by default.

        Raises:
            ValueError: A setting is out of range.
        """
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every must be a positive integer, optimizer steps between records; got {every!r}.")
        if not cache_gib >= 0:
            raise ValueError(f"cache_gib must be 0 or more GiB; got {cache_gib!r}.")
        check_settings(1, eps)
        self.folder = Path(folder)
        self.every = every
        self.eps = eps
        self.adapter_name = adapter_name
        self.left_out: dict[str, str] = {}
        self._cache_left = cache_gib * 2**30
        self._spectra: dict[str, Spectrum] = {}
        self._begun = False
        self._last: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._begin(model, first=state.global_step + 1, resumed=state.global_step > 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        on_grid = state.global_step % self.every == 0
        if state.is_world_process_zero and (on_grid or state.global_step >= state.max_steps):
            self.record(model, state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        # Training may have been stopped early; but where the best checkpoint was loaded since, the model is no longer
        # that of the last step.
        stopped_early = state.global_step > 0 and self._last != state.global_step
        if state.is_world_process_zero and stopped_early and not args.load_best_model_at_end:
            self.record(model, state.global_step)

    @torch.no_grad()
    def record(self, model: nn.Module, step: int) -> None:
        """Store the change rates of `model` after optimizer step `step`. Does nothing but on the main process.

        Args:
            model: The model with LoRA or TSD adapters, wrapped (DDP, torch.compile, Accelerate) or not.
            step: How many optimizer steps have been taken. The first step recorded tells whether the run goes on: what
                the folder holds of this and of later steps is removed, what it holds of earlier ones is kept.

        Raises:
            ValueError: `step` is no step number; the model has no layer to record, or its factors hold NaN or Inf; or
                the folder holds rates of another model, or of another run (of later steps only).
            OSError: The folder cannot be written.
        """
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < MAX_STEP:
            raise ValueError(f"step must be the number of optimizer steps taken, 0 or more; got {step!r}.")
        if not is_main_process():
            return
        if not self._begun:
            self._begin(model, first=step, resumed=False)
        rates = {}
        for name, layer, adapter in self._layers(model):
            b, a, scaling = _change(layer, adapter)
            check_matrix(b, f"B of {name}")
            check_matrix(a, f"A of {name}")
            spectrum = self._spectrum(name, layer)
            device = spectrum.sigma.device
            found = rates_on(spectrum, (b.to(device), a.to(device), scaling), self.eps)
            rates[name] = found.float().cpu().contiguous()
        write_file(self.folder / step_name(step), partial(save_file, rates))
        self._last = step

    def _begin(self, model: nn.Module, first: int, resumed: bool) -> None:
        shapes, norms = {}, {}
        for name, layer, _ in self._layers(model):
            weight = frozen_weight(layer)
            shapes[name] = (weight.shape[0], weight.shape[1])
            norms[name] = float(as_double(weight).norm())
        if (self.folder / INDEX).exists():
            self._check_same_base(shapes, norms)
            recorded = step_files(self.folder)
            if recorded and min(recorded) >= first and not resumed:
                raise ValueError(
                    f"{self.folder} holds the rates of a run up to step {max(recorded)}, and this one begins at its "
                    "start; give a new folder, or remove it first."
                )
            for step, path in recorded.items():
                if step >= first:
                    path.unlink()
        else:
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(f"{self.folder} is not empty, and holds no recorded rates; give a new folder.")
            self.folder.mkdir(parents=True, exist_ok=True)
            write_index(self.folder, shapes, norms, self.eps)
        self._spectra.clear()
        self._last = None
        self._begun = True

    def _check_same_base(self, shapes: dict[str, tuple[int, int]], norms: dict[str, float]) -> None:
        old_shapes, old_norms, old_eps = read_index(self.folder)
        ending = "; give a new folder, or remove it first."
        if old_eps != self.eps:
            raise ValueError(f"{self.folder} holds rates with eps={old_eps}, and eps={self.eps} is asked for{ending}")
        for name in [*shapes, *old_shapes]:
            if shapes.get(name) != old_shapes.get(name):
                raise ValueError(
                    f"{self.folder} holds the rates of another model: {name} is {old_shapes.get(name, 'missing')} "
                    f"there and {shapes.get(name, 'missing')} here{ending}"
                )
            if not same_norm(norms[name], old_norms[name]):
                raise ValueError(
                    f"{self.folder} holds the rates of another base model: the weight of {name} has norm "
                    f"{old_norms[name]:.6g} there and {norms[name]:.6g} here{ending}"
                )

    def _spectrum(self, name: str, layer: LoraLayer) -> Spectrum:
        """The factorization of a frozen weight: on the CPU where it is kept, on the weight's device where not."""
        if name in self._spectra:
            return self._spectra[name]
        spectrum = Spectrum(frozen_weight(layer))
        size = spectrum.bytes_on_cpu()
        if size <= self._cache_left:
            self._cache_left -= size
            spectrum = self._spectra[name] = spectrum.cpu()
        return spectrum

    def _layers(self, model: nn.Module) -> Iterator[tuple[str, LoraLayer, str]]:
        """Name in the base model, layer and adapter of every layer to record.

        Raises:
            ValueError: There is none, or an adapter is merged into its weight.
        """
        self.left_out = {}
        found = False
        for name, layer in modules_in_base(model):
            if not isinstance(layer, LoraLayer):
                continue
            adapter = self.adapter_name or next(iter(layer.active_adapters), "default")
            if layer.merged:
                raise ValueError(f"The adapter is merged into the weight of {name}; call unmerge_adapter() first.")
            if reason := _unsupported(layer, adapter):
                self.left_out[name] = reason
            else:
                found = True
                yield name, layer, adapter
        if not found:
            reasons = "".join(f" ({name}: {reason})" for name, reason in list(self.left_out.items())[:1])
            raise ValueError(
                f"{type(model).__name__} has no LoRA or TSD layer whose directions can be recorded{reasons}."
            )


def frozen_weight(layer: LoraLayer) -> Tensor:
    """The frozen base weight of a LoRA layer as a matrix (out, in): a view of it, or de-quantized."""
    base = layer.get_base_layer()
    return (
        dequantized(base, layer.in_features)
        if is_quantized(base)
        else as_matrix(base.weight.detach(), is_transposed(base))
    )


def _change(layer: LoraLayer, adapter: str) -> LowRank:
    if isinstance(layer, TsdLayer):
        factors = layer.factors(adapter)
        return factors.up().detach(), factors.down().detach(), 1.0
    b, a = layer.lora_B[adapter].weight, layer.lora_A[adapter].weight
    return b.detach().flatten(1), a.detach().flatten(1), float(layer.scaling[adapter])


def _unsupported(layer: LoraLayer, adapter: str) -> str | None:
    if adapter not in layer.lora_A:
        return f"no A and B of an adapter {adapter!r}: an embedding, or an adapter of other layers"
    base = layer.get_base_layer()
    if not is_quantized(base) and (reason := no_matrix(base)):
        return reason
    if adapter in layer.lora_variant:
        return f"its change is not B·A alone ({type(layer.lora_variant[adapter]).__name__})"
    if any(weight.is_meta or isinstance(weight, DTensor) for weight in base.parameters()):
        return "its weight is offloaded or sharded over processes; it must be whole in memory"
    return None
