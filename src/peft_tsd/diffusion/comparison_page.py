"""The comparison as one HTML file: no script, no network, every image inside it.

Prompts, labels and model names are the user's: they are escaped wherever they stand.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from PIL import Image

from ..pages.shell import assemble
from .similarity import DEFINITIONS
from .subjects import Cell, Column, Subject

SHOWN_SIDE = 384
"""Most pixels a side of an image in the page; the whole ones lie beside it."""


def render(subjects: Sequence[Subject], missing: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """The page.

    Args:
        subjects: What was drawn, at least one.
        missing: Why a similarity was not measured, by its name.
        settings: How images were drawn.
    """
    page = files("peft_tsd.diffusion") / "page"
    methods = list(dict.fromkeys(column.label for subject in subjects for column in subject.columns))
    body = Template((page / "page.html").read_text("utf-8")).substitute(
        heading=escape(", ".join(subject.words for subject in subjects)),
        settings=escape(", ".join(f"{name} {value}" for name, value in settings.items())),
        subjects="\n".join(_subject(subject) for subject in subjects),
        overall=_overall(subjects),
        definitions="\n".join(_definition(name, missing) for name in DEFINITIONS),
    )
    title = f"{', '.join(subject.words for subject in subjects)}: {', '.join(methods)}"
    return assemble(title=title, style=(page / "page.css").read_text("utf-8"), body=body)


def _subject(subject: Subject) -> str:
    photos = "".join(_image(photo, f"reference photo {i}") for i, photo in enumerate(subject.photos, 1))
    heads = "".join(f'<th scope="col">{_head(column)}</th>' for column in subject.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(prompt)}</th>'
        + "".join(f"<td>{_cell(c.cells[i], f'{c.label}: {prompt}', _best(subject, i))}</td>" for c in subject.columns)
        + "</tr>"
        for i, prompt in enumerate(subject.prompts)
    )
    means = "".join(f"<td>{_numbers(column.scores, _best(subject, None))}</td>" for column in subject.columns)
    foot = (
        f'<tfoot><tr><th scope="row">mean over prompts</th>{means}</tr></tfoot>' if subject.columns[0].scores else ""
    )
    return f"""<section>
<h2>{escape(subject.words)}</h2>
<p class="soft">trained as “{escape(subject.prompt)}” on {escape(subject.model)}</p>
<h3>{len(subject.photos)} reference photos</h3>
<div class="photos">{photos}</div>
<div class="scroll" tabindex="0" role="region" aria-label="images by prompt and method">
<table>
<thead><tr><th scope="col">prompt</th>{heads}</tr></thead>
<tbody>
{rows}
</tbody>
{foot}
</table>
</div>
</section>"""


def _head(column: Column) -> str:
    told = ", ".join(
        f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.3g}" if isinstance(value, float) else ""
        for name, value in column.settings.items()
        if not isinstance(value, str)
    )
    return f"{escape(column.label)}<small>{escape(told)}</small>"


def _cell(cell: Cell, title: str, best: Mapping[str, float]) -> str:
    images = "".join(_image(image, f"{title}, image {i}") for i, image in enumerate(cell.images, 1))
    return f'<div class="images">{images}</div>{_numbers(cell.scores, best)}'


def _best(subject: Subject, row: int | None) -> dict[str, float]:
    """The highest of each similarity among the methods, for one prompt or (None) for the means, as it is printed."""
    found = [column.scores if row is None else column.cells[row].scores for column in subject.columns]
    return _highest(found)


def _highest(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    # Of what is printed: a difference nobody sees is none.
    return {name: round(max(scores[name] for scores in found), 3) for name in found[0]} if len(found) > 1 else {}


def _overall(subjects: Sequence[Subject]) -> str:
    """The means over subjects of the methods that all of them have."""
    by_label = {
        column.label: [one.scores for s in subjects for one in s.columns if one.label == column.label]
        for column in subjects[0].columns
    }
    means = {
        label: {name: sum(scores[name] for scores in found) / len(found) for name in found[0]}
        for label, found in by_label.items()
        if len(found) == len(subjects)
    }
    if len(subjects) < 2 or not any(means.values()):
        return ""
    best = _highest(list(means.values()))
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td>{_numbers(scores, best)}</td></tr>'
        for label, scores in means.items()
    )
    return f"<section><h2>Mean over {len(subjects)} subjects</h2><table><tbody>{rows}</tbody></table></section>"


def _numbers(scores: Mapping[str, float], best: Mapping[str, float]) -> str:
    if not scores:
        return ""
    listed = "".join(
        f"<div><dt>{name}</dt><dd{_mark(round(scores[name], 3) == best.get(name))}>{scores[name]:.3f}</dd></div>"
        for name in scores
    )
    return f"<dl>{listed}</dl>"


def _mark(highest: bool) -> str:
    return ' class="best"' if highest else ""


def _definition(name: str, missing: Mapping[str, str]) -> str:
    note = f" <em>Not measured: {escape(missing[name])}.</em>" if name in missing else ""
    return f"<div><dt>{name}</dt><dd>{escape(DEFINITIONS[name])}.{note}</dd></div>"


def _image(image: Image.Image, description: str) -> str:
    small = image.convert("RGB")
    small.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    data = io.BytesIO()
    small.save(data, "WEBP", quality=88)
    text = base64.b64encode(data.getvalue()).decode("ascii")
    size = f'width="{small.width}" height="{small.height}"'
    return f'<img src="data:image/webp;base64,{text}" {size} alt="{escape(description)}">'
