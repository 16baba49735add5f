"""Which directions, how many, and when: what every configuration with directions has."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import InitVar, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from ..directions.definitions import Selection
from ..files.adapters import CONFIG, WEIGHTS
from ..files.cards import CARD, HOW_TO_LOAD, native_text, write_card
from ..files.whole import write_text

InitReading = Literal["svd", "orthonormal"]

DashUnit = Literal["one", "sigma", "layer"]

DirectionBudget = Literal["layer", "global"]

DirectionSource = Literal["weight", "gradient"]

USUAL_PRELAUNCH = 100
"""Steps of a pre-launch of which nothing was said, the paper's; but not more than a `PRELAUNCH_PART` of the run."""

PRELAUNCH_PART = 5

CHECK_GROWTH = 1.25
"""How much longer an automatic pre-launch has become from one check to the next. Not a number of steps: sets that
drift ever more slowly, as LoRA's do, pass for settled sooner or later wherever they are compared at a fixed distance.
"""


@dataclass
class DirectionSettings:
    """Which directions, how many, and when: the fields of every configuration with directions, mixed into PEFT's.

    `TsdConfig` says what each means.
    """

    prelaunch_steps: int | Literal["auto"] | None = field(
        default=None,
        metadata={"help": "Optimizer steps before the directions are identified; auto; 0: from gradients."},
    )
    prelaunch_min: int = field(default=25, metadata={"help": "The fewest steps of an automatic pre-launch."})
    prelaunch_max: int = field(default=200, metadata={"help": "The most steps of an automatic pre-launch."})
    settled_agreement: float = field(
        default=0.9,
        metadata={"help": "An automatic pre-launch ends where this part of the directions was in the last check's."},
    )
    direction_source: DirectionSource | None = field(
        default=None,
        metadata={"help": "Whose singular directions: those of the gradient, or the frozen weight's (the paper's)."},
    )
    first_step: bool = field(
        default=True,
        metadata={"help": "Begin along directions of the gradient with a step down it, its length found by trying."},
    )
    num_directions: int = field(default=8, metadata={"help": "Directions a layer whose change is learned directly."})
    direction_budget: DirectionBudget = field(
        default="layer", metadata={"help": "Whether num_directions go to every layer, or as many in all to the model."}
    )
    max_directions: int | None = field(
        default=None, metadata={"help": "The most directions a layer can get of a global budget."}
    )
    dash_lr_ratio: float = field(
        default=1.0,
        metadata={"help": "The change along a direction is this number times its trained scalar."},
    )
    dash_unit: DashUnit = field(
        default="one", metadata={"help": "What a change along a direction is measured in: one, sigma or layer."}
    )
    selection: Selection = field(
        default="tsd", metadata={"help": "Which directions: tsd, or as a control top, bottom, random, random-change."}
    )
    eps: float = field(default=1e-6, metadata={"help": "Keeps a change rate finite where σ is zero."})

    # Not a field of the configuration: what its file says to one who has not this package, and reads it.
    how_to_load: InitVar[str | None] = None

    # Not fields. How an adapter's files are checked: `registration` sets it, for the check knows layers, and so stands
    # above this module.
    check_folder: ClassVar[Callable[[Path], None]]

    # The warning about a missing transition is given once a process, and held while a schedule runs.
    prelaunch_notice_given = False

    # The same for that about the state of a denoiser which a pipeline could not read.
    native_notice_given = False

    # Nor this: when steps were last counted (see `schedule.missed`).
    counted_at = 0

    @property
    def method(self) -> str:
        """Its name in messages."""
        raise NotImplementedError

    def check_directions(self) -> None:
        """Refuse values out of range, and combinations that make no sense.

        Raises:
            ValueError: The message says which, and why.
        """
        check_setting("dash_unit", self.dash_unit, get_args(DashUnit))
        check_setting("selection", self.selection, get_args(Selection))
        check_setting("direction_budget", self.direction_budget, get_args(DirectionBudget))
        check_setting("direction_source", self.direction_source, get_args(DirectionSource))
        if not isinstance(self.first_step, bool):
            raise ValueError(f"first_step must be True or False; got {self.first_step!r}.")
        _check_prelaunch_steps(self.prelaunch_steps)
        check_positive_int("prelaunch_min", self.prelaunch_min, "the fewest steps of an automatic pre-launch")
        check_positive_int("prelaunch_max", self.prelaunch_max, "the most steps of an automatic pre-launch")
        if self.prelaunch_max < self.prelaunch_min:
            raise ValueError(
                f"prelaunch_max={self.prelaunch_max} is less than prelaunch_min={self.prelaunch_min}; give the fewest "
                "and the most steps of an automatic pre-launch."
            )
        self.settled_agreement = _positive_float("settled_agreement", self.settled_agreement)
        if self.settled_agreement > 1:
            raise ValueError(f"settled_agreement is a part, at most 1; got {self.settled_agreement!r}.")
        check_positive_int("num_directions", self.num_directions, "the number of directions a layer")
        if self.max_directions is not None:
            check_positive_int("max_directions", self.max_directions, "the most directions a layer can get")
            if self.direction_budget == "layer" or self.max_directions < self.num_directions:
                raise ValueError(
                    f"max_directions={self.max_directions} is for direction_budget='global', and not less than "
                    f"num_directions; got direction_budget={self.direction_budget!r}, "
                    f"num_directions={self.num_directions}."
                )
        self.dash_lr_ratio = _positive_float("dash_lr_ratio", self.dash_lr_ratio)
        self.eps = _positive_float("eps", self.eps)
        if self.direction_budget == "global" and self.selection != "tsd":
            raise ValueError(
                f"direction_budget='global' goes by change rates, and selection={self.selection!r} does not; use "
                "direction_budget='layer'."
            )

        if self.direction_source == "gradient":
            self._check_fits_gradient()

    def settle_source(self) -> None:
        """Say whose directions, where nothing was said: the gradient's, or the weight's where there is a pre-launch.

        To be called while `peft_type` is still that of the file that the configuration was read from.
        """
        if self.direction_source is None:
            saved = getattr(self, "peft_type", None) is not None  # before there was a choice
            self.direction_source = "weight" if saved or self.prelaunch_steps is not None else "gradient"

    def settle_prelaunch(self, run_steps: int | None = None) -> None:
        """Say how long the pre-launch is, where nothing was said: once, when training begins.

        Args:
            run_steps: Optimizer steps of the whole run, where they are known.
        """
        if self.prelaunch_steps is not None:
            return
        if self.direction_source == "gradient":
            self.prelaunch_steps = 0
        elif run_steps is None:
            self.prelaunch_steps = USUAL_PRELAUNCH
        else:
            self.prelaunch_steps = max(1, min(USUAL_PRELAUNCH, run_steps // PRELAUNCH_PART))

    def _check_fits_gradient(self) -> None:
        """Refuse what goes by the spectrum of the frozen weight, which is not looked at."""
        for name, possible, why in (
            ("selection", ("tsd", "random"), "'top', 'bottom' and 'random-change' are of the weight's spectrum"),
            ("direction_budget", ("layer",), "a global budget goes by change rates"),
            ("dash_unit", ("one",), "the other units are singular values of the weight"),
        ):
            if getattr(self, name) not in possible:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} cannot be combined with direction_source='gradient': {why}; "
                    f"use {name}={possible[0]!r}, or direction_source='weight'."
                )
        if self.prelaunch_steps == "auto":
            raise ValueError(
                "prelaunch_steps='auto' waits for change rates to settle, and direction_source='gradient' has none; "
                "give a number of steps, or 0, or direction_source='weight'."
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any) -> Any:
        """As PEFT's, which calls it before it loads an adapter: one in a local folder is checked first.

        Raises:
            AdapterError: As `check_adapter`, where the folder holds an adapter.
        """
        cls.check_folder(Path(pretrained_model_name_or_path) / (subfolder or ""))
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)  # type: ignore[misc]

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """As PEFT's; the file also says what it is and how it is loaded, and so does the model card beside it."""
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        content["how_to_load"] = HOW_TO_LOAD
        write_text(folder / CONFIG, json.dumps(content, indent=2, sort_keys=True))
        # transformers saves an injected adapter's weights after its configuration.
        if (folder / WEIGHTS).is_file() or not (folder / CARD).is_file():
            base = content.get("base_model_name_or_path")
            write_card(folder, native_text(self.method, base), base, ("peft-tsd", "task-specific-directions"))

    @contextmanager
    def native_state_wanted(self) -> Iterator[None]:
        """Within, the state of an adapter is asked for by one who knows what it is, and nothing is warned of."""
        before, self.native_notice_given = self.native_notice_given, True
        try:
            yield
        finally:
            self.native_notice_given = before

    @property
    def direction_slots(self) -> int:
        """Scalars a layer holds for its directions: all of `num_directions`, or as many as it may get of a budget."""
        if self.direction_budget == "layer":
            return self.num_directions
        return self.max_directions or 4 * self.num_directions

    @property
    def begins_with_step(self) -> bool:
        """Whether the directions are the gradient's, and the adapter begins with a step along them."""
        return self.direction_source == "gradient" and self.first_step

    @property
    def needs_gradients(self) -> bool:
        """Whether the directions are identified from the gradients of batches, rather than from what was learned."""
        return self.prelaunch_steps == 0 or self.direction_source == "gradient"

    @property
    def longest_prelaunch(self) -> int:
        """The most optimizer steps that can pass before the directions are identified."""
        if self.prelaunch_steps is None:
            return USUAL_PRELAUNCH
        return self.prelaunch_max if self.prelaunch_steps == "auto" else self.prelaunch_steps

    @property
    def check_steps(self) -> tuple[int, ...]:
        """The steps after which an automatic pre-launch checks its directions; none at `prelaunch_max`, its end."""
        if self.prelaunch_steps != "auto":
            return ()
        steps = [max(1, int(self.prelaunch_min / CHECK_GROWTH)), self.prelaunch_min]
        while steps[-1] < self.prelaunch_max:
            steps.append(math.ceil(steps[-1] * CHECK_GROWTH))
        return tuple(sorted({step for step in steps if step < self.prelaunch_max}))


def check_setting(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}.{hint}")


def _check_prelaunch_steps(value: Any) -> None:
    if value in (None, "auto") or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return
    raise ValueError(
        "prelaunch_steps must be the number of optimizer steps of plain LoRA, 0 for none, 'auto', or None for what "
        f"suits the directions; got {value!r}."
    )


def check_positive_int(name: str, value: Any, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, {meaning}; got {value!r}.")


def _positive_float(name: str, value: Any) -> float:
    # A whole number that no float holds fails where it meets a tensor.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{name} must be a positive, finite number; got {value!r}.")
    return float(value)
