"""Data and scripts inside an HTML file that opens offline and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from typing import Any


def script_digest(script: str) -> str:
    """A script's source expression in a Content-Security-Policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def one_script(parts: Iterable[str]) -> str:
    """Parts of a script as one, whose names nobody else sees."""
    return "\n".join(['"use strict";', "(() => {", *parts, "})();", ""])


def script_json(data: Any) -> str:
    """`data` as JSON that can stand in a script element: only `<` could end it, and JSON knows that as \\u003c too."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
