"""What `DirectionRecorder` leaves: the change rates of every adapted weight, at steps of a training run.

    trajectory.json            the weights with their shapes and norms, and ε
    step-000100.safetensors    by weight, its change rates after optimizer step 100: float32, shape (k,)

A step's file is there as a whole or not at all.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from ..files.whole import write_text
from .results import IntArray

INDEX = "trajectory.json"

NORM_TOLERANCE = 1e-2
"""Relative difference of ‖W‖ up to which a frozen weight counts as the same: rounding to 4 bits stays below it."""


@dataclass(frozen=True)
class Trajectory:
    """Change rates recorded during training. Rates are read where they are asked for.

    Attributes:
        folder: Where they are.
        steps: Optimizer steps at which rates were recorded, ascending, shape (t,).
        shapes: Shape (out, in) of every weight, in the model's order.
        norms: ‖W‖ (Frobenius) of every frozen weight: with the shapes, what tells one base model from another.
        eps: ε of the change rate, in the unit of σ.
    """

    folder: Path
    steps: IntArray
    shapes: dict[str, tuple[int, int]]
    norms: dict[str, float]
    eps: float

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> Trajectory:
        """What was recorded in `folder`, also while the run goes on.

        Raises:
            ValueError: `folder` holds no trajectory, or no step of one yet.
        """
        folder = Path(folder)
        shapes, norms, eps = read_index(folder)
        steps = sorted(step_files(folder))
        if not steps:
            raise ValueError(f"{folder} holds no recorded step yet; train for longer, or record more often.")
        return cls(folder, np.asarray(steps, dtype=np.int64), shapes, norms, eps)

    @property
    def weights(self) -> tuple[str, ...]:
        """The weights whose rates were recorded, in the model's order."""
        return tuple(self.shapes)

    def rates(self, name: str) -> NDArray[np.float32]:
        """Change rates of one weight at every step, shape (t, k).

        Raises:
            KeyError: No such weight was recorded.
            ValueError: A file is damaged.
        """
        rows = np.empty((len(self.steps), min(self.shapes[name])), dtype=np.float32)
        for row, step in zip(rows, self.steps.tolist()):
            path = self.folder / step_name(step)
            try:
                with safe_open(path, framework="numpy") as file:
                    row[:] = file.get_tensor(name)
            except (SafetensorError, OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}); remove it, or record again.") from None
        return rows


def same_norm(one: float, other: float) -> bool:
    """Whether two frozen weights may be the same, by their norms."""
    return abs(one - other) <= NORM_TOLERANCE * max(one, other)


def step_name(step: int) -> str:
    """The name of a step's file."""
    return f"step-{step:06d}.safetensors"


def step_files(folder: Path) -> dict[int, Path]:
    """The files in `folder` by their step."""
    found = {}
    for path in folder.iterdir():
        if match := re.fullmatch(r"step-(\d{6,})\.safetensors", path.name):
            found[int(match[1])] = path
    return found


def read_index(folder: Path) -> tuple[dict[str, tuple[int, int]], dict[str, float], float]:
    """Shapes and norms of the weights by name, and ε.

    Raises:
        ValueError: `folder` holds no trajectory.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        weights = index["weights"]
        shapes = {name: (int(w["shape"][0]), int(w["shape"][1])) for name, w in weights.items()}
        return shapes, {name: float(w["norm"]) for name, w in weights.items()}, float(index["eps"])
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {INDEX}; give a folder that DirectionRecorder wrote.") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is not what DirectionRecorder writes: {error!r}.") from None


def write_index(folder: Path, shapes: dict[str, tuple[int, int]], norms: dict[str, float], eps: float) -> None:
    """Write the index into `folder`."""
    weights = {name: {"shape": list(shape), "norm": norms[name]} for name, shape in shapes.items()}
    write_text(folder / INDEX, json.dumps({"eps": eps, "weights": weights}, indent=1))
