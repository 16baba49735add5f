"""What runs came to by the loss of rows held out of training: it tells more with few rows than a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def steps_to_reach(row: Row, loss: float) -> float | None:
    """The optimizer steps after which a run's held-out loss was down to `loss`; None where it never was.

    Between two evaluations it is taken to fall evenly. What was reached before the first evaluation counts as reached
    there.
    """
    before: tuple[float, float] | None = None
    for one in row["evaluations"]:
        step, own = float(one["step"]), float(one["loss"])
        if own <= loss:
            if before is None:
                return step
            last_step, last_loss = before
            return last_step + (step - last_step) * (last_loss - loss) / (last_loss - own)
        before = step, own
    return None


def steps_to_others(rows: Sequence[Row], others: Sequence[Row]) -> tuple[list[float], int]:
    """The steps after which runs had the final held-out loss of others of the same task and seed.

    Returns:
        Those steps, and how many runs never had it; both empty where runs were not evaluated on the way.
    """
    goals = {(row["task"], row["seed"]): row.get("held_out_loss") for row in others if row["status"] == "finished"}
    reached: list[float] = []
    never = 0
    for row in rows:
        goal = goals.get((row["task"], row["seed"]))
        if row["status"] != "finished" or goal is None or not row.get("evaluations"):
            continue
        steps = steps_to_reach(row, goal)
        if steps is None:
            never += 1
        else:
            reached.append(steps)
    return reached, never
