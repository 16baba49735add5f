"""The report: everything an exploration found, in one HTML file that opens offline.

The page brings plotly's JavaScript with it and asks nothing of any network: its Content-Security-Policy allows the
scripts it holds, by their digests, and no connection. Arrays over the spectrum travel as base64 of little-endian
float32. Names of models and weights are untrusted: they travel as JSON and become text nodes, never markup.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import numpy as np

from ..pages.embedding import one_script
from ..pages.shell import assemble
from .results import HIGHEST, Agreement, Exploration, FloatArray, Overlap, mean_of, summary
from .views import histogram, kinds, layers, representative, tail

PARTS = ("state", "text", "charts", "map", "weight", "models", "page")
"""The page's JavaScript, each using those before it."""


def render(
    explorations: Sequence[Exploration], overlap: Overlap | None = None, agreement: Agreement | None = None
) -> str:
    """The report as the text of one HTML file.

    Args:
        explorations: One or several fine-tuned models; the page lets one choose between them.
        overlap: Their shared TSDs, shown where given.
        agreement: Precision and recall over training, shown where given.

    Raises:
        ValueError: No exploration was given.
        ImportError: plotly is not installed.
    """
    if not explorations:
        raise ValueError("a report needs at least one exploration; got none.")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ImportError("the report needs the package plotly: pip install 'peft-tsd[explore]'") from None
    page = files("peft_tsd.explore") / "page"
    script = one_script((page / f"{part}.js").read_text("utf-8") for part in PARTS)
    return assemble(
        title=f"Task-specific directions of {', '.join(one.tuned for one in explorations)}",
        style=(page / "page.css").read_text("utf-8"),
        body=(page / "page.html").read_text("utf-8"),
        data=_data(explorations, overlap, agreement),
        scripts=(get_plotlyjs(), script),
    )


def _data(explorations: Sequence[Exploration], overlap: Overlap | None, agreement: Agreement | None) -> dict[str, Any]:
    """What `state.js` reads: the summary, with what the page shows beyond it."""
    data = summary(explorations, overlap, agreement)
    arrays = _Arrays()
    for one, model in zip(explorations, data["models"]):
        model |= _model(one, model["weights"])
        for weight, row in zip(one.weights, model["weights"]):
            row["sigma"], row["rates"] = arrays.add(weight.sigma), arrays.add(weight.rates)
    data |= {"highest": HIGHEST, "arrays": arrays.texts}
    return data


