"""What a layer holds of its directions: the trained scalars, and what identification fixed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..distributed.sharded import whole


class DashScalars(nn.Module):
    """The trained scalars θ of one layer, shape (slots,); the change along direction j is `ratio · θ_j`.

    There are `TsdConfig.direction_slots` of them. One without a direction stays zero: its u and v are.
    """

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(slots))


class FixedDirections(nn.Module):
    """What identification leaves in one layer. Frozen parameters, because DDP sends buffers around at every step.

    Convolution kernels are flattened: `in` is in·kh·kw.

    Attributes:
        step: Optimizer steps taken by this adapter, int64, shape (1,).
        identified_at: How many they were when the directions were identified; -1 before; int64, shape (1,).
        indices: Positions in the spectrum, highest rate first; int64, shape (m,), with m the larger of r and the slots
            of the dash as the method uses them. -1 before identification, and where the weight has fewer. Of a global
            budget the layer may have got only the first few.
        rates, sigma: Change rates and singular values of those, shape (m,).
        unit: What Δσ is measured in, shape (slots,); None where it is 1.
        u, v: Directions of the dash, shapes (out, slots) and (slots, in), zero where there is none; None for
            LoRA-Init.
        a0, b0: Starting factors, shapes (r, in) and (out, r); None but for the `"svd"` reading of LoRA-Init and for
            LoRA-Dash from PiSSA and its like.
        candidates: The directions that the last check of an automatic pre-launch found, highest rate first; int64,
            -1 before; None in a pre-launch of fixed length.
        agreement: What each of its checks found, over all layers, in the order of `TsdConfig.check_steps`; -1 before.
        copies: Of these, in the process that saves, where ZeRO-3 has split them (`peft_tsd.zero_checkpoints`).
    """

    copies: dict[str, Tensor] | None = None

    def __init__(
        self,
        in_size: int,
        out_size: int,
        num_chosen: int,
        num_dash: int,
        num_start: int,
        *,
        has_unit: bool,
        num_checks: int,
    ) -> None:
        super().__init__()

        def fixed(*shape: int, dtype: torch.dtype | None = None, fill: float = 0) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, fill, dtype=dtype or torch.get_default_dtype()), requires_grad=False)

        self.step = fixed(1, dtype=torch.int64)
        self.identified_at = fixed(1, dtype=torch.int64, fill=-1)
        self.indices = fixed(num_chosen, dtype=torch.int64, fill=-1)
        self.rates = fixed(num_chosen)
        self.sigma = fixed(num_chosen)
        self.unit = fixed(num_dash) if num_dash and has_unit else None
        self.u = fixed(out_size, num_dash) if num_dash else None
        self.v = fixed(num_dash, in_size) if num_dash else None
        self.a0 = fixed(num_start, in_size) if num_start else None
        self.b0 = fixed(out_size, num_start) if num_start else None
        self.candidates = fixed(num_chosen, dtype=torch.int64, fill=-1) if num_checks else None
        self.agreement = fixed(num_checks, fill=-1) if num_checks else None

    @property
    def identified(self) -> bool:
        """Whether the directions have been chosen: pre-launch is over. Where it is sharded, every process must ask."""
        return bool(whole(self.indices)[0] >= 0)


def used_columns(u: Tensor) -> Tensor:
    """Which columns of U (out, slots) hold a direction: bool, shape (slots,). Singular vectors are not zero."""
    return u.ne(0).any(0)
