"""What README and docs/results.md say in words of the committed rows is what these say."""

import json
import sys

import pytest

from peft_tsd.compare.grid import grids, rate_text
from support.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
results = pytest.importorskip("results", reason="the figures need the extra explore")
results_targets = pytest.importorskip("results_targets", reason="as results")


TASKS = ("family", "spell", "words")
README, PAGE = (" ".join(path.read_text("utf-8").split()) for path in (ROOT / "README.md", results.PAGE))


def rows_of(file, section):
    """The committed rows that a section of the page shows."""
    content = json.loads((results.ROWS / f"{file}.json").read_text("utf-8"))
    [found] = [one for one in content["sections"] if one["name"] == section]
    return results.shown(content, found)["rows"]


def test_the_readme_says_what_the_committed_rows_say():
    rows = rows_of("smollm2", "smollm2")
    ours = [grid for grid in grids(rows) if grid.group.variant == "gradient-tsd"]

    def least_and_most(numbers, digits):
        return f"{min(numbers):.{digits}f} to {max(numbers):.{digits}f}"

    means = least_and_most([-100 * grid.mean_against_lora.relative.mean for grid in ours], 0)
    assert f"is {means} % below LoRA's, on each task with p < 0.05" in README
    assert all(grid.mean_against_lora.paired.adjusted_p < 0.05 for grid in ours)
    low = [grid for grid in grids(rows_of("smollm2", "smollm2-low")) if grid.group.variant == "gradient-tsd"]
    assert all(grid.rates[0].rate == 1e-4 and grid.mean_against_lora.paired.adjusted_p < 0.05 for grid in low)
    means = least_and_most([-100 * grid.mean_against_lora.relative.mean for grid in low], 0)
    assert f"from 1e-4 on, where LoRA has hardly begun after 60 steps, {means} %" in README
    words = {2: "two", 3: "three", 4: "four", 5: "five"}
    seeds = [min(len({r["seed"] for r in rows if r["task"] == grid.task and r["variant"] == "gradient-tsd"
                      and r["learning_rate"] == at.rate}) for at in grid.rates) for grid in ours]  # fmt: skip
    assert max(seeds) == min(seeds) + 1
    assert f"({words[min(seeds)]} or {words[max(seeds)]} seeds) its mean held-out loss" in README
    steps = [least_and_most([grid.rates[at].steps.mean for grid in ours], 2) for at in (0, 1)]
    assert [grid.rates[at].rate for grid in ours for at in (0, 1)] == [3e-4, 1e-3] * len(ours)
    assert f"after {steps[0]} of the steps at 3e-4, and after {steps[1]} at 1e-3" in README
    test, ahead = min((grid.best_against_lora for grid in ours), key=lambda against: against.relative.mean)
    assert f"ahead by {-100 * ahead.mean:.0f} % on one task" in README
    least, most = (-100 * (ahead.mean + sign * ahead.half) for sign in (1, -1))
    both = grids([one for one in rows if one["variant"] in ("lora", "gradient-tsd")])
    for_three = min(grid.best_against_lora.paired.adjusted_p for grid in both if grid.best_against_lora)
    for_all = f"{test.adjusted_p:.2f} for the tests of all baselines beside them"
    tested = f"p {test.p:.2f}; {for_three:.2f} adjusted for three tasks, {for_all}"
    assert f"(95 %: {least:.0f} to {most:.0f}; {tested}) and level on the other two" in README
    others = [grid.best_against_lora.relative for grid in ours if grid.best_against_lora.relative is not ahead]
    assert all(abs(relative.mean) < relative.half for relative in others)
    assert abs(ahead.mean) > ahead.half


