"""The effective change of one layer as a single low-rank product, and adding that product to the base layer's output.

With A (r, in), B (out, r) and scaling s of LoRA, directions U (out, n), V (in, n) and what each is multiplied by,
c (n,), and the starting factors A₀ (r, in), B₀ (out, r) of LoRA-Init's `"svd"` reading (Si et al., arXiv 2409.01035):

    ΔW = s·B·A + U·diag(c)·Vᵀ − s·B₀·A₀ + s·B₁·A₁ = B'·A'
    A' = [s·A; diag(c)·Vᵀ; −s·A₀; s·A₁],    B' = [B, U, B₀, B₁]

A₁ (r, in) and B₁ (out, r) are what pre-launch learned, where it is kept. c is Δσ; in LoRA-TSD, whose start lies along
its directions, Δσ less that start (`peft_tsd.tuner.held`).
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

GLOBAL_HOOKS = tuple(f"_global_{when}_hooks" for when in ("forward", "forward_pre", "backward", "backward_pre"))
"""What `register_module_forward_hook` and its like fill; torch 2.6 has no function that asks for all."""


class Factors(NamedTuple):
    """The parts of ΔW, as matrices. What a method does not have is None."""

    a: Tensor
    """A, shape (r, in)."""
    b: Tensor
    """B, shape (out, r)."""
    scaling: float
    """s."""
    c: Tensor | None = None
    """What each direction is multiplied by, shape (n,); it may be wider than the rest."""
    u: Tensor | None = None
    """U, shape (out, n)."""
    v: Tensor | None = None
    """Vᵀ, shape (n, in)."""
    a0: Tensor | None = None
    """A₀, shape (r, in)."""
    b0: Tensor | None = None
    """B₀, shape (out, r)."""
    kept_a: Tensor | None = None
    """A₁, shape (r, in)."""
    kept_b: Tensor | None = None
    """B₁, shape (out, r)."""

    def down(self) -> Tensor:
        """A', shape (rank, in)."""
        parts = [self.scaling * self.a]
        if self.v is not None and self.c is not None:
            parts.append((self.c[:, None] * self.v).to(self.a.dtype))
        if self.a0 is not None:
            parts.append(-self.scaling * self.a0)
        if self.kept_a is not None:
            parts.append(self.scaling * self.kept_a)
        return torch.cat(parts)

    def up(self) -> Tensor:
        """B', shape (out, rank)."""
        # Column by column in memory: with so few columns, products are up to twice as fast that way.
        return torch.cat([part.mT for part in (self.b, self.u, self.b0, self.kept_b) if part is not None]).mT


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; never for "meta", which knows none."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def add_product(result: Tensor, x: Tensor, factors: Factors) -> Tensor:
    """`result + x A'ᵀ B'ᵀ` for x of shape (..., in) and `result` of shape (..., out).

    In training, the backward pass keeps what a plain LoRA keeps, x and A·x, and stacks the factors again; a compiler
    finds that out by itself.
    """
    if not torch.is_grad_enabled() or is_looked_into():
        return _add_product(result, x, factors)[0]
    out: Tensor = _AddProduct.apply(result, x, None, None, *factors)  # type: ignore[no-untyped-call]
    return out


def is_bare(base: nn.Module) -> bool:
    """Whether calling `base` is `F.linear` with a frozen weight and nothing more: no hook sees its input or output."""
    return (
        type(base) is nn.Linear
        and "forward" not in vars(base)  # where Accelerate's hooks put theirs
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and not any(getattr(torch_module, hooks) for hooks in GLOBAL_HOOKS)
        and type(base.weight.data) is Tensor
        and not base.weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
    )


