"""Figures for a paper: vector graphics with real text, and the same at 300 dpi.

The same explorations give the same files, byte by byte, on one installation of matplotlib. Colours are those of Okabe
and Ito, and cividis; no line is told from another by its colour alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .results import HIGHEST, Agreement, Exploration, IntArray, WeightChange, highest
from .views import BINS, histogram, kinds, layers, representative, tail

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import Formatter

WIDTH = 6.9
"""Inches: two columns of a paper."""

INK, ACCENT, CHANCE = "#4d4d4d", "#0072B2", "#7f7f7f"

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))

MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.1,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "peft-tsd",
}


def write_figures(
    folder: Path,
    explorations: Sequence[Exploration],
    agreement: Agreement | None = None,
    weight: str | None = None,
) -> list[Path]:
    """Write every figure as `.svg` and `.png` into `folder`, which is made where it is missing.

    Of each model: `rates` (`rates_figure`), `heatmap`, `positions` and `concentration`; and once `agreement`, where it
    is given. With several models the names carry the model's: `rates-my-adapter.svg`. A model of which no weight was
    measured has no figures.

    Args:
        weight: The name of the weight that `rates` shows; None for each model's `representative`.

    Returns:
        The paths written.

    Raises:
        KeyError: A model has no measured weight of the name `weight`.
        ImportError: matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    for one, suffix in zip(explorations, _suffixes(explorations)):
        if not one.weights:
            continue
        written += _save(rates_figure(one[weight] if weight else representative(one)), folder / f"rates{suffix}")
        written += _save(heatmap_figure(one), folder / f"heatmap{suffix}")
        written += _save(positions_figure(one), folder / f"positions{suffix}")
        written += _save(concentration_figure(one), folder / f"concentration{suffix}")
    if agreement is not None:
        written += _save(agreement_figure({"mean over weights": agreement}), folder / "agreement")
    return written


def rates_figure(weight: WeightChange) -> Figure:
    """The paper's figure of one weight: its rates over the spectrum, a close-up of the smallest σ, and sorted."""
    with _style():
        figure, (spectrum, zoom, by_rank) = _panels(3, 2.0)
        order = highest(weight.rates, weight.k)
        everywhere = np.arange(weight.k)
        last = everywhere[-tail(weight.k) :]
        _rates(spectrum, "spectrum", everywhere, everywhere, weight)
        _rates(zoom, "zoom", last, last, weight)
        _rates(by_rank, "sorted", order, 1 + everywhere, weight)
        spectrum.set(title="Over the spectrum", xlabel="direction (0: largest σ)", ylabel="change rate δ")
        zoom.set(title=f"The {len(last)} smallest singular values", xlabel="direction")
        by_rank.set(title="Sorted", xlabel="rank of the rate")
        by_rank.legend(loc="upper right")
        figure.suptitle(_literal(weight.name), fontsize=8)
    return figure


