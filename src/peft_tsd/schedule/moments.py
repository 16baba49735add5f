"""What an optimizer remembers of parameters that start anew, and has to forget."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import zero
from ..errors import TransitionError


def owners_of(parameters: list[nn.Parameter], optimizer: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizer that holds each parameter.

    Raises:
        TransitionError: None of those given does.
    """
    optimizers = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    # Accelerate wraps the optimizer whose state is meant.
    optimizers = [getattr(opt, "optimizer", opt) for opt in optimizers]
    owner = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
    owner |= {id(p): optimizers[0] for p in parameters if zero.is_copied(p)}
    missing = sum(id(p) not in owner for p in parameters)
    if missing:
        kinds = ", ".join(type(opt).__name__ for opt in optimizers)
        raise TransitionError(
            f"The optimizer given ({kinds}) does not hold {missing} of the {len(parameters)} A and B that restart, "
            "so that their moments cannot be cleared. Pass the optimizer that was built from this model's parameters; "
            "where it keeps flattened copies of them, use method='lora-dash'."
        )
    return [owner[id(p)] for p in parameters]


def forget(optimizer: Optimizer, parameter: Tensor) -> None:
    """Bring the optimizer to the state it had before it first saw `parameter`."""
    if zero.is_copied(parameter):
        zero.forget(parameter, optimizer)
    elif isinstance(optimizer, torch.optim.Adagrad):
        # The one optimizer that fills its state when it is built, not when it first steps.
        state = optimizer.state[parameter]
        state["step"].zero_()
        state["sum"].fill_(optimizer.defaults["initial_accumulator_value"])
    else:
        optimizer.state.pop(parameter, None)
