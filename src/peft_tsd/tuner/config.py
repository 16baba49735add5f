"""`TsdConfig`: LoRA's configuration, plus which directions are used, how many, and when."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import LoraConfig, PeftConfig

from .inits import LEAVE_BASE, MOVE_BASE, WITHOUT_DATA, moves_base, rounds_base
from .settings import DirectionSettings, InitReading, check_setting

Method = Literal["lora-dash", "lora-init", "lora-tsd"]


class TsdType(str, enum.Enum):
    """The value under which PEFT's mappings know this method; written as `peft_type` into saved configs."""

    TSD = "TSD"


# Fields of LoraConfig that change what a layer computes in ways the directions do not (yet) follow, and why.
REFUSED_FIELDS = {
    "use_dora": "directions beside DoRA are DashConfig(peft=LoraConfig(use_dora=True, ...))",
    "velora_config": "VeLoRA replaces the backward pass of LoRA's A",
    "alora_invocation_tokens": "an activated LoRA has no single change of the weight to identify directions from",
    "monteclora_config": "MonteCLoRA samples its change anew at every step",
    "use_bdlora": "a block-diagonal factor cannot be restarted from, or stacked with, whole singular directions",
    "arrow_config": "Arrow routes between finished adapters and trains none",
    "kasa_config": "KaSA truncates the base weight, and here the base weight is never written to",
    "use_qalora": "QA-LoRA pools the input, so that its A does not fit the directions of the weight",
    "megatron_config": "Megatron's parallel layers hold only a part of each weight",
    "target_parameters": "only whole Linear, Conv1D and Conv2d layers carry directions, and such a parameter holds a "
    "matrix for each expert; name layers beside the experts, such as those of attention, in target_modules",
    "layer_replication": "replicated layers share one weight, and their directions could not be merged or exported",
}


