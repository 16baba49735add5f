"""A second type of device on a machine that has none: `lazy`, with its values in CPU tensors.

An operation that mixes a tensor there with one on the CPU is refused as CUDA refuses it, but for what CUDA takes: a
CPU tensor of no dimension among others, indices on the CPU, and copies between devices. `lazy` is the one type of
device that PyTorch knows everywhere, runs backward passes of without streams, and has no operations for of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import swap_tensors
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy")

_COPIES = {"aten::_to_copy", "aten::copy_"}
_INDEXED = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}


class There(Tensor):
    """A tensor on `lazy`."""

    held: Tensor
    """Its values, on the CPU."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        made = Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_devices(func, args, kwargs)
        return _run(func, args, kwargs, there=torch.device(kwargs.get("device") or DEVICE) == DEVICE)

    @property
    def data(self) -> There:
        return There(self.held.detach())

    @data.setter
    def data(self, value: There) -> None:
        self.held = value.held.detach()

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert lazy device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def untyped_storage(self) -> Any:
        """Its address and size tell apart what shares memory, as those of an accelerator's storage do."""
        return self.held.untyped_storage()

    def __repr__(self, **kwargs: Any) -> str:
        return f"There({self.held!r})"


def _check_devices(func: Any, args: Any, kwargs: Any) -> None:
    name = func._schema.name
    if name in _COPIES:
        return
    given = (args[0], *args[2:]) if name in _INDEXED else args
    leaves = {key: tree_leaves(value) for key, value in (*enumerate(given), *kwargs.items())}
    for key, values in leaves.items():
        for value in values:
            if not isinstance(value, Tensor) or isinstance(value, There):
                continue
            # In a list, as `cat` takes, or to be written to, a number on the CPU will not do either.
            alone = len(values) == 1 and (key != 0 or not func._schema.is_mutable)
            if value.ndim or not alone:
                raise RuntimeError(f"Expected all tensors to be on the same device, but got cpu and lazy in {name}")
    generator = kwargs.get("generator")
    if generator is not None:
        raise RuntimeError(f"Expected a 'lazy' device type for generator but found '{generator.device.type}'")


def _run(func: Any, args: Any, kwargs: Any, *, there: bool) -> Any:
    def held(value: Any) -> Any:
        return value.held if isinstance(value, There) else value

    given = tree_map(held, kwargs)
    if given.get("device") is not None:
        given["device"] = torch.device("cpu")
    found = func(*tree_map(held, args), **given)
    if func._schema.name == "aten::copy_":
        return args[0]
    if not there:
        return found
    found = tree_map(lambda value: There(value) if isinstance(value, Tensor) else value, found)
    return return_and_correct_aliasing(func, args, kwargs, found)


class _Factories(TorchDispatchMode):
    """What is made there, or moved there from the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if asked is None or torch.device(asked) != DEVICE:
            return func(*args, **kwargs)
        _check_devices(func, args, kwargs)
        return _run(func, args, kwargs, there=True)


class _Python(TorchFunctionMode):
    """What PyTorch does in C++: making tensors from lists and numbers, and giving a parameter its `data`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            asked = kwargs.get("device")
            if isinstance(args[0], There):
                return args[0] if asked is None else args[0].to(asked)
            if asked is not None and torch.device(asked) == DEVICE:
                return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        if func == Tensor.data.__set__ and isinstance(args[1], There) and not isinstance(args[0], There):
            return swap_tensors(args[0], nn.Parameter(args[1].data, args[0].requires_grad))
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[torch.device]:
    """`lazy` works as a device meanwhile."""
    with _Factories(), _Python():
        yield DEVICE


def here(value: Any) -> Any:
    """`value` with all its tensors on the CPU."""
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, value)
