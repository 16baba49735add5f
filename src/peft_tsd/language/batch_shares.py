"""A batch that is shared out over the processes: an optimizer step is what it is in one.

Every process goes through the batches of all, in the same order, and trains on its own rows of each: the first ones in
the main process, the next in the second. What DDP averages over W processes is then to be the loss of the whole batch,
so that each counts by what it has of it: `W * (its own)/(all)`. Of tokens transformers' Trainer takes care, where a
model takes `num_items_in_batch`; of rows, the factor comes with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Trainer

from ..distributed.sharded import world
from ..errors import RecipeError
from ..runs.processes import own_rows
from ..schedule.gradients import Loss, loss_of_output
from .tasks.generation import IGNORED

FACTOR = "share_of_rows"
"""By what a classifier's loss on this process's rows counts, in a batch."""

# A mixin without a base class can be put before any Trainer.
_Mixin: Any = Trainer if TYPE_CHECKING else object


class OwnRows:
    """Makes a batch of this process's rows. Where it has none, of one that does not count: all must take each step.

    Args:
        collate: Makes a batch of rows.
        by_tokens: Whether tokens are learned, each with a label; otherwise rows are.
    """

    def __init__(self, collate: Callable[[Sequence[Any]], Any], by_tokens: bool) -> None:
        self._collate, self._by_tokens = collate, by_tokens

    def __call__(self, rows: Sequence[Any]) -> Any:
        own = own_rows(rows)
        batch = self._collate(own or rows[:1])
        if not self._by_tokens:
            batch[FACTOR] = torch.tensor(len(own) * world()[1] / len(rows))
        elif not own:
            batch["labels"].fill_(IGNORED)
        return batch


class SharedBatches(_Mixin):
    """A Trainer, of which this is put before the class, whose batches are shared out over the processes.

    Args:
        by_tokens: As for `OwnRows`.
    """

    def __init__(self, *args: Any, by_tokens: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._by_tokens = by_tokens

    def check_shares(self) -> None:
        """Refuse a model of which Trainer cannot count the tokens of all processes.

        Raises:
            RecipeError: It is one.
        """
        if world()[1] > 1 and self._by_tokens and not self.model_accepts_loss_kwargs:
            raise RecipeError(
                f"{type(self.model).__name__} takes no num_items_in_batch, by which its loss would be shared out over "
                "processes; train it in one process"
            )

    def get_train_dataloader(self, *, whole: bool = False) -> Any:
        """The batches; with `whole`, each with the rows of all processes."""
        _, size = world()
        if size == 1:
            return super().get_train_dataloader()
        trainer: Any = self
        given = trainer._train_batch_size, trainer.data_collator
        trainer._train_batch_size *= size
        if not whole:
            trainer.data_collator = OwnRows(trainer.data_collator, self._by_tokens)
        try:
            loader = super().get_train_dataloader()
        finally:
            trainer._train_batch_size, trainer.data_collator = given
        # Accelerate would give each process every so-manieth batch; here each goes through all of them.
        loader.batch_sampler.num_processes, loader.batch_sampler.process_index = 1, 0
        return loader

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        factor = inputs.pop(FACTOR, None)
        if factor is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = super().compute_loss(model, inputs, num_items_in_batch=None)
        return loss * factor


def loss_of_share(loss: Loss) -> Loss:
    """Of a model and a batch of `OwnRows`: a loss whose mean over the processes is `loss` of the whole batch."""
    _, size = world()
    if size == 1:
        return loss

    def of_share(model: nn.Module, batch: Any) -> Tensor:
        if FACTOR in batch:
            factor: Tensor = batch[FACTOR]
            return loss(model, {key: x for key, x in batch.items() if key != FACTOR}) * factor
        learned = batch["labels"][..., 1:].ne(IGNORED).sum()
        dist.all_reduce(learned)
        return loss(model, {**batch, "num_items_in_batch": learned}) * size

    return of_share


def without_cache(batch: Any) -> dict[str, Any]:
    """A batch as Trainer trains on it: with a cache, packed conversations would see each other."""
    return {**batch, "use_cache": False}


def loss_without_cache(model: nn.Module, batch: Any) -> Tensor:
    return loss_of_output(model, without_cache(batch))
