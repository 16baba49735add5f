"""Means, confidence and tests of a comparison, against formulas written out."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peft_tsd.compare.plan import Cell
from peft_tsd.compare.results import CURVE_POINTS, failed_row, interval, summarize
from peft_tsd.compare.tables import differences as by_task
from peft_tsd.compare.tables import finding, markdown, table
from support.comparisons import row

# Student's t with two and four degrees of freedom at 97.5 %.
T2, T4 = 4.302652729911275, 2.7764451051977987


def test_the_interval_is_students():
    mean, half = interval([1.0, 2.0, 4.0, 8.0, 5.0])
    assert mean == 4.0
    deviation = math.sqrt(((1 - 4) ** 2 + (2 - 4) ** 2 + 0 + (8 - 4) ** 2 + 1) / 4)
    assert half == pytest.approx(T4 * deviation / math.sqrt(5))
    assert interval([3.0]) == (3.0, None)


def test_differences_are_paired_by_seed():
    lora, dash = [0.5, 0.7, 0.9], [0.52, 0.75, 0.91]
    rows = [row("lora", s, x) for s, x in enumerate(lora)] + [row("lora-dash", s, x) for s, x in enumerate(dash)]
    first, second = summarize(rows)
    assert first.against_lora is None
    differences = np.array(dash) - np.array(lora)
    error = differences.std(ddof=1) / math.sqrt(3)
    against = second.against_lora
    assert against.difference.mean == pytest.approx(differences.mean())
    assert against.difference.half == pytest.approx(T2 * error)
    # With two degrees of freedom the t distribution has a closed form.
    t = differences.mean() / error
    assert against.p == pytest.approx(1 - t / math.sqrt(t * t + 2))
    assert against.adjusted_p == against.p  # the only test


def test_several_tests_are_adjusted_together():
    rows = [row("lora", s, 0.5 + 0.01 * s) for s in range(4)]
    rows += [row("dora", s, 0.6 + 0.011 * s) for s in range(4)]
    rows += [row("pissa", s, 0.5 + (-1) ** s * 0.01) for s in range(4)]
    found = {s.group.method: s.against_lora for s in summarize(rows) if s.against_lora}
    low, high = sorted((found["dora"].p, found["pissa"].p))
    assert found["dora"].p == low
    # Benjamini and Hochberg: the i-th lowest of n, times n/i.
    assert found["dora"].adjusted_p == pytest.approx(min(2 * low, high))
    assert found["pissa"].adjusted_p == pytest.approx(high)


def test_ranks_and_variations_are_compared_with_their_own_lora():
    rows = [row("lora", s, 0.5 + s / 10, rank=r) for s in (0, 1) for r in (2, 8)]
    rows += [row("lora-tsd", s, 0.6 + s / 10 + s / 50, rank=8, variation=(("k", v),)) for s in (0, 1) for v in (1, 2)]
    rows += [row("full", s, 0.7, rank=None) for s in (0, 1)]
    found = summarize(rows)
    assert [s.group.label for s in found] == ["lora r2", "lora r8", "lora-tsd r8, k=1", "lora-tsd r8, k=2", "full"]
    assert [s.against_lora is not None for s in found] == [False, False, True, True, False]
    assert found[2].against_lora.difference.mean == pytest.approx(0.11)


def test_the_average_is_over_tasks_and_only_whole_seeds_count():
    rows = [row("lora", 0, 0.2, task="a"), row("lora", 0, 0.6, task="b"), row("lora", 1, 0.9, task="a")]
    (summary,) = summarize(rows)
    assert summary.average == (pytest.approx(0.4), None)
    assert summary.runs == 3


def test_differences_by_task_are_paired_too():
    rows = [row("lora", s, 0.1 * s, task=t) for s in range(3) for t in ("a", "b")]
    gains = {"a": (0.01, 0.02, 0.06), "b": (-0.2, -0.2, -0.2)}
    rows += [row("dora", s, 0.1 * s + gain, task=t) for t, own in gains.items() for s, gain in enumerate(own)]
    del rows[-1]  # one run of dora on b is not there
    summaries = summarize(rows)
    assert summaries[0].differences == {}
    found = summaries[1].differences
    assert found["a"].mean == pytest.approx(0.03)
    assert found["a"].half == pytest.approx(T2 * math.sqrt((0.02**2 + 0.01**2 + 0.03**2) / 2 / 3))
    assert found["b"] == (pytest.approx(-0.2), pytest.approx(0))
    heads, lines = by_task(summaries)
    assert heads == ["− LoRA, by task", "a", "b"]
    assert lines == [["dora r4", "+3.0 ± 6.6", "-20.0 ± 0.0"]]


def test_one_task_has_no_table_by_task():
    assert by_task(summarize([row(method, s, 0.1) for method in ("lora", "dora") for s in range(2)])) is None


def test_failed_runs_are_counted_and_nothing_else():
    cell = Cell(None, "lora", 4, (), 1)
    (summary,) = summarize([row("lora", 0, 0.2), failed_row(cell, "diverged", {})])
    assert (summary.runs, summary.failed) == (1, 1)
    assert summary.average == (0.2, None)
    assert summarize([failed_row(cell, "diverged", {})]) == []


@given(st.lists(st.floats(0, 10), min_size=1, max_size=1000))
def test_a_curve_keeps_its_mean_and_its_end(losses):
    given_losses = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    curve = row("lora", 0, 0.1, loss=given_losses)["loss"]
    assert len(curve) <= CURVE_POINTS
    assert curve[-1][0] == len(losses)
    sizes = np.diff([0, *(step for step, _ in curve)])
    assert np.average([loss for _, loss in curve], weights=sizes) == pytest.approx(np.mean(losses))


def test_the_table_and_the_finding():
    rows = [row("base", s, 0.1, rank=None, trainable_parameters=0) for s in range(3)]
    rows += [row("lora", s, 0.5 + 0.1 * s) for s in range(3)] + [
        row("dora", s, 0.6 + 0.1 * s + 0.001 * s) for s in range(3)
    ]
    rows += [row("pissa", s, 0.4 + 0.1 * s - 0.001 * s) for s in range(3)]
    rows += [row("lora-dash", s, 0.5 + 0.1 * s + (0.1, -0.1, 0.01)[s]) for s in range(3)]
    summaries = summarize(rows)
    lines = table(summaries).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0] == ["method", "test", "− LoRA", "p", "lr", "trained", "s/step", "MiB"]
    assert cells[2] == ["base", "10.0 ± 0.0", "", "", "", "0", "", "1"]
    assert cells[3] == ["lora r4", "60.0 ± 24.8", "", "", "0.001", "5", "0.50", "1"]
    assert cells[4][:3] == ["dora r4", "70.1 ± 25.1", "+10.1 ± 0.2"]
    text = finding(summaries)
    assert text.startswith(
        "Better than LoRA of the same rank: dora r4 (+10.1); worse than LoRA of the same rank: pissa r4"
    )
    assert text.endswith("the other 1 not distinguishable from LoRA with these seeds.")


def test_one_seed_tests_nothing_and_its_held_out_loss_is_said():
    rows = [
        row("lora", 0, 0.5, held_out=0.5),
        row("lora-tsd", 0, 0.6, held_out=0.45),
        row("dora", 0, 0.4, held_out=0.6),
    ]
    nothing = "There is nothing to test: that takes LoRA, another method of its rank, and two seeds that differ."
    seen = "Held-out loss: lora-tsd r4 0.450, 10.0 % below LoRA's; dora r4 0.600, 20.0 % above LoRA's."
    assert finding(summarize(rows)) == f"{nothing} {seen}"
    assert finding(summarize(rows[:1])) == nothing


def test_markdown_cells_line_up():
    text = markdown(["a", "b"], [["long name", "1"], ["x", "20.5"]])
    assert text.splitlines() == [
        "| a         |    b |",
        "| --------- | ---: |",
        "| long name |    1 |",
        "| x         | 20.5 |",
    ]


def test_variants_are_compared_with_the_one_called_lora():
    rows = [row("lora", s, 0.5 + s / 10, variant="lora") for s in (0, 1)]
    rows += [row("lora", s, 0.6 + s / 10, variant="alpha") for s in (0, 1)]
    rows += [row("lora", s, 0.4 + s / 10, rank=16, variant="wide") for s in (0, 1)]
    lora, alpha, wide = summarize(rows)
    assert (lora.group.label, alpha.group.label) == ("lora r4", "alpha r4")
    assert lora.against_lora is None
    assert alpha.against_lora.difference.mean == pytest.approx(0.1)
    assert wide.against_lora.difference.mean == pytest.approx(-0.1)


def test_rows_of_an_older_version_have_no_variant():
    old = row("lora", 0, 0.5)
    del old["variant"]
    assert summarize([old])[0].group.label == "lora r4"