def heatmap_figure(exploration: Exploration) -> Figure:
    """The share of its rates that the TSDs of each weight carry, by layer and module; blank where there is none."""
    kind, columns = kinds(exploration), layers(exploration)
    rows = list(dict.fromkeys(kind.values()))
    shares = np.full((len(rows), len(columns)), np.nan)
    for weight in exploration.weights:
        shares[rows.index(kind[weight.name]), columns.index(weight.layer)] = weight.choices()["tsd"].rate
    with _style():
        figure, (axes,) = _panels(1, 0.75 + 0.2 * len(rows))
        image = axes.imshow(shares, cmap="cividis", aspect="auto", interpolation="nearest", vmin=0, vmax=1)
        axes.set_yticks(range(len(rows)), [_literal(row) for row in rows])
        every = max(1, len(columns) // 16)
        shown = range(0, len(columns), every)
        axes.set_xticks(shown, ["–" if columns[i] is None else str(columns[i]) for i in shown])
        axes.set_xlabel("layer")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        figure.colorbar(image, ax=axes, label="share of rates in the TSDs", format=_percent(), pad=0.02)
    return figure


def positions_figure(exploration: Exploration) -> Figure:
    """Where in the spectrum the TSDs of all weights lie, and where those of a random change would."""
    with _style():
        figure, (axes,) = _panels(1, 2.2, width=WIDTH / 2)
        centres = (np.arange(BINS) + 0.5) / BINS
        axes.bar(centres, histogram(exploration), width=0.88 / BINS, color=ACCENT)
        random = histogram(exploration.random_change())
        axes.step(centres, random, where="mid", color=INK, linestyle="--", linewidth=0.9, label="random change")
        axes.set(xlim=(0, 1), xlabel="position (0: largest σ, 1: smallest)", ylabel="share of the TSDs")
        axes.yaxis.set_major_formatter(_percent())
        axes.legend(loc="upper left")
    return figure


def concentration_figure(exploration: Exploration) -> Figure:
    """The share of a weight's rates in its n highest, averaged by module, and over all weights."""
    kind = kinds(exploration)
    shares = {weight.name: list(weight.concentration().values()) for weight in exploration.weights}
    even = np.mean([[min(n / weight.k, 1) for n in HIGHEST] for weight in exploration.weights], axis=0)
    with _style():
        figure, (axes,) = _panels(1, 2.6, width=WIDTH * 0.7)
        for i, name in enumerate(dict.fromkeys(kind.values())):
            mean = np.mean([shares[weight] for weight in shares if kind[weight] == name], axis=0)
            axes.plot(HIGHEST, mean, **_series(i), label=_literal(name))
        overall = np.mean(list(shares.values()), axis=0)
        axes.plot(HIGHEST, overall, color="black", linewidth=2, label="all weights")
        axes.plot(HIGHEST, even, color=CHANCE, linestyle=":", label="if all were equal")
        axes.set_xscale("log", base=2)
        axes.set_xticks(HIGHEST, [str(n) for n in HIGHEST])
        axes.set(xlabel="highest rates", ylabel="share of all rates", ylim=(0, 1))
        axes.yaxis.set_major_formatter(_percent())
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def agreement_figure(agreements: Mapping[str, Agreement]) -> Figure:
    """Precision and recall of directions predicted during training: a line each, such as one per LoRA rank.

    Args:
        agreements: What each line is called, and what it shows: the mean over the agreement's weights.

    Raises:
        ValueError: There is none to draw.
    """
    if not agreements:
        raise ValueError("agreement_figure needs at least one agreement; got none.")
    with _style():
        figure, (precision, recall) = _panels(2, 2.3)
        for i, (name, one) in enumerate(agreements.items()):
            precision.plot(one.steps, one.precision.mean(1), **_series(i), label=_literal(name))
            recall.plot(one.steps, one.recall.mean(1), **_series(i), label=_literal(name))
        # Lines of one model and one size of the sets share their baselines; each is drawn once.
        drawn: set[str] = set()
        for name, dashes, of_precision, of_recall in sorted(
            {b for one in agreements.values() for b in _baselines(one)}
        ):
            for axes, level in ((precision, of_precision), (recall, of_recall)):
                label = None if name in drawn else name
                axes.axhline(level, color=CHANCE, linestyle=dashes, linewidth=0.9, label=label)
            drawn.add(name)
        for axes in (precision, recall):
            axes.set(ylim=(0, 1.02), xlabel="optimizer step")
            axes.yaxis.set_major_formatter(_percent())
        precision.set_title("Precision: predicted directions that are true")
        recall.set_title("Recall: true directions that were predicted")
        recall.legend(loc="best")
    return figure


def _rates(axes: Axes, name: str, indices: IntArray, x: IntArray, weight: WeightChange) -> None:
    """The rates of `indices` at the places `x`, the TSDs among them marked: in an SVG, the group tsd-`name`."""
    axes.plot(x, weight.rates[indices], color=INK, linewidth=0.7, label="all")
    is_tsd = np.isin(indices, weight.directions)
    style: dict[str, Any] = {
        "color": ACCENT,
        "marker": "D",
        "linestyle": "none",
        "markeredgecolor": "white",
        "markeredgewidth": 0.4,
    }
    (marks,) = axes.plot(x[is_tsd], weight.rates[indices[is_tsd]], label="TSDs", gid=f"tsd-{name}", **style)
    marks.set_clip_on(False)
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=5, integer=True)


def _baselines(agreement: Agreement) -> list[tuple[str, str, float, float]]:
    """What knows nothing of the task scores: its name, its dashes, its precision and its recall."""
    levels = [("chance", ":", agreement.chance)]
    if agreement.random_change is not None:
        levels.append(("random change", "--", agreement.random_change))
    ratio = agreement.predicted / agreement.true
    return [
        (name, dashes, float(level.mean()), float(np.minimum(1, level * ratio).mean()))
        for name, dashes, level in levels
    ]


def _series(i: int) -> dict[str, Any]:
    # Of different lengths, so that two lines that share a colour differ in their marker.
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": DASHES[i % len(DASHES)],
        "marker": MARKERS[i % len(MARKERS)],
    }


def _panels(columns: int, height: float, width: float = WIDTH) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


@contextmanager
def _style() -> Iterator[None]:
    """This module's settings of matplotlib, for as long as a figure is built or written."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ImportError("figures need the package matplotlib: pip install 'peft-tsd[explore]'") from None
    with rc_context(STYLE):
        yield


def _percent() -> Formatter:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1, decimals=0)


def _literal(name: str) -> str:
    """A name as matplotlib shows it unread: a dollar sign would start a formula, an underscore hide it in a legend."""
    return re.sub(r"^_", "\u200b_", name.replace("$", r"\$"))


def _save(figure: Figure, path: Path) -> list[Path]:
    # A name may hold dots, which `with_suffix` would take for the start of an ending.
    svg, png = path.with_name(path.name + ".svg"), path.with_name(path.name + ".png")
    with _style():
        figure.savefig(svg, metadata={"Date": None})
        figure.savefig(png, dpi=300, metadata={"Software": None})
    return [svg, png]


def _suffixes(explorations: Sequence[Exploration]) -> list[str]:
    """What tells the models' files apart: nothing for one model, else the end of its name, numbered if taken."""
    if len(explorations) == 1:
        return [""]
    suffixes: list[str] = []
    for one in explorations:
        last = one.tuned.rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1]
        slug = "-" + (re.sub(r"[^a-z0-9]+", "-", last.lower()).strip("-")[:40] or "model")
        numbered = (f"{slug}-{number}" for number in count(2))
        suffixes.append(slug if slug not in suffixes else next(name for name in numbered if name not in suffixes))
    return suffixes
