"""The page of a comparison in a real browser."""

import pytest

from peft_tsd.compare import make_plan
from peft_tsd.compare.report import render
from peft_tsd.compare.results import summarize
from support.comparisons import row

pytest.importorskip("plotly", reason="the page needs plotly")

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><b>$&amp;"


@pytest.fixture(scope="module")
def text():
    plan = make_plan(
        "deberta-v3-base-glue",
        methods=["base", "lora", "lora-dash"],
        ranks=[2, 8],
        tasks=["cola", "rte"],
        tune=("lr", [1e-4, 1e-3]),
        vary={"directions.num_directions": [4, 8]},
    )
    more = {
        "loss": [{"step": i + 1, "loss": 2 / (i + 1)} for i in range(50)],
        "machine": {"device": HOSTILE, "cpus": 2, "threads": 1},
        "versions": {"torch": "2"},
    }
    rows = [
        row(
            c.method,
            c.seed,
            0.5 + 0.1 * c.seed + 0.01 * i % 0.07,
            rank=c.rank,
            task=c.task,
            variation=c.variation,
            **more,
        )
        for i, c in enumerate(plan.cells())
    ]
    tuned = [{"value": v, **row("lora", 0, 0.5 + v, rank=2, task=t, **more)} for t in plan.tasks for v in (1e-4, 1e-3)]
    return render(plan, rows, tuned, summarize(rows), f"peft-tsd compare {HOSTILE}")


def test_names_are_never_markup(text):
    assert "<img" not in text


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_the_table_and_every_chart_are_there(show, text, width, scheme):
    page = show(text, width, scheme)
    # base, and LoRA and LoRA-Dash (with 4 and 8 directions) at two ranks.
    assert page.locator("table").first.locator("tbody tr").count() == 1 + 2 * 3
    # LoRA-Dash again, less LoRA, by task.
    assert page.locator("table").last.locator("tbody tr").count() == 2 * 2
    captions = page.locator("figcaption").all_inner_texts()
    assert captions == [
        "Score by rank",
        "Score by directions.num_directions",
        "Training loss: cola",
        "Training loss: rte",
        "Score on validation rows by optimizer.learning_rate: cola",
        "Score on validation rows by optimizer.learning_rate: rte",
    ]
    assert page.locator("figure svg.main-svg").count() >= len(captions)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert "Comparison" in page.locator("header").inner_text().title()


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_axe_finds_nothing(show, text, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    results = axe.Axe().run(show(text, 1280, scheme))
    assert results.violations_count == 0, results.generate_report()
