"""Configurations of models that come with the package: their architecture's public numbers alone, in
`recipes/configs`, each with the `model.name` it stands for.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

from ..errors import InputError


def packaged_config(model: str, *, denoiser: bool = False) -> dict[str, Any]:
    """The configuration of a recipe's model that comes with the package: of a language model, or of a denoiser.

    Raises:
        InputError: There is none.
    """
    known = []
    for path in sorted((files("peft_tsd") / "recipes" / "configs").iterdir(), key=lambda path: path.name):
        content = json.loads(path.read_text(encoding="utf-8"))
        if ("class" in content) != denoiser:
            continue
        if content["model"] == model:
            return dict(content)
        known.append(content["model"])
    raise InputError(f"model.name={model!r}: the package has the configurations of {', '.join(known)} alone")
