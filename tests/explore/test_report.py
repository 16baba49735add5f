"""The report in a real browser: what it shows is the exploration's own, and nothing leaves the page."""

import json
import re
import sys
from dataclasses import replace

import numpy as np
import pytest

from peft_tsd.explore.report import finding, meaning, render
from peft_tsd.explore.views import tail
from support import explored

pytest.importorskip("plotly", reason="the report needs plotly")

HOSTILE = "</script><img src=x onerror=\"document.title='taken'\"><b>$&amp;"
WIDTHS = (390, 1280)


# ---------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def models():
    return [explored.exploration("runs/one"), explored.exploration("runs/two", seed=1, kind="checkpoint")]


def payload(text: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S).group(1))


def test_the_same_explorations_give_the_same_file(models):
    assert render(models) == render(models)


def test_singular_values_of_one_base_are_stored_once(models):
    one = models[0]
    arrays = 2 * len(one.weights)
    assert len(payload(render([one]))["arrays"]) == arrays
    assert len(payload(render([one, replace(one, tuned="again")]))["arrays"]) == arrays


def test_a_name_cannot_end_the_data_or_the_title():
    text = render([explored.exploration(HOSTILE)])
    assert "<img" not in text
    assert payload(text)["models"][0]["tuned"] == HOSTILE


def test_the_finding_gives_the_means_over_weights(models):
    one = models[0]
    shares = [weight.choices()["tsd"] for weight in one.weights]
    lower = np.concatenate([weight.positions for weight in one.weights]) > 0.5
    found = finding(one)
    assert f"carry {100 * np.mean([share.rate for share in shares]):.0f}% of its change rates" in found
    assert f"{100 * np.mean(lower):.0f}% of these directions lie" in found
    assert "the 8 most changed of a weight’s 16 to 48 core directions" in found


def test_a_report_needs_an_exploration():
    with pytest.raises(ValueError, match="at least one"):
        render([])


