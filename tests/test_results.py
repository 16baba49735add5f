"""docs/results.md is what its command writes from the committed rows."""

import json
import re
import sys

import pytest

from peft_tsd.compare.plan import LEARNING_RATE
from support.comparisons import row
from support.places import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
results = pytest.importorskip("results", reason="the figures need the extra explore")
results_targets = pytest.importorskip("results_targets", reason="as results")


def test_the_committed_page_and_figures_are_those_of_the_committed_rows(tmp_path):
    page, figures = tmp_path / "results.md", tmp_path / "figures"
    page.write_text(results.PAGE.read_text("utf-8"), "utf-8")
    results.write(page=page, figures=figures)
    assert page.read_text("utf-8") == results.PAGE.read_text("utf-8"), "run: python benchmarks/results.py"
    made, committed = (
        {path.name: path.read_bytes() for path in folder.glob("*")} for folder in (figures, results.FIGURES)
    )
    assert made == committed, "run: python benchmarks/results.py"


RECIPE = {
    "model": {"name": "/somewhere/model", "dtype": "float32"},
    "optimizer": {"learning_rate": 1e-3, "name": "adamw_torch"},
    "training": {"steps": 3},
    "evaluation": {"every": 1, "batch_size": 4},
    "adapter": {"r": 4, "lora_alpha": 8},
    "directions": {"num_directions": 8},
}


def made(name, seed, rate, loss, *, method="lora", alpha=8):
    setup = {"versions": {"peft": "1"}, "machine": {"device": "a processor", "cpus": 2}}
    curve = [{"step": 1, "loss": loss + 1}, {"step": 3, "loss": loss}]
    one = row(method, seed, 0.5, task="spell", variation=((LEARNING_RATE, rate),), variant=name, held_out=loss,
              evaluations=curve, **setup)  # fmt: skip
    recipe = {**RECIPE, "method": method, "adapter": {"r": 4, "lora_alpha": alpha}}
    return {**one, "recipe": recipe, "validation_loss": loss}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROWS", tmp_path / "rows")
    return tmp_path


def collect(place, *runs, command="peft-tsd compare x", name="proof"):
    (place / "results.json").write_text(json.dumps({"command": command, "runs": runs}))
    return json.loads(results.collect(place, name).read_text("utf-8"))


def test_rows_are_collected_merged_and_shown(place):
    lora = [made("lora", seed, rate, 2.0 + seed / 10) for seed in (0, 1) for rate in (1e-3, 1e-2)]
    first = collect(
        place, *lora, command="peft-tsd compare x model.name=/somewhere/model training.steps=3 --seeds 0,1"
    )
    assert len(first["rows"]) == 4
    assert first["common"]["model"]["name"] == "model"
    ours = [made("alpha", seed, rate, 1.0 + seed / 10, alpha=32) for seed in (0, 1) for rate in (1e-3, 1e-2)]
    again = {**lora[0], "held_out_loss": 2.5}
    content = collect(place, again, *ours, command="peft-tsd compare y")
    assert content["recipe"] == "x training.steps=3"
    assert [r["held_out_loss"] for r in content["rows"] if r["variant"] == "lora"] == [2.5, 2.1, 2.0, 2.1]
    assert len(content["rows"]) == 8
    assert len(content["setups"]) == 1
    page, figures = place / "page.md", place / "figures"
    page.write_text(f"by hand\n{results.BEGIN}\nold\n{results.END}\nmore\n")
    for _ in range(2):
        results.write(place / "rows", page, figures)
    text = page.read_text("utf-8")
    assert text.startswith("by hand\n")
    assert text.endswith(results.END + "\nmore\n")
    assert "old" not in text
    assert re.search(r"\| alpha +\| +lora \| +lora_alpha=32 \|", text)
    # At 1e-3 LoRA's first seed has 2.5.
    assert "2.300 ± 2.541" in text
    assert "8 runs of 3 steps, seeds 0, 1" in text
    assert (
        "peft-tsd compare x training.steps=3 --tasks spell --variants lora,alpha --rates 1e-3,1e-2 --seeds 0,1\n"
        in text
    )
    for name in ("proof-rates.svg", "proof-curves.svg"):
        assert f"(figures/{name})" in text
        assert "alpha r4" in (figures / name).read_text("utf-8")


def test_a_section_shows_what_it_names_alone(place):
    runs = [
        made(name, seed, rate, 2.0 + seed, alpha=a)
        for name, a in (("lora", 8), ("alpha", 32))
        for seed in (0, 1)
        for rate in (1e-4, 1e-3)
    ]
    content = collect(place, *runs)
    whole = content["sections"][0]
    assert whole == {"name": "proof", "title": "proof", "about": ""}
    part = {**whole, "name": "part", "title": "A part", "about": "Why.", "variants": ["alpha", "lora"], "seeds": [1]}
    part = {**part, "tasks": ["spell"], "ranks": [4], "rates": [1e-3]}
    one = {**whole, "name": "one", "title": "One", "variants": ["lora"], "targets": "lora"}
    (place / "rows" / "proof.json").write_text(json.dumps({**content, "sections": [part, one]}))
    page = place / "page.md"
    page.write_text(f"{results.BEGIN}{results.END}")
    results.write(place / "rows", page, place / "figures")
    first, second = page.read_text("utf-8").split("\n## One")
    assert "## A part\n\nWhy." in first
    assert "--variants alpha,lora --rates 1e-3 --seeds 1\n" in first
    assert "2 runs of 3 steps, seeds 1," in first
    assert "What was asked of" not in first
    assert "### What was asked of `lora`" in second
    assert "--variants lora --rates 1e-4,1e-3 --seeds 0,1\n" in second
    assert {path.name for path in (place / "figures").iterdir()} == {
        f"{name}-{kind}.svg" for name in ("part", "one") for kind in ("rates", "curves")
    }


