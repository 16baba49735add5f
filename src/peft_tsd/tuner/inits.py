"""PEFT's `init_lora_weights`: which of them move a part of the base weight into the adapter, and what each needs.

Where PEFT takes the start of A and B out of the base weight, the layers here subtract it, and the base weight stays.
"""

from __future__ import annotations

WITHOUT_DATA = (True, False, "gaussian", "orthogonal")
"""Those that leave the base weight alone and need nothing but a shape."""

LEAVE_BASE = (*WITHOUT_DATA, "eva")
"""Those that leave the base weight alone, of which `TsdConfig` takes all."""

MOVE_BASE = ("pissa", "pissa_niter_", "olora", "corda", "lora_ga")
"""Those whose start PEFT takes out of the base weight, or the beginnings of their names."""


def moves_base(init: object) -> bool:
    """Whether PEFT takes the start of A and B out of the base weight."""
    return _starts(init, MOVE_BASE)


def rounds_base(init: object) -> bool:
    """Whether PEFT writes another form of the base weight over it."""
    return _starts(init, ("loftq",))


def reads_base(init: object) -> bool:
    """Whether A and B start from the base weight, or PEFT asks for its dtype."""
    return _starts(init, ("pissa", "olora", "orthogonal"))


def needs_data(init: object) -> bool:
    """Whether A and B start from what batches have shown of a full base weight."""
    return _starts(init, ("corda", "lora_ga"))


def _starts(init: object, names: tuple[str, ...]) -> bool:
    return isinstance(init, str) and init.lower().startswith(names)