def test_what_the_readme_says_of_a_larger_alpha_and_of_a_fresh_head_is_what_the_rows_say():
    assert "LoRA with four times the α (two tasks, one seed each) gains less over the rates" in README
    assert "and at its best rate less on one task and more on another" in README
    rows = rows_of("smollm2", "smollm2")
    seeds = {task: {r["seed"] for r in rows if (r["task"], r["variant"]) == (task, "lora-alpha32")} for task in TASKS}
    assert [len(own) for own in seeds.values()] == [0, 1, 1]
    found = {
        (grid.task, grid.group.variant): grid for grid in grids([r for r in rows if r["seed"] in seeds[r["task"]]])
    }
    theirs = {task: grid for (task, variant), grid in found.items() if variant == "lora-alpha32"}
    own = {task: found[task, "gradient-tsd"] for task in theirs}
    for task, grid in theirs.items():
        assert own[task].mean_against_lora.relative.mean < grid.mean_against_lora.relative.mean < 0
    less = [own[t].best_against_lora.relative.mean < g.best_against_lora.relative.mean for t, g in theirs.items()]
    assert sorted(less) == [False, True]
    rows = rows_of("sst2", "sst2")
    assert {row["seed"] for row in rows} == {0, 1, 2}
    [over_rates] = [g.mean_against_lora.relative for g in grids(rows) if g.group.variant == "gradient-tsd"]
    least, most = (100 * (over_rates.mean + sign * over_rates.half) for sign in (-1, 1))
    sst2 = f"{100 * over_rates.mean:.0f} % above LoRA's (95 %: {-least:.0f} below to {most:.0f} above)"
    rows = rows_of("cola", "cola")
    assert {row["seed"] for row in rows} == {0, 1, 2}
    tuned = {g.group.variant: g.best_against_lora.relative for g in grids(rows) if g.best_against_lora}
    assert all(abs(relative.mean) < min(0.01, relative.half) for relative in tuned.values())
    at_best = tuned["gradient-tsd"]
    least, most = (100 * (at_best.mean + sign * at_best.half) for sign in (-1, 1))
    cola = f"{100 * at_best.mean:.0f} % above ({-least:.0f} below to {most:.0f} above)"
    assert (
        "On an encoder with a fresh head (three seeds) it gains nothing: on SST-2 its loss over the rates is "
        f"{sst2}, on CoLA, at each one's best rate, {cola}." in README
    )


def test_what_the_readme_says_of_lora_ga_is_what_its_rows_say():
    rows = rows_of("smollm2", "smollm2")
    tuned = results_targets.against_lora_ga(rows, "gradient-tsd")
    assert len(tuned) == len(TASKS)
    assert all(one.paired.adjusted_p < 0.05 for one in tuned)
    less = sorted(-100 * one.relative.mean for one in tuned)
    best = {grid.task: grid.best_rate for grid in grids(rows) if grid.group.variant == "lora-ga"}
    for task, rate in best.items():
        theirs = [one for one in rows if (one["task"], one["variant"]) == (task, "lora-ga")]
        assert {one["seed"] for one in theirs if one["learning_rate"] == rate} == {0, 1, 2, 3, 4}
    below = f"At each one's best rate (five seeds) it is {less[0]:.0f} to {less[-1]:.0f} % below PEFT's LoRA-GA"
    others = "and over the rates (one seed) below it on two of the three; it takes less memory"
    assert f"{below}, on each task with p < 0.05, {others}" in README
    means = {(one.task, one.group.variant): one.mean.mean for one in grids([r for r in rows if r["seed"] == 0])}
    assert sum(means[task, "gradient-tsd"] < means[task, "lora-ga"] for task in TASKS) == 2
    asked = results_targets.targets(rows, "gradient-tsd").splitlines()
    [memory] = [line for line in asked if line.startswith("| less memory than LoRA-GA")]
    assert memory.split("|")[-2].strip() == "yes"


def test_what_the_readme_says_of_eva_and_pissa_is_what_their_rows_say():
    rows = rows_of("smollm2", "smollm2-starts")
    assert {(one["task"], one["seed"]) for one in rows} == {("spell", 0)}
    found = {grid.group.variant: grid.mean_against_lora for grid in grids(rows) if grid.mean_against_lora}
    gain = {name: f"{-100 * against.relative.mean:.0f} %" for name, against in found.items()}
    assert gain["eva"] == gain["pissa"]
    assert (
        f"Where it gains {gain['gradient-tsd']} over the rates (one task, one seed), PEFT's EVA and PiSSA gain "
        f"{gain['eva']} each." in README
    )


def test_what_the_page_says_of_other_starts_and_of_arithmetic_is_what_its_rows_say():
    found = {(one.task, one.group.variant): one for one in grids(rows_of("smollm2", "smollm2"))}
    assert (
        "Its best rate is a third of LoRA's on each, and at 1e-2 it is behind LoRA by 40 % and more (one seed)" in PAGE
    )
    for task in TASKS:
        theirs, lora = found[task, "lora-ga"], found[task, "lora"]
        assert 0.3 <= theirs.best_rate / lora.best_rate <= 0.34
        assert theirs.rates[-1].against_lora.relative.mean > 0.4
    assert "less than this one at every rate; EVA's start costs five times as much" in PAGE
    starts = {one.group.variant: one for one in grids(rows_of("smollm2", "smollm2-starts"))}
    for name in ("eva", "pissa"):
        ours, theirs = starts["gradient-tsd"].rates, starts[name].rates
        assert all(own.loss.mean < other.loss.mean for own, other in zip(ours, theirs, strict=True))
    [math] = [one for one in grids(rows_of("smollm2", "smollm2-math")) if one.group.variant == "gradient-tsd"]
    less = [f"{-100 * at.against_lora.relative.mean:.0f} % at {rate_text(at.rate)}" for at in math.rates]
    assert (
        f"on worked arithmetic, whose form the model knows beforehand, {less[0]} and {less[1]}, with one seed" in PAGE
    )


