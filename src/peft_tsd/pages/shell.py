"""A page as one HTML file that opens offline: the head and the style that all pages share, around what is its own."""

from __future__ import annotations

import html
from collections.abc import Sequence
from importlib.resources import files
from string import Template
from typing import Any

from .embedding import script_digest, script_json


def assemble(*, title: str, style: str, body: str, data: Any = None, scripts: Sequence[str] = ()) -> str:
    """The text of the file.

    Its Content-Security-Policy allows the scripts it holds, by their digests, images inside the file, and nothing
    else: no connection, no form, no script that a name of the user's could smuggle in.

    Args:
        title: Plain text.
        style: The page's own CSS, after the common one.
        body: HTML; what is not the page's own is escaped in it.
        data: What the scripts read, as JSON in the element `data`.
        scripts: JavaScript, each with those before it. A page without any allows none.
    """
    here = files("peft_tsd.pages")
    policy, elements = ["default-src 'none'"], []
    if scripts:
        policy.append(f"script-src {' '.join(map(script_digest, scripts))}")
        elements.append(f'<script type="application/json" id="data">{script_json(data)}</script>\n')
        elements += [f"<script>{script}</script>\n" for script in scripts]
    images = "img-src data: blob:" if scripts else "img-src data:"  # a script's figures are saved as blobs
    policy += ["style-src 'unsafe-inline'", images, "base-uri 'none'", "form-action 'none'"]
    return Template((here / "shell.html").read_text("utf-8")).substitute(
        policy="; ".join(policy),
        title=html.escape(title),
        style=(here / "base.css").read_text("utf-8") + style,
        body=body,
        scripts="".join(elements),
    )