def adapted_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Factors) -> Tensor:
    """`x (W + ΔW)ᵀ + bias` for x of shape (..., in), with all of one dtype, W and the bias frozen, and no autocast.

    The same as `add_product(F.linear(x, weight, bias), x, factors)`, but ΔW is added into the base's output, and its
    gradient into the base's gradient of x: no tensor of their size is made for the adapter.
    """
    if is_looked_into():
        return _add_product(F.linear(x, weight, bias), x, factors)[0]
    if not torch.is_grad_enabled():
        return _add_product(F.linear(x, weight, bias), x, factors, in_place=True)[0]
    out: Tensor = _AddProduct.apply(None, x, weight, bias, *factors)  # type: ignore[no-untyped-call]
    return out


def is_looked_into() -> bool:
    """Whether this is run by what takes gradients in ways of its own, or writes down what is done, and so wants
    operations it knows: a compiler, a tracer (`torch.jit.trace`, ONNX), `torch.func`, forward-mode differentiation."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
    )


def _add_product(result: Tensor, x: Tensor, factors: Factors, in_place: bool = False) -> tuple[Tensor, Tensor]:
    hidden = F.linear(x, factors.down())
    if hidden.dtype != result.dtype:
        return result + F.linear(hidden, factors.up()), hidden
    # One product that starts from the base layer's output saves a pass over a tensor of its size.
    rows = _rows(result)
    return torch.addmm(rows, _rows(hidden), factors.up().mT, out=rows if in_place else None).view_as(result), hidden


class _AddProduct(torch.autograd.Function):
    """`add_product`, or `adapted_linear` with a weight in place of the result, with hand-written gradients. With G the
    gradient of the output, over all rows:

    ∂result = G,    ∂x = (G B') A' (+ G W),    ∂A = s·(G B)ᵀ x,    ∂B = Gᵀ (s·x Aᵀ),    ∂c_j = u_jᵀ Gᵀ x v_j

    They can be differentiated in turn (`create_graph=True`).
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor | None, x: Tensor, weight: Tensor | None, bias: Tensor | None, *parts: Any
    ) -> Tensor:
        factors = Factors(*parts)
        if weight is not None:
            out, hidden = _add_product(F.linear(x, weight, bias), x, factors, in_place=True)
        else:
            assert result is not None
            out, hidden = _add_product(result, x, factors)
        # A copy of s·A·x, so that the wider product it was cut from is freed.
        of_a = hidden[..., : len(factors.a)].contiguous()
        ctx.save_for_backward(x, weight, of_a, *(part if isinstance(part, Tensor) else None for part in factors))
        ctx.scaling = factors.scaling
        device = x.device.type
        ctx.autocast = torch.autocast(device, torch.get_autocast_dtype(device)) if autocasts(device) else nullcontext()
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, of_a, *parts = ctx.saved_tensors
        factors = Factors(*parts)._replace(scaling=ctx.scaling)
        _, needs_x, _, _, needs_a, needs_b, _, needs_c, *_ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = grad_c = None
        with ctx.autocast:
            if torch.is_grad_enabled():  # what was kept of s·A·x does not know where it comes from
                of_a = F.linear(x, factors.scaling * factors.a)
            g = _rows(gradient).to(of_a.dtype)
            along = g @ factors.up()
            if needs_a or needs_c:
                r = len(factors.a)
                n = 0 if factors.v is None else len(factors.v)
                # A slice of all would be an alias, for which the batching of `jacobian(vectorize=True)` has no rule.
                moved = (along if along.shape[1] == r + n else along[:, : r + n]).mT @ _rows(x)
                grad_a = factors.scaling * moved[:r]
                if factors.v is not None:
                    grad_c = (moved[r:] * factors.v).sum(1)
            if needs_b:
                # The transpose of (x Aᵀ)ᵀ G: with so few columns, Gᵀ (x Aᵀ) itself is up to three times slower.
                grad_b = (_rows(of_a).mT @ g).mT
            if needs_x:
                down = factors.down()
                grad_x = along @ down if weight is None else (g @ weight).addmm_(along, down)
                grad_x = grad_x.view_as(x)
        grad_result = gradient if weight is None else None
        return grad_result, grad_x, None, None, grad_a, grad_b, None, grad_c, *(None,) * 6


def _rows(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1, tensor.shape[-1])
