"""What is done to docstrings before they are shown: examples lose their indentation, and types their defaults."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

# An example set off by indentation, which Markdown would show as it is, fence and all.
EXAMPLE = re.compile(r"^(?P<indent> +)```py\n.*?^(?P=indent)```$", re.MULTILINE | re.DOTALL)

# PEFT's way to begin a parameter: `name (`type`, defaults to value):`. The value is shown from the signature.
PARAMETER = re.compile(
    r"^(?P<name> +\w+) \((?P<type>`[^)]*?)(?:, (?:defaults to .*?|\*optional\*))?\):(?= |$)", re.MULTILINE
)


class Docstrings(griffe.Extension):
    """Rewrites each docstring once, when its object is found."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            text = EXAMPLE.sub(lambda found: textwrap.dedent(found[0]), obj.docstring.value)
            obj.docstring.value = PARAMETER.sub(
                lambda found: f"{found['name']} ({found['type'].replace('`', '')}):", text
            )
