"""Held-out losses of a comparison: differences, and steps to LoRA's."""

import pytest

from peft_tsd.compare.held_out import steps_to_reach
from peft_tsd.compare.results import summarize
from peft_tsd.compare.tables import held_out, markdown
from support.comparisons import row


def curve(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "goal", "steps"),
    [
        ((3.0, 2.0, 1.0), 2.0, 20),
        ((3.0, 2.0, 1.0), 1.5, 25),
        ((3.0, 2.0, 1.0), 3.5, 10),  # before the first evaluation
        ((3.0, 2.0, 1.0), 0.5, None),
        ((3.0, 3.5, 1.0), 1.0, 30),
        ((2.0, 2.0), 2.0, 10),
    ],
)
def test_steps_to_reach_a_loss(losses, goal, steps):
    assert steps_to_reach({"evaluations": curve(*losses)}, goal) == (steps if steps is None else pytest.approx(steps))


def test_losses_are_compared_with_loras():
    rows = [row("lora", s, 0.5, held_out=2.0 + s / 10, evaluations=curve(3.0, 2.0 + s / 10)) for s in range(3)]
    ours = (1.9, 1.95, 2.05)
    rows += [row("lora-tsd", s, 0.5, held_out=x, evaluations=curve(2.5, x)) for s, x in enumerate(ours)]
    lora, tsd = summarize(rows)
    assert lora.held_out.loss.mean == pytest.approx(2.1)
    assert lora.held_out.against_lora is None
    assert tsd.held_out.against_lora.difference.mean == pytest.approx((-0.1 - 0.15 - 0.15) / 3)
    assert tsd.held_out.never == 0
    expected = [10 + 10 * (2.5 - goal) / (2.5 - x) for goal, x in zip((2.0, 2.1, 2.2), ours)]
    assert tsd.held_out.steps.mean == pytest.approx(sum(expected) / 3)
    assert "-0.133" in markdown(*held_out([lora, tsd]))


def test_a_run_that_never_gets_there_is_counted():
    rows = [row("lora", 0, 0.5, held_out=1.0, evaluations=curve(2.0, 1.0))]
    rows += [row("dora", 0, 0.5, held_out=1.5, evaluations=curve(2.0, 1.5))]
    _, dora = summarize(rows)
    assert dora.held_out.steps is None
    assert dora.held_out.never == 1
    assert "(1 never)" in markdown(*held_out([dora]))


def test_rows_of_an_older_version_have_no_such_table():
    assert held_out(summarize([row("lora", 0, 0.5), row("dora", 0, 0.6)])) is None