def _model(one: Exploration, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page shows of a model beyond its summary; adds to each of `rows` its kind and relative change."""
    kind = kinds(one)
    random = one.random_change()
    for weight, row in zip(one.weights, rows):
        row["kind"] = kind[weight.name]
        row["tail"] = tail(weight.k)
        row["relative_change"] = weight.change_norm / weight.weight_norm if weight.weight_norm > 0 else None
    by_kind = {name: [row for row in rows if row["kind"] == name] for name in dict.fromkeys(kind.values())}
    return {
        "finding": finding(one),
        "meaning": meaning(one),
        "facts": _facts(one, random),
        "layers": layers(one),
        "kinds": [{"kind": name, **_concentration(of_kind)} for name, of_kind in by_kind.items()],
        "overall": _concentration(rows) if rows else None,
        "random_histogram": histogram(random).tolist(),
        "histogram": histogram(one).tolist(),
        "initial": representative(one).name if one.weights else None,
    }


def _concentration(rows: list[dict[str, Any]]) -> dict[str, float]:
    columns = ["gini", *(f"highest_{n}_rate" for n in HIGHEST)]
    return {"count": len(rows), **{column: float(np.mean([row[column] for row in rows])) for column in columns}}


def finding(one: Exploration) -> str:
    """The main finding in one sentence: how much the TSDs carry, where they lie, what they explain of ‖ΔW‖².

    Shares are means over the weights, the place is that of all their TSDs. Nothing is called high or low, so that the
    sentence holds for any model.
    """
    if not one.weights:
        return "No weight that both models have was changed."
    count = _span([len(weight.directions) for weight in one.weights])
    k = _span([weight.k for weight in one.weights])
    shares = [weight.choices()["tsd"] for weight in one.weights]
    positions = np.concatenate([weight.positions for weight in one.weights])
    return (
        f"On average, the {count} most changed of a weight’s {k} core directions carry "
        f"{_percent([s.rate for s in shares])} of its change rates; {_percent(positions > 0.5)} of these directions "
        "lie in the half of the spectrum with the smaller singular values, "
        f"and they explain {_percent([s.energy for s in shares])} of ‖ΔW‖², all core "
        f"directions together {_percent([weight.core for weight in one.weights])}."
    )


NOTABLE = 0.02
"""A share that differs from that of a random change by less than this, or by less than a tenth of it, is the same."""


def meaning(one: Exploration) -> str:
    """What the finding means, in plain words: the own number, that of a random change, and what follows; empty where
    nothing was changed."""
    if not one.weights:
        return ""
    own, random = (
        float(np.mean([weight.choices()["tsd"].rate for weight in found.weights]))
        for found in (one, one.random_change())
    )
    count = _span([len(weight.directions) for weight in one.weights])
    said = f"{_percent(own)} of the relative change lies in {count} directions a weight"
    said += f", where a random change of the same size shows {_percent(random)}"
    if one.along is not None and one.direction_source == "weight":
        said += (
            f". But {one.along} chose such directions early and was trained along them, so this tells how the adapter "
            "was made, and not what the task needs; a plain LoRA or a full fine-tuning would tell that"
        )
    elif abs(own - random) < max(NOTABLE, 0.1 * random):
        said += ": that is what these weights show under any change, and says little of the task"
    elif own > random:
        said += ": what lies beyond that is the task’s"
    else:
        said += ": fine-tuning spread its change more evenly than chance would"
    if one.along is not None and one.direction_source == "gradient":
        said += f". {one.along} was trained along directions of the gradient, which are not those counted here"
    return f"{said}. {_held(one)}"


def _held(one: Exploration) -> str:
    """What the best directions hold, beside the TSDs."""
    best, gradient = (
        mean_of([getattr(weight, name) for weight in one.weights]) for name in ("best_energy", "gradient_energy")
    )
    tsd = _percent([weight.choices()["tsd"].energy for weight in one.weights])
    if best is None:
        return f"In size, these directions hold {tsd} of ‖ΔW‖²."
    known = f", those of the gradient that it was trained along {_percent(gradient)}" if gradient is not None else ""
    return f"In size, these directions hold {tsd} of ‖ΔW‖², the best as many of ΔW itself {_percent(best)}{known}."


def _facts(one: Exploration, random: Exploration) -> list[list[str]]:
    """The numbers beside the finding, as (value, what it is); `random` is its random change."""
    if not one.weights:
        return []
    strongest = max(one.weights, key=lambda weight: weight.rates.max())
    at = int(strongest.rates.argmax())
    sigma, middle = float(strongest.sigma[at]), float(np.median(strongest.sigma))
    tiny = ": a tiny σ makes any change look large" if sigma < 0.01 * middle else ""
    relative = [weight.change_norm / weight.weight_norm for weight in one.weights if weight.weight_norm > 0]
    facts = [
        [
            _percent([w.choices()["tsd"].rate for w in one.weights]),
            "of the rates are the TSDs’ (of as many under a random change of the same size: "
            f"{_percent([w.choices()['tsd'].rate for w in random.weights])})",
        ],
        [_gini(one), f"Gini coefficient of the rates (0: all equal; of a random change: {_gini(random)})"],
        [
            _last(one),
            "of the TSDs are simply the directions with the smallest singular values (of a random change: "
            f"{_last(random)})",
        ],
        [
            _number(strongest.rates[at]),
            f"times its σ is the largest change of a direction, in {strongest.name}, where σ is {sigma:.2g} and the "
            f"weight’s median σ {middle:.2g}{tiny}",
        ],
    ]
    return [*facts, [f"{np.mean(relative):.2g}", "mean relative change ‖ΔW‖ / ‖W‖"]] if relative else facts


def _gini(one: Exploration) -> str:
    return f"{np.mean([weight.gini for weight in one.weights]):.2f}"


def _last(one: Exploration) -> str:
    """The part of the TSDs that are the last of the spectrum, in percent."""
    return _percent([np.mean(weight.directions >= weight.k - len(weight.directions)) for weight in one.weights])


def _span(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _percent(shares: Any) -> str:
    """The mean of shares (0 to 1) in percent: whole from 10 on, two digits below; all of them is 100% alone."""
    percent = 100 * float(np.mean(shares))
    if 99.5 <= percent < 100:
        return "more than 99%"
    return f"{percent:.0f}%" if percent >= 9.95 or percent == 0 else f"{percent:.2g}%"


class _Arrays:
    """Arrays as texts, each once: models of one base have the same singular values."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._index: dict[str, int] = {}

    def add(self, array: FloatArray) -> int:
        """The index in `texts` of `array`."""
        text = base64.b64encode(array.astype("<f4").tobytes()).decode()
        if text not in self._index:
            self._index[text] = len(self.texts)
            self.texts.append(text)
        return self._index[text]
