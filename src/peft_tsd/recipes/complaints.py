"""What is wrong with a recipe, in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel

from ..errors import did_you_mean


def explain(error: Any, schema: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in error["loc"])
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        section = _section_at(schema, error["loc"][:-1])
        prefix = "".join(f"{part}." for part in error["loc"][:-1])
        known = section.model_fields if section else ()
        return f"unknown key {path!r}{did_you_mean(str(error['loc'][-1]), known, prefix=prefix)}"
    if error["type"] == "missing":
        return f"{path!r} is missing; add it to the recipe, or give {path}=VALUE"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    expected = error["msg"].replace("Input should be ", "expected ")
    nearest = ""
    if error["type"] == "literal_error":
        nearest = did_you_mean(str(given), re.findall(r"'([^']+)'", error["msg"]), listing=False)
    return f"{path}={_short(given)} ({type(given).__name__}): {expected}{nearest}"


def _section_at(section: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel] | None:
    for part in loc:
        field = section.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return None
        section = field.annotation
    return section


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
