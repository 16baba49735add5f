"""What an optimizer remembers of parameters that start anew, and has to forget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..distributed import zero
from ..errors import TransitionError
from ..tuner.directed import DirectedLayer


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
    base = getattr(optimizer, "base", None)
    if zero.is_copied(parameter):
        zero.forget(parameter, optimizer)
    elif isinstance(base, Optimizer) and base.state is optimizer.state:
        # Schedule-Free keeps its iterate z in the state of the optimizer it wraps, and makes it anew. That one takes a
        # state with anything in it as begun: what it has there must stay, at its beginning.
        base.state[parameter].pop("z", None)
        _begin_anew(base, base.state[parameter])
    elif isinstance(optimizer, torch.optim.Adagrad):
        # The one optimizer that fills its state when it is built, not when it first steps.
        _begin_anew(optimizer, optimizer.state[parameter])
    else:
        for key in (parameter, *_names(optimizer, parameter)):
            optimizer.state.pop(key, None)


def _names(optimizer: Optimizer, parameter: Tensor) -> Iterator[Any]:
    """What PEFT's LoRA-FA keeps the state of `parameter` under: a name, or of A and B what their names begin with."""
    for group in optimizer.param_groups:
        for other, name in zip(group["params"], group.get("names", ())):
            if other is parameter:
                yield name
                yield f"{name.partition('lora')[0]}lora"


def _begin_anew(optimizer: Optimizer, state: dict[str, Any]) -> None:
    for key, value in state.items():
        if isinstance(value, Tensor):
            value.fill_(optimizer.defaults.get("initial_accumulator_value", 0) if key == "sum" else 0)
        elif key == "step":
            state[key] = 0


def check_groups(
    layers: Mapping[str, DirectedLayer], adapter: str, optimizer: Optimizer | Sequence[Optimizer]
) -> None:
    """Refuse an optimizer that trains Δσ at B's learning rate where A has another, as LoRA+ does.

    Raises:
        ValueError: It does.
    """
    group_of: dict[int, dict[str, Any]] = {}
    for one in optimizer if isinstance(optimizer, Sequence) else [optimizer]:
        group_of |= {id(p): group for group in getattr(one, "param_groups", ()) for p in group["params"]}
    for layer in layers.values():
        a, b, theta = (group_of.get(id(p)) for p in layer.rates_of(adapter))
        if a is None or b is None or theta is not b:
            continue
        rates = [group.get("initial_lr", group.get("lr")) for group in (a, b)]  # a wrapper may have none
        if rates[0] != rates[1]:
            raise ValueError(
                f"The optimizer trains Δσ in the group of B, whose learning rate is {rates[1]:g}, where A's is "
                f"{rates[0]:g} (as create_loraplus_optimizer makes groups): put the parameters with '.lora_dash.' in "
                "their names into a group of their own, as docs/method.md says under Optimizers."
            )