def test_the_file_with_the_most_rows_comes_first(place):
    for name, seeds in (("few", (0,)), ("many", (0, 1))):
        collect(place, *(made("lora", seed, 1e-3, 2.0) for seed in seeds), name=name)
    page = place / "page.md"
    page.write_text(f"{results.BEGIN}{results.END}")
    results.write(place / "rows", page, place / "figures")
    assert re.findall(r"^## (\w+)$", page.read_text("utf-8"), re.MULTILINE) == ["many", "few"]


def test_the_same_rows_draw_the_same_bytes(place):
    rows = collect(place, *(made("lora", seed, rate, 2.0) for seed in (0, 1) for rate in (1e-3, 1e-2)))["rows"]
    for name in ("one", "other"):
        (place / name).mkdir()
        results.draw(rows, place / name, "proof")
    for path in (place / "one").iterdir():
        assert path.read_bytes() == (place / "other" / path.name).read_bytes()


def test_rows_of_other_settings_are_refused(place):
    collect(place, made("lora", 0, 1e-3, 2.0))
    with pytest.raises(ValueError, match="other settings of lora"):
        collect(place, made("lora", 1, 1e-3, 2.0, alpha=16))
    longer = made("lora", 1, 1e-3, 2.0)
    longer["recipe"] = {**longer["recipe"], "training": {"steps": 9}}
    with pytest.raises(ValueError, match="other settings of all runs"):
        collect(place, longer)


def test_a_variant_is_the_same_one_at_every_rank(place):
    collect(place, made("lora", 0, 1e-3, 2.0))
    eight = {**made("lora", 0, 1e-3, 1.9, alpha=16), "rank": 8}
    eight["recipe"] = {**eight["recipe"], "adapter": {"r": 8, "lora_alpha": 16}}
    content = collect(place, eight)
    assert [(row["rank"], row["held_out_loss"]) for row in content["rows"]] == [(4, 2.0), (8, 1.9)]
    assert content["variants"]["lora"]["adapter"] == {"r": 4, "lora_alpha": 8}
    page = place / "page.md"
    page.write_text(f"{results.BEGIN}{results.END}")
    results.write(place / "rows", page, place / "figures")
    assert re.findall(r"^peft-tsd .* --ranks (\d)$", page.read_text("utf-8"), re.MULTILINE) == ["4", "8"]


def test_a_run_that_failed_is_kept_until_it_has_finished(place):
    failed = {**made("lora", 0, 1e-2, 2.0), "status": "failed", "error": "diverged"}
    kept = collect(place, failed)["rows"]
    assert [(r["status"], r["error"]) for r in kept] == [("failed", "diverged")]
    assert collect(place, made("lora", 0, 1e-2, 2.0))["rows"][0]["status"] == "finished"


def test_what_was_asked_is_said_to_be_met_or_not(place):
    """Of a variant a tenth ahead at each rate, with LoRA's final loss earlier at the lower, and never at the higher;
    beside LoRA-GA's single seed, which is worse.
    """
    loss = {(rate, seed): 2.0 + rate * 10 + seed / 10 for rate in (3e-4, 1e-3) for seed in (0, 1, 2)}

    def variant(name, times, shares, seeds=(0, 1, 2), peak=2**20):
        """Runs with so many times LoRA's loss, and on the way, at steps 1 to 3, such shares of it."""
        return [
            {
                **made(name, seed, rate, times * loss[rate, seed] + seed / 1000),
                "evaluations": [{"step": i, "loss": x * loss[rate, seed]} for i, x in enumerate(shares[rate], 1)],
                "peak_memory_bytes": peak,
            }
            for rate in (3e-4, 1e-3)
            for seed in seeds
        ]

    falling = dict.fromkeys((0.0003, 0.001), (3, 2, 1))
    rows = collect(
        place,
        *variant("lora", 1.0, falling),
        *variant("ours", 0.9, {3e-4: (2, 0.8, 0.9), 1e-3: (2, 1.5, 1.2)}),
        *variant("lora-ga", 1.5, falling, (0,), 3 * 2**20),
    )["rows"]

    def said(rows):
        lines = results_targets.targets(rows, "ours").splitlines()[4:]
        return {asked: (found, met) for asked, found, met in ([c.strip() for c in x.split("|")][1:4] for x in lines)}

    found = said(rows)
    assert [met for _, met in found.values()] == ["yes", "yes", "yes", "yes", "no", "yes, one seed", "yes"]
    assert found["mean over rates of 3e-4 to 1e-3, 5 % below LoRA"][0].startswith("-10.0 ± 0.0 %, p < 0.001 (< 0.001")
    assert found["at 1e-3, 0.75 of LoRA’s steps to its final loss"][0] == "(3 never)"
    assert found["tuned, level with PEFT’s LoRA-GA or better (95 %)"][0] == "-40.0 %"
    assert found["less memory than LoRA-GA, and no base weight changed"][0] == "1 for 3 MiB"
    worse = said([{**one, "held_out_loss": 9.0} if one["variant"] == "ours" else one for one in rows])
    assert [met for _, met in worse.values()] == ["no", "no", "no", "yes", "no", "no, one seed", "yes"]