def test_a_missing_plotly_says_what_to_install(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(ImportError, match=r"pip install 'peft-tsd\[explore\]'"):
        render(models)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def report(models):
    return render(models, explored.overlap(models), explored.agreement(models[0]))


def curve(page, chart: str, trace: int = 0, axis: str = "y") -> np.ndarray:
    return np.array(page.evaluate(f"Array.from(document.getElementById('{chart}').data[{trace}].{axis})"))


def assert_shows(page, weight):
    """All three curves and their marks are those of `weight`, and so are the selector and the table."""
    rates = weight.rates.astype(np.float32)
    np.testing.assert_array_equal(curve(page, "spectrum"), rates)
    np.testing.assert_array_equal(curve(page, "zoom"), rates[-tail(weight.k) :])
    np.testing.assert_array_equal(curve(page, "sorted"), np.sort(rates)[::-1])
    assert sorted(curve(page, "spectrum", 1, "x")) == sorted(weight.directions)
    hover = np.array(page.evaluate("document.getElementById('spectrum').data[0].customdata"))
    np.testing.assert_array_equal(hover[:, 1], weight.sigma.astype(np.float32))
    assert page.locator("#weight option:checked").text_content() == weight.name
    listed = page.locator("#directions tbody th").all_text_contents()
    assert [int(index) for index in listed] == weight.directions.tolist()


def cell(page, name: str):
    return page.locator(f"#map button[aria-label^='{name}:']")


def test_the_page_opens_with_the_median_weight(show, report, models):
    page = show(report)
    chosen = page.locator("#map button[aria-pressed=true]")
    assert chosen.count() == 1
    name = chosen.get_attribute("aria-label").split(":")[0]
    assert_shows(page, models[0][name])
    assert page.locator("h1").text_content() == "runs/one"
    assert page.locator("#finding").text_content() == finding(models[0])
    assert page.locator("#meaning").text_content() == meaning(models[0])
    assert page.locator("#map button").count() == len(models[0].weights)


def test_shares_are_on_a_scale_from_nothing_to_all(show, report):
    page = show(report)
    ends = {}
    for i, label in enumerate(page.locator("#quantity option").all_text_contents()):
        page.select_option("#quantity", str(i))
        ends[label.split(":")[0]] = [page.locator(f"#legend-{end}").text_content() for end in ("low", "high")]
    for name in ("Concentration", "Core energy", "TSD energy"):
        assert ends[name] == ["0%", "100%"]
    assert ends["Gini coefficient of the rates"] == ["0.00", "1.00"]
    bars = page.locator("#choices .bar-cell")
    for bar in bars.all():
        percent = float(bar.text_content().removesuffix("%").removeprefix("<"))
        full = bar.evaluate("cell => cell.clientWidth - 1.4 * 16")  # less its padding
        width = bar.locator("i").evaluate("bar => bar.offsetWidth")
        assert width == pytest.approx(percent / 100 * full, abs=0.01 * full + 1)


def test_the_best_directions_stand_beside_the_core_ones(show, models):
    one = models[0]
    weights = tuple(
        replace(w, best_energy=0.5, gradient_energy=0.25 if i else None) for i, w in enumerate(one.weights)
    )
    page = show(render([replace(one, weights=weights), one]))
    rows = page.locator("#choices tbody tr")
    assert rows.count() == 6
    cell(page, one.weights[0].name).click()
    assert rows.nth(4).locator("td").all_text_contents() == ["–", "50%", "–", "50%"]
    assert rows.nth(5).locator("td").all_text_contents() == ["–", "–", "–", "25%"]
    page.select_option("#model", "1")
    assert rows.count() == 4


def test_a_click_on_the_map_shows_that_weight(show, report, models):
    page = show(report)
    for name in ("model.layers.3.mlp.down_proj", "lm_head"):
        cell(page, name).click()
        assert_shows(page, models[0][name])


def test_the_map_is_walked_with_the_keyboard(show, report, models):
    page = show(report)
    cell(page, "model.layers.1.self_attn.q_proj").click()
    for key, name in [
        ("ArrowRight", "model.layers.2.self_attn.q_proj"),
        ("ArrowDown", "model.layers.2.self_attn.v_proj"),
        ("End", "model.layers.3.self_attn.v_proj"),
        ("ArrowRight", "model.layers.3.self_attn.v_proj"),
        ("Home", "model.layers.0.self_attn.v_proj"),
        ("ArrowUp", "model.layers.0.self_attn.q_proj"),
    ]:
        page.keyboard.press(key)
        assert_shows(page, models[0][name])
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith(f"{name}:")
    assert page.locator("#map button[tabindex='0']").count() == 1


def test_enter_on_a_cell_shows_that_weight(show, report, models):
    page = show(report)
    cell(page, "model.layers.3.self_attn.v_proj").focus()
    page.keyboard.press("Enter")
    assert_shows(page, models[0]["model.layers.3.self_attn.v_proj"])


def test_cells_say_the_quantity_shown(show, report, models):
    page = show(report)
    name = "model.layers.2.self_attn.q_proj"
    labels = []
    for i in range(page.locator("#quantity option").count()):
        page.select_option("#quantity", str(i))
        labels.append(cell(page, name).get_attribute("aria-label").split(": ")[1])
    weight = models[0][name]
    assert len(labels) == 7
    assert labels[0] == f"{100 * weight.concentration()[8]:.0f}%"
    assert labels[1] == f"{weight.gini:.2f}"
    assert float(labels[2]) == pytest.approx(weight.rates.max(), rel=5e-3)
    assert float(labels[5]) == pytest.approx(weight.positions.mean(), abs=5e-3)
    assert float(labels[6]) == pytest.approx(weight.change_norm / weight.weight_norm, rel=5e-3)


def test_another_model_keeps_the_weight(show, report, models):
    page = show(report)
    cell(page, "model.layers.2.mlp.down_proj").click()
    page.select_option("#model", "1")
    assert_shows(page, models[1]["model.layers.2.mlp.down_proj"])
    assert page.locator("h1").text_content() == "runs/two"
    assert page.locator("#finding").text_content() == finding(models[1])


def test_rates_on_a_log_scale(show, report):
    page = show(report)
    page.get_by_label("log scale").check()
    for chart, x, y in [("spectrum", "linear", "log"), ("zoom", "linear", "log"), ("sorted", "log", "log")]:
        layout = f"document.getElementById('{chart}')._fullLayout"
        assert page.evaluate(f"[{layout}.xaxis.type, {layout}.yaxis.type]") == [x, y]


def test_overlap_and_agreement_are_those_given(show, models):
    overlap, agreement = explored.overlap(models), explored.agreement(models[0])
    page = show(render(models, overlap, agreement))
    mean = 100 * overlap.shared[:, 0, 1].mean()
    assert page.locator("#overlap tbody tr").first.locator("td").nth(1).text_content() == f"{mean:.0f}%"
    chance, random = agreement.chance.mean(), agreement.random_change.mean()
    np.testing.assert_allclose(curve(page, "precision", 0), np.full(10, chance))
    np.testing.assert_allclose(curve(page, "precision", 1), np.full(10, random))
    np.testing.assert_allclose(curve(page, "precision", 3), agreement.precision.mean(1))
    np.testing.assert_allclose(curve(page, "recall", 3), agreement.recall.mean(1))
    cell(page, "lm_head").click()
    np.testing.assert_allclose(curve(page, "recall", 2), agreement.recall[:, -1])
    lead = page.locator("#agreement-lead").text_content()
    assert "the 16 directions" in lead
    assert "the 8 highest of the fully fine-tuned model" in lead


def test_many_models_are_drawn_as_a_range(show):
    models = [explored.exploration(f"run {seed}", seed=seed) for seed in range(5)]
    page = show(render(models, explored.overlap(models)))
    assert page.evaluate("document.getElementById('overlap-layers').data.length") == 4
    assert page.locator("#agreement-section").is_hidden()


def test_weights_left_out_stand_under_their_reason(show, report):
    page = show(report)
    page.locator("#left-out-summary").click()
    assert page.locator("#left-out-summary").text_content() == "5 weights not measured, for 2 reasons"
    assert page.locator("#left-out h3").all_text_contents() == ["not a matrix (4)", "unchanged (1)"]


def test_a_model_that_did_not_change(show, models):
    page = show(render([replace(models[0], weights=()), models[1]]))
    assert "No weight" in page.locator("#finding").text_content()
    assert page.locator("#map-section").is_hidden()
    page.select_option("#model", "1")
    assert page.locator("#map button").count() == len(models[1].weights)


def test_a_weight_with_a_single_direction(show, models):
    tiny = explored.weight("scale", None, "scale", (1, 5), np.random.default_rng(0))
    page = show(render([replace(models[0], weights=(tiny,))]))
    assert_shows(page, tiny)


def test_names_break_at_their_dots_and_numbers_do_not(show, report):
    page = show(report)
    parts = page.evaluate(
        "[...document.querySelectorAll('wbr')].map(w => [w.previousSibling.textContent, w.nextSibling.textContent])"
    )
    assert parts
    assert all(before[-1] in "./" for before, _ in parts)
    assert not any(before[-1] == "." and after[:1].isdigit() for before, after in parts)


def test_hostile_names_stay_text(show, models):
    one = models[0]
    weights = tuple(replace(weight, name=weight.name + HOSTILE, module=HOSTILE) for weight in one.weights)
    hostile = replace(one, base=HOSTILE, tuned=HOSTILE, weights=weights, left_out={HOSTILE: HOSTILE})
    agreement = replace(explored.agreement(hostile), truth=HOSTILE)
    page = show(render([hostile, hostile], explored.overlap([hostile, hostile]), agreement))
    page.locator("#map button").nth(3).click()
    page.wait_for_timeout(100)
    assert page.locator("img").count() == 0
    assert page.title() == f"Task-specific directions of {HOSTILE}, {HOSTILE}"
    assert page.locator("h1").text_content() == HOSTILE
    assert page.locator("#map tbody th").first.text_content().endswith(HOSTILE)


@pytest.mark.long
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_never_scrolls_sideways(show, width):
    long = explored.exploration("runs/" + "long-name-" * 12, num_layers=40)
    page = show(render([long, long], explored.overlap([long, long]), explored.agreement(long)), width)
    page.locator("#left-out-summary").click()
    page.get_by_label("Numbers in the cells").check()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # The map has its own box to scroll in.
    assert page.evaluate("getComputedStyle(document.getElementById('map-scroll')).overflowX") == "auto"


def test_dark_by_preference_and_by_choice(show, report):
    background = "getComputedStyle(document.body).backgroundColor"
    ink = "document.getElementById('spectrum').layout.font.color"
    page = show(report)
    light = page.evaluate(background), page.evaluate(ink)
    page.get_by_role("button", name="Dark theme").click()
    dark = page.evaluate(background), page.evaluate(ink)
    assert light[0] != dark[0]
    assert light[1] != dark[1]
    page.get_by_role("button", name="Light theme").click()
    assert (page.evaluate(background), page.evaluate(ink)) == light
    preferred = show(report, scheme="dark")
    assert (preferred.evaluate(background), preferred.evaluate(ink)) == dark


def test_printing_is_on_white(show, report):
    page = show(report, scheme="dark")
    dark = page.evaluate("document.getElementById('spectrum').layout.font.color")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("document.getElementById('spectrum').layout.font.color") != dark
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.getElementById('spectrum').layout.font.color") == dark


CONTRASTS = """() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = (colour) => channels(colour).slice(0, 3)
    .map((c) => (c / 255 <= 0.04045 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + [0.2126, 0.7152, 0.0722][i] * c, 0);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const colour = getComputedStyle(node).backgroundColor;
      if ((channels(colour)[3] ?? 1) > 0) return colour;
    }
  };
  const found = {};
  for (const node of document.querySelectorAll("h1, h2, h3, p, a, dt, dd, th, td, label, legend, figcaption, " +
      "summary, select, button, li, strong, .formula, #map button span, svg text")) {
    if (!node.textContent.trim() || node.closest("[hidden], .skip, noscript, defs")) continue;
    const style = getComputedStyle(node);
    const paper = node.ownerSVGElement ? getComputedStyle(document.body).backgroundColor : behind(node);
    const text = node.ownerSVGElement ? style.fill : style.color;
    const [high, low] = [luminance(text), luminance(paper)].sort((a, b) => b - a);
    found[`${node.tagName} ${node.id || node.className} ${text} on ${paper}`] = (high + 0.05) / (low + 0.05);
  }
  return found;
}"""


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(show, report, scheme):
    page = show(report, scheme=scheme)
    page.get_by_label("Numbers in the cells").check()
    page.locator("#left-out-summary").click()
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 20
    assert {where: ratio for where, ratio in contrasts.items() if ratio < 4.5} == {}


@pytest.mark.long
@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_axe_finds_nothing(show, report, width, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
    page = show(report, width, scheme)
    page.locator("#left-out-summary").click()
    results = axe.Axe().run(page)
    assert results.violations_count == 0, results.generate_report()