@dataclass
class TsdConfig(DirectionSettings, LoraConfig):
    """Configuration of LoRA-Dash, LoRA-Init and LoRA-TSD (Si et al., arXiv 2409.01035).

    By default the directions of every adapted layer are identified before the first step, from the gradient of a few
    batches. In the paper's way (`prelaunch_steps`) training starts with a pre-launch of plain LoRA, after which they
    are identified, once, from what LoRA has learned. Then

    - `"lora-dash"` also learns the change along them: `W + s·B·A + Σ_j Δσ_j u_j v_jᵀ`;
    - `"lora-init"` restarts LoRA's A and B from them, beside what they have learned (`keep_prelaunch`);
    - `"lora-tsd"` does both.

    Everything else is `peft.LoraConfig`'s and means what it means there: `r`, `lora_alpha`, `target_modules`,
    `rank_pattern`, `use_rslora`, `lora_dropout`, `modules_to_save` and the rest. `"lora-dash"` takes the
    `init_lora_weights` of PiSSA, OLoRA, CorDA and LoRA-GA too: A and B start as there, and the layer subtracts that
    start, `W + s(B·A − B₀·A₀)`, where PEFT would take it out of the base weight.

    Args:
        method (`str`, defaults to `"lora-tsd"`):
            One of `"lora-dash"`, `"lora-init"`, `"lora-tsd"`.
        prelaunch_steps (`int` or `"auto"`, *optional*):
            Optimizer steps of plain LoRA before the directions are identified; t in the paper. `"auto"`: until the
            directions that would be identified have settled. 0: none. Given without `direction_source`, 0 too, it
            means directions of the weight; with 0 these are identified before the first step, from the gradient of
            the frozen weights (`identify_from_gradients`; `TsdCallback` does it by itself). By default 0 for
            directions of the gradient, and for those of the weight 100, as in the paper, but not more than a fifth of
            a run whose length is known, as a Trainer's is. The number is filled in when training begins.
        prelaunch_min (`int`, defaults to 25):
            The fewest steps of an automatic pre-launch.
        prelaunch_max (`int`, defaults to 200):
            The most steps of an automatic pre-launch, whether the directions have settled or not.
        settled_agreement (`float`, defaults to 0.9):
            An automatic pre-launch ends where at least this part of the directions, in the mean over layers, was
            among those of the check before it. Checks stand at `prelaunch_min` / 1.25, at `prelaunch_min`, and from
            there each a quarter further on than the one before.
        direction_source (`str`, *optional*):
            Whose singular directions are used. `"gradient"`: the leading singular directions of the gradient of the
            loss with respect to the frozen weight, along which, to first order, a scalar or a row of A does most;
            found from a few batches (`identify_from_gradients`; `TsdCallback` does it by itself) without a look at
            the weight. `"weight"`: the core directions of the frozen weight, as in the paper. By default `"gradient"`,
            and `"weight"` where `prelaunch_steps` is given (0 too), for a pre-launch is the paper's way; directions of
            the gradient after a pre-launch take both settings. Configurations saved before there was a choice are read
            as `"weight"`.
        first_step (`bool`, defaults to `True`):
            With directions of the gradient, begin with a step down it: a change of `−η Σ_j u_j v_jᵀ` in every layer,
            in B where A starts from the directions, and in Δσ elsewhere. The one length η is the best of those tried
            on batches that the gradient has not seen, and none is taken where none lowers their loss. `False`: the
            adapter starts at zero.
        num_directions (`int`, defaults to 8):
            Directions a layer whose change is learned directly; s in the paper. `"lora-init"` does not use it: it
            restarts from the r highest.
        direction_budget (`str`, defaults to `"layer"`):
            `"layer"`: every layer gets `num_directions`. `"global"`: the same total goes to the directions of the
            whole model whose change rates stand out most, each measured by what a random change of the same norm
            would show in its layer. `"lora-init"` does not use it.
        max_directions (`int`, *optional*):
            With `direction_budget="global"`, the most directions a layer can get; 4 × `num_directions` by default.
            Every layer holds that many scalars from the start, and those it does not get stay zero.
        keep_prelaunch (`bool`, defaults to `True`):
            Whether what pre-launch learned stays where `"lora-init"` and `"lora-tsd"` start A and B anew, as a fixed
            part of the layer, `W + s·B₁·A₁ + ...`: then the loss does not change at the transition, and the rank of an
            export is r higher. False: as in the paper, the layer starts again at W. Configurations saved before there
            was a choice are read so.
        init_reading (`str`, defaults to `"svd"`):
            How LoRA-Init starts from directions U, σ, V. `"svd"`: `B₀ = U Σ^½/√s`, `A₀ = Σ^½ Vᵀ/√s`, the layer
            computing `W + s(B·A − B₀·A₀)`. `"orthonormal"`: `A₀ = Vᵀ`, `B₀ = 0`. `"lora-dash"` does not use it, and
            nor do directions of the gradient, from which A and B start as `A₀ = c Vᵀ`, `B₀ = 0` with c = 1/√3, the
            norm of the rows of A in PEFT's usual start.
        dash_lr_ratio (`float`, defaults to 1.0):
            Δσ is this number times the trained scalar, so that any optimizer moves Δσ that much faster than other
            parameters. Adam moves a scalar by at most its learning rate a step while σ is of order 1 to 20: in a short
            run the paper's 1.0 hardly moves Δσ. `"lora-init"` does not use it.
        dash_unit (`str`, defaults to `"one"`):
            What Δσ is measured in, times `dash_lr_ratio`. `"one"`: as in the paper. `"sigma"`: each direction's own
            σ_j, so that what is trained is a change rate. `"layer"`: the root mean square of the layer's singular
            values. `"lora-init"` does not use it.
        selection (`str`, defaults to `"tsd"`):
            Which directions are taken. `"tsd"`: those with the highest change rates. The others are controls, to find
            out what the choice is worth: the `"top"` or `"bottom"` of the spectrum, `"random"` ones, or those that a
            `"random-change"`, a Gaussian ΔW in place of the learned one, would have changed most.
        eps (`float`, defaults to 1e-6):
            ε in the change rate `|u_iᵀ ΔW v_i| / (σ_i + ε)`, in the unit of σ.

    Raises:
        ValueError: A value is out of range, or a combination does not make sense; the message says which and why.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from peft_tsd import TsdConfig

        >>> config = TsdConfig(method="lora-tsd", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        >>> model = get_peft_model(base, config)
        ```
    """

    method: Method = field(default="lora-tsd", metadata={"help": "lora-dash, lora-init or lora-tsd."})
    keep_prelaunch: bool | None = field(
        default=None, metadata={"help": "Whether what pre-launch learned stays where A and B start anew."}
    )
    init_reading: InitReading = field(
        default="svd", metadata={"help": "How LoRA-Init starts from the directions: svd or orthonormal."}
    )

    def __post_init__(self, how_to_load: str | None) -> None:
        if self.keep_prelaunch is None:
            # What is read from a file has its type; one of before there was a choice dropped what was learned.
            self.keep_prelaunch = getattr(self, "peft_type", None) is None
        self.settle_source()
        super().__post_init__()
        self.peft_type = TsdType.TSD
        # Not a field: whether this is the configuration of weights that exist.
        self.init_is_saved = False
        check_setting("method", self.method, get_args(Method))
        check_setting("init_reading", self.init_reading, get_args(InitReading))
        if not isinstance(self.keep_prelaunch, bool):
            raise ValueError(f"keep_prelaunch must be True or False; got {self.keep_prelaunch!r}.")
        self.check_directions()
        if self.direction_source == "gradient":
            self.settle_prelaunch()
        for name, reason in REFUSED_FIELDS.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} cannot be combined with {self.method}: {reason}.")
        if refused := self._refused_init():
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} cannot be combined with {self.method}: {refused}."
            )
        steps = self.starts_from_directions and self.begins_with_step
        if self.subtracts_init or self.subtracts_start or steps:
            start = "first_step" if steps else "init_lora_weights" if self.subtracts_init else "init_reading"
            for alpha in (self.lora_alpha, *(self.alpha_pattern or {}).values()):
                if not alpha > 0:
                    raise ValueError(
                        f"lora_alpha={alpha!r} cannot be combined with {self.method} and {start}="
                        f"{getattr(self, start)!r}, which divides by LoRA's scaling: give a positive alpha or another "
                        f"{start}."
                    )

    @property
    def learns_along_directions(self) -> bool:
        """Whether Δσ is trained: LoRA-Dash and LoRA-TSD."""
        return self.method != "lora-init"

    @property
    def starts_from_directions(self) -> bool:
        """Whether A and B restart from the directions: LoRA-Init and LoRA-TSD."""
        return self.method != "lora-dash"

    @property
    def keeps_prelaunch(self) -> bool:
        """Whether A and B leave what they learned behind them when they start anew, as a fixed part of the layer."""
        return bool(self.keep_prelaunch) and self.starts_from_directions and self.prelaunch_steps != 0

    @property
    def subtracts_start(self) -> bool:
        """Whether A and B restart from a product that the layer subtracts."""
        return self.starts_from_directions and self.direction_source == "weight" and self.init_reading == "svd"

    @property
    def joins_start(self) -> bool:
        """Whether that product lies along the directions that Δσ is learned along: LoRA-TSD, whose rank is then
        r + max(r, slots)."""
        return self.subtracts_start and self.learns_along_directions

    @property
    def subtracts_init(self) -> bool:
        """Whether the layer subtracts the product that A and B are initialized with, as PiSSA's."""
        return moves_base(self.init_lora_weights)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> TsdConfig:
        """As `DirectionSettings.from_pretrained`; CorDA's start, whose data are gone, is left to the weights' file."""
        config: TsdConfig = super().from_pretrained(*args, **kwargs)
        config.init_is_saved = True
        return config

    def _refused_init(self) -> str | None:
        init = self.init_lora_weights
        if init == "mica":
            return f"directions beside MiCA are DashConfig(peft=LoraConfig(init_lora_weights={init!r}, ...))"
        if rounds_base(init):
            return "LoftQ writes a rounded copy over the base weight, and here that is never written to"
        if init not in LEAVE_BASE and not self.subtracts_init:
            return f"use one of {(*LEAVE_BASE, *MOVE_BASE)}"
        if self.starts_from_directions and init not in WITHOUT_DATA:
            return "A and B start anew from the directions at the transition; use method='lora-dash'"
        return None


def without_weights(config: PeftConfig) -> PeftConfig:
    """`config`, changed where making the adapter would read the base weights, for a model that has none."""
    if isinstance(config, LoraConfig) and config.init_lora_weights == "pissa":
        config.init_lora_weights = True
    return config
