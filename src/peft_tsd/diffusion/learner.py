"""One optimizer step after another, and nothing else.

What step n draws (photos, noise, timesteps, dropout) follows from the seed and n alone: a run that is continued draws
the same as one that was never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from torch import Generator, Tensor
from transformers import Trainer, TrainingArguments, get_scheduler

from ..distributed.sharded import world
from ..errors import RecipeError
from ..runs.processes import gathered, own_range
from ..schedule.stepping import advance
from ..schedule.taken import steps_of
from ..tuner.config import TsdConfig
from .adapters import Adapters
from .encoded import Encoded
from .families import Embeddings, PipelineFamily
from .objective import Objective, weighted_loss
from .recipe import DreamBooth

FIXED_TIMESTEPS = 4
"""A photo, in the fixed loss."""

MAX_OVERFLOWS = 40
"""In one step. Each halves float16's loss scale of 65536, and 24 of them bring it below float16's smallest number."""


class Step(NamedTuple):
    """What one optimizer step tells."""

    loss: float
    learning_rate: float
    transition: float | None
    """Seconds, where the directions were identified after this step."""


class Learner:
    """Adapters in training.

    Args:
        pipe: The pipeline; its denoiser, and the text encoders that are trained, are on the accelerator's device.
        family: Its family.
        recipe: How to train.
        adapters: What is trained.
        groups: The photos: `"subject"` and, with prior preservation, `"prior"`.
        objective: What the denoiser predicts.
    """

    def __init__(
        self,
        pipe: Any,
        family: PipelineFamily,
        recipe: DreamBooth,
        adapters: Adapters,
        groups: dict[str, Encoded],
        objective: Objective,
    ) -> None:
        self._pipe, self._family, self._recipe, self._adapters = pipe, family, recipe, adapters
        self._groups, self._objective = groups, objective
        self._denoiser = adapters[family.denoiser]
        self._dtype = getattr(torch, recipe.model.dtype)
        self._prompts = [str(recipe.data.prompt), str(recipe.prior.prompt)][: len(groups)]
        self._parameters = [p for model in adapters.values() for p in model.parameters() if p.requires_grad]
        self._scheduled = [m for m in adapters.values() if isinstance(m.peft_config["default"], TsdConfig)]
        optimizer = _optimizer(recipe, adapters, family)
        self._accelerator = _accelerator(recipe.model.dtype)
        self._optimizer = self._accelerator.prepare(optimizer)
        self._schedule = get_scheduler(
            recipe.optimizer.schedule,
            self._optimizer.optimizer,
            num_warmup_steps=recipe.optimizer.warmup(recipe.training.steps),
            num_training_steps=recipe.training.steps,
        )
        # Once: walking over thousands of modules at each step would cost more than the adapter.
        self._train_mode(True)
        self._cached = [self._on_device(group.embeddings) for group in groups.values()]

    def step(self, number: int) -> Step:
        """Take the optimizer step `number`, counted from 1.

        Raises:
            RecipeError: The loss is not finite, or its gradients overflow float16.
            TransitionError: As `peft_tsd.advance`.
        """
        learning_rate = float(self._schedule.get_last_lr()[0])
        for _ in range(MAX_OVERFLOWS):
            loss = self._backward(number)
            if not math.isfinite(loss):
                raise RecipeError(
                    f"the loss is {loss} at step {number}: training diverged; lower optimizer.learning_rate, or use "
                    "model.dtype=float32"
                )
            if self._recipe.optimizer.max_grad_norm:
                self._accelerator.clip_grad_norm_(self._parameters, self._recipe.optimizer.max_grad_norm)
            before = steps_of(self._optimizer)
            self._optimizer.step()
            self._optimizer.zero_grad()
            # In float16 a step whose gradients overflow is left out; it is taken again with a smaller loss scale. What
            # Accelerate says of that (`step_was_skipped`) does not hold with a fused optimizer.
            if before is None or steps_of(self._optimizer) != before:
                break
        else:
            raise RecipeError(f"the gradients overflow float16 at step {number}; use model.dtype=bfloat16")
        self._schedule.step()
        start = time.perf_counter()
        moved = [advance(model, self._optimizer) for model in self._scheduled]
        return Step(loss, learning_rate, time.perf_counter() - start if any(moved) else None)

    def _backward(self, number: int) -> float:
        generator = Generator().manual_seed(_seed(self._recipe.seed, number))
        torch.manual_seed(_seed(self._recipe.seed, number, 1 + world()[0]))
        accumulated = self._recipe.training.gradient_accumulation
        total = torch.zeros((), device=self._accelerator.device)
        for portion in range(accumulated):
            loss = self._loss((number - 1) * accumulated + portion, generator) / accumulated
            self._accelerator.backward(loss)
            total += loss.detach()
        if world()[1] > 1:
            self._add_up(total)
        return float(total)

    def _add_up(self, loss: Tensor) -> None:
        """Add what the processes have come to with their photos, in place: the loss, and the gradients."""
        parts = [loss, *(p.grad for p in self._parameters if p.grad is not None)]
        sums = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(sums)
        for part, total in zip(parts, torch.split(sums, [part.numel() for part in parts])):
            part.copy_(total.view_as(part))

    def _loss(self, batch: int, generator: Generator) -> Tensor:
        size = self._recipe.training.batch_size
        chosen = [self._chosen(group, batch) for group in self._groups.values()]
        latents = torch.cat([g.latents(index, generator) for g, index in zip(self._groups.values(), chosen)])
        time_ids = torch.cat([g.time_ids[index] for g, index in zip(self._groups.values(), chosen)])
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = self._objective.draw(len(latents), generator)
        weights = torch.full((len(latents),), 1 / size)
        weights[size:] *= self._recipe.prior.weight
        # Drawn for all processes alike, each of which then takes its photos.
        own = own_range(len(latents))
        counts = [len(set(own) & set(range(i * size, (i + 1) * size))) for i in range(len(self._groups))]
        latents, noise, timesteps, time_ids, weights = (
            x[own.start : own.stop] for x in (latents, noise, timesteps, time_ids, weights)
        )
        with self._accelerator.autocast():
            embeddings = self._embeddings(counts)
            return self._weighted_loss(latents, noise, timesteps, embeddings, time_ids, weights)

    def _weighted_loss(
        self,
        latents: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        embeddings: Embeddings,
        time_ids: Tensor,
        weights: Tensor,
    ) -> Tensor:
        device = self._accelerator.device
        latents, noise, timesteps = latents.to(device), noise.to(device), timesteps.to(device)
        noisy, times = self._objective.noised(latents, noise, timesteps)
        predicted = self._family.denoise(
            self._denoiser, noisy.to(self._dtype), times, embeddings, time_ids.to(device, self._dtype)
        )
        weights = weights.to(device) * self._objective.weights(timesteps)
        return weighted_loss(predicted, self._objective.target(latents, noise, timesteps), weights)

    def _chosen(self, group: Encoded, batch: int) -> Tensor:
        """The photos of a batch: all of them in one random order after another."""
        photos, size = len(group.mean), self._recipe.training.batch_size
        position = np.arange(batch * size, (batch + 1) * size)
        orders = {
            epoch: np.random.default_rng([self._recipe.seed, int(epoch)]).permutation(photos)
            for epoch in np.unique(position // photos)
        }
        return torch.tensor([orders[p // photos][p % photos] for p in position])

    def _embeddings(self, rows: Iterable[int]) -> Embeddings:
        found = self._cached
        if self._recipe.text_encoders.train:
            encoded = self._family.encode(self._pipe, self._prompts, self._accelerator.device)
            found = [{key: x[i : i + 1] for key, x in encoded.items()} for i in range(len(self._prompts))]
        expanded = [
            {key: x.expand(count, *x.shape[1:]) for key, x in embeddings.items()}
            for embeddings, count in zip(found, rows)
        ]
        return {key: torch.cat([embeddings[key] for embeddings in expanded]) for key in expanded[0]}

    @torch.no_grad()
    def fixed_loss(self) -> float:
        """The loss over the subject's photos at fixed noises and timesteps: losses of a run that can be compared."""
        self._train_mode(False)
        group, size = self._groups["subject"], self._recipe.training.batch_size
        generator = Generator().manual_seed(_seed(self._recipe.seed, 0))
        photos = torch.arange(len(group.mean)).repeat_interleave(FIXED_TIMESTEPS)
        noise = torch.randn(len(photos), *group.mean.shape[1:], generator=generator)
        share = (torch.arange(FIXED_TIMESTEPS) + 0.5) / FIXED_TIMESTEPS
        timesteps = (share * self._objective.num_timesteps).long().repeat(len(group.mean))
        own = own_range(len(photos))
        total = 0.0
        for start in range(own.start, own.stop, size):
            rows = slice(start, min(start + size, own.stop))
            index = photos[rows]
            with self._accelerator.autocast():
                total += float(
                    self._weighted_loss(
                        group.mean[index],
                        noise[rows],
                        timesteps[rows],
                        self._embeddings([len(index)]),
                        group.time_ids[index],
                        torch.full((len(index),), 1 / len(photos)),
                    )
                )
        self._train_mode(True)
        return sum(gathered(total))

    def save(self, path: Path) -> None:
        """Write what `load` needs beside the adapters themselves."""
        scaler = self._accelerator.scaler
        state = {
            "optimizer": self._optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        torch.save(state, path)

    def load(self, path: Path) -> None:
        """Continue from what `save` wrote."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self._optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        if state["scaler"] is not None:
            self._accelerator.scaler.load_state_dict(state["scaler"])

    def _train_mode(self, on: bool) -> None:
        for model in self._adapters.values():
            model.train(on)

    def _on_device(self, embeddings: Embeddings) -> Embeddings:
        return {key: x.to(self._accelerator.device, self._dtype) for key, x in embeddings.items()}


def _accelerator(dtype: str) -> Accelerator:
    # What a process once chose it keeps, and refuses another precision; a second run may want one.
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision={"float32": "no", "bfloat16": "bf16", "float16": "fp16"}[dtype])


def _optimizer(recipe: DreamBooth, adapters: Adapters, family: PipelineFamily) -> torch.optim.Optimizer:
    """The optimizer that transformers' Trainer knows by the name, with a learning rate for the text encoders."""
    wanted = recipe.optimizer
    arguments = TrainingArguments(
        optim=wanted.name, learning_rate=wanted.learning_rate, report_to="none", output_dir=recipe.output
    )
    optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    groups = []
    for name, model in adapters.items():
        rate = wanted.learning_rate if name == family.denoiser else recipe.text_encoders.learning_rate
        groups.append(
            {
                "params": [p for p in model.parameters() if p.requires_grad],
                "lr": rate or wanted.learning_rate,
                "weight_decay": wanted.weight_decay,
            }
        )
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **options)
    return optimizer


def _seed(*numbers: int) -> int:
    """A seed that follows from some numbers, and tells nothing of the next."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
