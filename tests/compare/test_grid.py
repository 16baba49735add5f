"""Held-out losses over learning rates."""

import pytest
from scipy import stats

from peft_tsd.compare.grid import by_task, grids, loss_table, rate_text, steps_table
from peft_tsd.compare.plan import LEARNING_RATE
from peft_tsd.compare.results import summarize
from peft_tsd.compare.tables import grid_tables, markdown
from support.comparisons import row


def run(name, seed, rate, loss, *, chosen_by=None, curve=(), task="one", method="lora"):
    metrics = {"evaluations": [{"step": step, "loss": own} for step, own in curve]}
    variation = ((LEARNING_RATE, rate),)
    made = row(method, seed, 0.5, task=task, variation=variation, variant=name, held_out=loss, **metrics)
    return {**made, "validation_loss": chosen_by}


LORA = {1e-3: (2.0, 2.2, 2.1), 1e-2: (1.0, 1.1, 1.3)}
OURS = {1e-3: (1.6, 1.8, 1.9), 1e-2: (1.1, 1.1, 1.2)}


def rows():
    return [
        run(name, seed, rate, loss)
        for name, losses in (("lora", LORA), ("ours", OURS))
        for rate, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def test_every_rate_the_mean_and_the_best_are_told_apart():
    lora, ours = grids(rows())
    assert lora.group.label == "lora r4"
    assert [at.rate for at in ours.rates] == [1e-3, 1e-2]
    assert [at.loss.mean for at in lora.rates] == pytest.approx([2.1, 3.4 / 3])
    assert ours.mean.mean == pytest.approx((1.35 + 1.45 + 1.55) / 3)
    # Paired by seed: the means over rates are 1.5, 1.65, 1.7 of LoRA.
    expected = [1.35 / 1.5 - 1, 1.45 / 1.65 - 1, 1.55 / 1.7 - 1]
    assert ours.mean_against_lora.relative.mean == pytest.approx(sum(expected) / 3)
    assert ours.mean_against_lora.paired.p == pytest.approx(
        stats.ttest_rel([1.35, 1.45, 1.55], [1.5, 1.65, 1.7]).pvalue
    )
    assert (lora.best_rate, ours.best_rate) == (1e-2, 1e-2)
    assert ours.best_against_lora.paired.difference.mean == pytest.approx((0.1 + 0.0 - 0.1) / 3)
    assert lora.mean_against_lora is None
    assert ours.rates[0].against_lora.paired.difference.mean == pytest.approx((-0.4 - 0.4 - 0.2) / 3)
    # The two rates are two tests.
    first, second = (at.against_lora.paired for at in ours.rates)
    assert [first.adjusted_p, second.adjusted_p] == pytest.approx(
        list(stats.false_discovery_control([first.p, second.p]))
    )


def test_the_best_rate_is_chosen_by_validation_rows():
    lower_there = [
        run("lora", s, rate, loss, chosen_by=-loss) for rate, own in LORA.items() for s, loss in enumerate(own)
    ]
    [lora] = grids(lower_there)
    assert lora.best_rate == 1e-3
    assert lora.best.mean == pytest.approx(2.1)


def test_a_seed_that_ran_at_some_rates_alone_does_not_choose_among_them():
    """More seeds at the best rate, harder ones, do not make it worse than another where the easy one stands alone."""
    harder = [run("lora", seed, 1e-3, 1.4) for seed in (1, 2)]
    [lora] = grids([run("lora", 0, 1e-3, 1.0), run("lora", 0, 1e-2, 1.1), *harder])
    assert lora.best_rate == 1e-3
    assert lora.best.mean == pytest.approx(3.8 / 3)
    # Of rates without a seed in common each has its own.
    [lora] = grids([run("lora", 0, 1e-3, 1.0), run("lora", 1, 1e-2, 0.9)])
    assert lora.best_rate == 1e-2


def test_each_is_compared_at_its_own_best_rate():
    slower = [run("ours", s, rate, LORA[other][s]) for rate, other in ((1e-3, 1e-2), (1e-2, 1e-3)) for s in range(3)]
    lora, ours = grids([r for r in rows() if r["variant"] == "lora"] + slower)
    assert (lora.best_rate, ours.best_rate) == (1e-2, 1e-3)
    assert ours.best_against_lora.paired.difference.mean == 0
    assert ours.mean_against_lora.paired.difference.mean == pytest.approx(0)


def test_a_rate_at_which_a_run_failed_is_no_best_and_leaves_no_mean():
    cell_rows = rows()
    broken = next(r for r in cell_rows if r["variant"] == "ours" and r["variation"][LEARNING_RATE] == 1e-2)
    broken.update(status="failed", error="diverged")
    _, ours = grids(cell_rows)
    assert ours.best_rate == 1e-3
    assert ours.rates[1].failed == 1
    # Seeds that have finished at every rate are left.
    assert ours.mean.mean == pytest.approx((1.45 + 1.55) / 2)
    assert "(1 failed)" in markdown(*grid_tables([ours])[0])


def test_steps_are_those_to_loras_loss_over_loras_own():
    lora = run("lora", 0, 1e-3, 1.0, curve=[(10, 3.0), (20, 1.0)])
    faster = run("ours", 0, 1e-3, 0.5, curve=[(10, 1.0), (20, 0.5)])
    slower = run("worse", 0, 1e-3, 2.0, curve=[(10, 3.0), (20, 2.0)])
    own, ours, worse = grids([lora, faster, slower])
    assert own.rates[0].steps is None
    assert ours.rates[0].steps.mean == 0.5
    assert (worse.rates[0].steps, worse.rates[0].never) == (None, 1)
    _, lines = steps_table([own, ours, worse])
    assert lines == [["ours r4", "0.50"], ["worse r4", "(1 never)"]]


def test_tasks_stand_apart_and_rows_without_rates_have_no_grid():
    two = [run("lora", 0, 1e-3, 1.0, task="one"), run("lora", 0, 1e-3, 2.0, task="other")]
    assert {task: [grid.mean.mean for grid in found] for task, found in by_task(grids(two)).items()} == {
        "one": [1.0],
        "other": [2.0],
    }
    assert grids([row("lora", 0, 0.5, held_out=1.0)]) == []
    heads, _ = loss_table(grids(two)[:1], lambda loss: f"{loss.mean}", lambda own: "")
    assert heads[1] == "1e-3"


@pytest.mark.parametrize(("rate", "text"), [(1e-3, "1e-3"), (3e-4, "3e-4"), (0.00015, "1.5e-4"), (1.0, "1e0")])
def test_rates_are_written_as_one_types_them(rate, text):
    assert rate_text(rate) == text


def test_at_each_rate_the_summary_compares_with_lora_at_that_rate():
    found = {summary.group.label: summary for summary in summarize(rows())}
    at = found["ours r4, learning_rate=0.001"].held_out.against_lora
    assert at.difference.mean == pytest.approx((-0.4 - 0.4 - 0.2) / 3)


def test_a_column_of_one_letter_has_a_rule():
    assert markdown(["x", "p"], [["a", ""]]).splitlines()[1] == "| -- | -: |"
