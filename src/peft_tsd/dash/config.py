"""`DashConfig`: the configuration of any PEFT method, plus which directions are learned beside it, and when."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig, PeftType

from ..tuner.settings import DirectionSettings
from .methods import REFUSED, has_layers, refusal

_PEFT_TYPES = [peft_type for peft_type in PeftType if has_layers(peft_type) and peft_type not in REFUSED]

DashType = enum.Enum("DashType", {peft_type.name: f"DASH_{peft_type.value}" for peft_type in _PEFT_TYPES}, type=str)  # type: ignore[misc]
"""The values under which PEFT's mappings know a method with directions beside it; `peft_type` in saved configs."""


@dataclass
class DashConfig(DirectionSettings, PeftConfig):
    """Task-specific directions (Si et al., arXiv 2409.01035) beside another PEFT method.

    By default the directions of every adapted layer are identified before the first step, from the gradient of a few
    batches. In the paper's way (`prelaunch_steps`) training starts with a pre-launch of that method alone, after which
    they are identified, once, from the change of the weight it has learned: the merged weight less the base weight.
    From then on the change along them is learned too, beside the method's own: `layer(x) + U diag(Δσ) Vᵀ x`.

    Fields that are not listed are those of `peft`, to be read and set as if they were here.

    Args:
        peft (`PeftConfig`):
            Configuration of the method: `LoHaConfig(...)`, `OFTConfig(...)`, `LoraConfig(use_dora=True, ...)`. It
            names the target_modules. docs/methods.md lists what works.
        prelaunch_steps (`int` or `"auto"`, *optional*):
            Optimizer steps of the method alone before the directions are identified; t in the paper. See `TsdConfig`.
        prelaunch_min (`int`, defaults to 25):
            The fewest steps of an automatic pre-launch.
        prelaunch_max (`int`, defaults to 200):
            The most steps of an automatic pre-launch.
        settled_agreement (`float`, defaults to 0.9):
            When the directions of an automatic pre-launch have settled; see `TsdConfig`.
        direction_source (`str`, *optional*):
            Whose singular directions: `"gradient"`, or `"weight"`, the default where `prelaunch_steps` is given; see
            `TsdConfig`.
        first_step (`bool`, defaults to `True`):
            With directions of the gradient, begin with a step down it, in Δσ; see `TsdConfig`.
        num_directions (`int`, defaults to 8):
            Directions a layer whose change is learned; s in the paper.
        direction_budget (`str`, defaults to `"layer"`):
            Whether as many go to every layer; see `TsdConfig`.
        max_directions (`int`, *optional*):
            The most directions a layer can get of a global budget; see `TsdConfig`.
        dash_lr_ratio (`float`, defaults to 1.0):
            Δσ is this number times the trained scalar; see `TsdConfig`.
        dash_unit (`str`, defaults to `"one"`):
            What Δσ is measured in: `"one"`, `"sigma"` or `"layer"`; see `TsdConfig`.
        selection (`str`, defaults to `"tsd"`):
            Which directions are taken, `"tsd"` or one of the controls of `TsdConfig`.
        eps (`float`, defaults to 1e-6):
            ε in the change rate `|u_iᵀ ΔW v_i| / (σ_i + ε)`, in the unit of σ.

    Raises:
        ValueError: A value is out of range, or the method has no change of a weight; the message says why.

    Example:

        ```py
        >>> from peft import LoHaConfig, get_peft_model
        >>> from peft_tsd import DashConfig

        >>> config = DashConfig(peft=LoHaConfig(r=8, alpha=16, target_modules=["q_proj", "v_proj"]))
        >>> model = get_peft_model(base, config)
        ```
    """

    peft: PeftConfig = field(
        default=None, metadata={"help": "Configuration of the method beside which directions are learned."}
    )

    def __post_init__(self, how_to_load: str | None) -> None:
        if isinstance(self.peft, dict):  # from a file
            self.peft = PeftConfig.from_peft_type(**self.peft)
        if not isinstance(self.peft, PeftConfig):
            raise ValueError(
                f"peft must be the configuration of a PEFT method, such as LoHaConfig(...); got {self.peft!r}."
            )
        if reason := refusal(self.peft):
            raise ValueError(f"{type(self.peft).__name__} cannot be given directions: {reason}.")
        for name in _SHARED:
            # Given here or there; where both are, here.
            default = PeftConfig.__dataclass_fields__[name].default
            if getattr(self, name) == default:
                setattr(self, name, getattr(self.peft, name))
        self.settle_source()
        super().__post_init__()
        self.peft_type = DashType[self.peft.peft_type.name]
        self.check_directions()
        if self.direction_source == "gradient":
            self.settle_prelaunch()

    @property
    def method(self) -> str:
        """The method and its directions, in messages."""
        return f"{self.peft.peft_type.value} with directions"

    def to_dict(self) -> dict[str, Any]:
        """All fields, with those of the method under `peft`."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return {**own, "peft": _sets_as_lists(self.peft.to_dict())}

    def __getattr__(self, name: str) -> Any:
        # PEFT's tuners, and PEFT itself, read and set the fields of the method on the one config they are given.
        inner = vars(self).get("peft")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = vars(self).get("peft")
        own = name in self.__dataclass_fields__ or name in _OF_ADAPTER
        if own:
            super().__setattr__(name, value)
        if isinstance(inner, PeftConfig) and (not own or name in _SHARED):
            setattr(inner, name, value)


# Not fields, and of the adapter as a whole: see `DirectionSettings`.
_OF_ADAPTER = ("prelaunch_notice_given", "native_notice_given", "counted_at")

# What every PeftConfig has, but for what tells the two apart.
_SHARED = tuple(name for name in PeftConfig.__dataclass_fields__ if name not in ("peft_type", "peft_version"))


def _sets_as_lists(value: Any) -> Any:
    # PEFT does so for the fields of a config, and not further down.
    if isinstance(value, dict):
        return {key: _sets_as_lists(inner) for key, inner in value.items()}
    return sorted(value) if isinstance(value, set) else value