def test_what_the_page_says_of_rank_8_is_what_its_rows_say():
    found = {one.task: one for one in grids(rows_of("smollm2", "smollm2-r8")) if one.group.variant == "gradient-tsd"}
    over_rates, best = (
        -100 * one.relative.mean for one in (found["spell"].mean_against_lora, found["spell"].best_against_lora)
    )
    low, high = found["words"].rates
    assert (low.rate, high.rate) == (1e-3, 3e-3)
    assert high.against_lora.relative.mean > 0
    assert (
        f"it gains {over_rates:.0f} % over the rates on `spell` and {best:.0f} % at the best one, and on `words` "
        f"{-100 * low.against_lora.relative.mean:.0f} % at 1e-3 and nothing at 3e-3" in PAGE
    )


def test_what_the_page_says_of_the_papers_three_is_what_their_rows_say():
    rows = rows_of("smollm2", "smollm2")
    tuned = {(g.task, g.group.variant): g.best_against_lora for g in grids(rows) if g.best_against_lora}
    assert all(one.paired.adjusted_p > 0.05 for (_, name), one in tuned.items() if name.startswith("paper-"))
    share = {key: one.relative.mean for key, one in tuned.items()}
    assert sorted(abs(share[task, "paper-dash"]) < 0.01 for task in TASKS) == [False, True, True]
    assert 0.3 < share["words", "paper-tsd"] < 0.4 < share["words", "paper-init"] < 0.55
    [one_seed] = [
        grid.best_against_lora.relative.mean
        for grid in grids([row for row in rows if row["seed"] == 0])
        if (grid.task, grid.group.variant) == ("family", "paper-init")
    ]
    assert (
        f"One seed of LoRA-Init is {-100 * one_seed:.0f} % ahead on `family`; with five the mean is "
        f"{100 * share['family', 'paper-init']:.0f} % above LoRA's." in PAGE
    )


def test_what_the_page_says_does_it_is_what_the_rows_say():
    found = {(one.task, one.group.variant): one for one in grids(rows_of("smollm2", "smollm2-ablations"))}
    over_rates = {key: one.mean_against_lora.relative.mean for key, one in found.items() if one.mean_against_lora}
    assert "without the first step, make up nearly all of the gain on `spell`" in PAGE
    gains = {variant: over_rates["spell", variant] for variant in ("gradient-tsd", "gradient-tsd-still")}
    assert gains["gradient-tsd-still"] < 0.9 * gains["gradient-tsd"] < 0
    assert "on `family` the first step adds to it at every rate. Random directions in their place gain nothing" in PAGE
    stepped, still = (found["family", variant].rates for variant in gains)
    assert all(one.loss.mean < other.loss.mean for one, other in zip(stepped, still, strict=True))
    assert all(over_rates[task, "random-tsd"] > -0.005 for task in ("family", "spell"))
    assert "(LoRA-Init) does as well by itself as with scalars along them (LoRA-TSD)" in PAGE
    assert "scalars by themselves (LoRA-Dash) do less than half as much. Earlier is better" in PAGE
    assert "Eight batches find no better directions than two, and Δσ at ten times the rate is worse" in PAGE
    choices = {one.group.variant: one for one in grids(rows_of("smollm2", "smollm2-choices")) if one.mean_against_lora}
    gain = {variant: -one.mean_against_lora.relative.mean for variant, one in choices.items()}
    whole = gain["gradient-tsd"]
    assert abs(gain["gradient-init"] - whole) < 0.01
    assert gain["gradient-dash"] < whole / 2
    assert whole > gain["gradient-tsd-at-10"] > gain["gradient-tsd-at-20"] > 0 > gain["gradient-tsd-dropped"]
    assert abs(gain["gradient-tsd-batches-8"] - whole) < 0.01
    assert choices["gradient-tsd-ratio-10"].rates[-1].loss.mean > choices["gradient-tsd"].rates[-1].loss.mean
