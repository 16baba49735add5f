"""The figures: what files there are, what they hold, and that they are reproducible."""

import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from peft_tsd.explore.figures import agreement_figure, rates_figure, write_figures
from peft_tsd.explore.views import histogram, kinds, layers, representative, tail
from support import explored

pytest.importorskip("matplotlib")

SVG = "{http://www.w3.org/2000/svg}"
FIGURES = ["concentration", "heatmap", "positions", "rates"]


@pytest.fixture(scope="module")
def one():
    return explored.exploration()


@pytest.fixture(scope="module")
def folder(one, tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures") / "new"
    write_figures(folder, [one], explored.agreement(one))
    return folder


def texts(path) -> list[str]:
    return ["".join(node.itertext()).strip() for node in ET.parse(path).iter(f"{SVG}text")]


def test_every_figure_is_written_twice(one, folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(f"{name}.{end}" for name in [*FIGURES, "agreement"] for end in ("svg", "png"))
    for path in folder.glob("*.svg"):
        assert ET.parse(path).getroot().tag == f"{SVG}svg"


def test_a_png_has_300_dots_per_inch(folder):
    image = pytest.importorskip("PIL.Image")
    for path in folder.glob("*.png"):
        with image.open(path) as picture:
            picture.load()
            assert picture.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_the_paths_come_back_in_order(one, tmp_path):
    written = write_figures(tmp_path, [one])
    assert [path.name for path in written[:2]] == ["rates.svg", "rates.png"]
    assert sorted(written) == sorted(tmp_path.iterdir())


def test_rates_mark_every_tsd_in_each_panel(one, folder):
    weight = representative(one)
    marked = {
        group.get("id"): len(list(group.iter(f"{SVG}use")))
        for group in ET.parse(folder / "rates.svg").iter(f"{SVG}g")
        if (group.get("id") or "").startswith("tsd-")
    }
    in_tail = int((weight.directions >= weight.k - tail(weight.k)).sum())
    assert marked == {"tsd-spectrum": 8, "tsd-zoom": in_tail, "tsd-sorted": 8}


def test_the_curves_are_the_weights_own(one):
    weight = one["model.layers.2.mlp.down_proj"]
    spectrum, zoom, by_rank = rates_figure(weight).axes
    np.testing.assert_array_equal(spectrum.lines[0].get_ydata(), weight.rates)
    np.testing.assert_array_equal(zoom.lines[0].get_ydata(), weight.rates[-tail(weight.k) :])
    np.testing.assert_array_equal(by_rank.lines[0].get_ydata(), np.sort(weight.rates)[::-1])
    assert sorted(spectrum.lines[1].get_xdata()) == sorted(weight.directions)


def test_text_in_an_svg_is_text(folder):
    assert "change rate δ" in texts(folder / "rates.svg")
    assert {"self_attn.q_proj", "lm_head", "layer"} <= set(texts(folder / "heatmap.svg"))


def test_the_same_explorations_give_the_same_files(one, folder, tmp_path):
    for path in write_figures(tmp_path, [one], explored.agreement(one)):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_one_can_choose_the_weight(one, tmp_path):
    write_figures(tmp_path, [one], weight="lm_head")
    assert "lm_head" in texts(tmp_path / "rates.svg")
    with pytest.raises(KeyError, match=r"layers\.99"):
        write_figures(tmp_path, [one], weight="model.layers.99")


def test_several_models_have_files_of_their_own(one, tmp_path):
    models = [replace(one, tuned=tuned) for tuned in ("runs/My Adapter v1.5/", "other/my adapter: v1.5", "///")]
    names = {path.name for path in write_figures(tmp_path, models)}
    suffixes = ["my-adapter-v1-5", "my-adapter-v1-5-2", "model"]
    assert names == {f"{name}-{suffix}.{end}" for name in FIGURES for suffix in suffixes for end in ("svg", "png")}


def test_a_model_without_weights_has_no_figures(one, tmp_path):
    assert write_figures(tmp_path, [replace(one, weights=())]) == []


def test_names_are_not_read_as_formulas(one):
    weight = replace(one.weights[0], name=r"_$\frac{$")
    rates_figure(weight).canvas.draw()


def test_agreements_are_drawn_side_by_side(one):
    ranks = {f"rank {r}": explored.agreement(one, seed=r) for r in (4, 8, 16, 32, 64)}
    precision, recall = agreement_figure(ranks).axes
    for line, (name, agreement) in zip(precision.lines, ranks.items()):
        assert line.get_label() == name
        np.testing.assert_allclose(line.get_ydata(), agreement.precision.mean(1))
    styles = {(line.get_color(), str(line.get_linestyle()), line.get_marker()) for line in recall.lines}
    assert len(styles) == 7  # five ranks, one level of chance and one of a random change
    labels = [line.get_label() for line in precision.lines]
    assert (labels.count("chance"), labels.count("random change")) == (1, 1)
    with pytest.raises(ValueError, match="at least one"):
        agreement_figure({})


def test_the_representative_has_the_median_concentration(one):
    shares = [weight.choices()["tsd"].rate for weight in one.weights]
    assert representative(one).choices()["tsd"].rate == np.median(shares)  # 13 weights
    with pytest.raises(ValueError, match="no measured weight"):
        representative(replace(one, weights=()))


def test_kinds_tell_stacks_apart(one):
    def named(name, layer, module):
        return replace(one.weights[0], name=name, layer=layer, module=module)

    weights = (
        named("encoder.block.0.layer.0.q", 0, "layer.0.q"),
        named("decoder.block.0.layer.0.q", 0, "layer.0.q"),
        named("decoder.block.1.layer.1.k", 1, "layer.1.k"),
        named("head", None, "head"),
    )
    model = replace(one, weights=weights)
    assert list(kinds(model).values()) == [
        "encoder.block.*.layer.0.q",
        "decoder.block.*.layer.0.q",
        "layer.1.k",
        "head",
    ]
    assert layers(model) == [0, 1, None]


def test_a_histogram_counts_both_ends_of_the_spectrum(one):
    weight = replace(one.weights[0], directions=np.array([0, one.weights[0].k - 1]))
    shares = histogram(replace(one, weights=(weight,)))
    assert (shares[0], shares[-1], shares.sum()) == (0.5, 0.5, 1)
    assert histogram(replace(one, weights=())).sum() == 0
