"""Folders that are there as a whole, or not at all."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Make the folder `path`, which must not exist, with what `fill` writes into the folder it is given.

    Raises:
        OSError: It cannot be written; or whatever `fill` raises. Nothing is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", suffix=".part", dir=path.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)  # mkdtemp's folder is for its owner's eyes only
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_names(path: Path) -> str:
    """What `write_folder(path, ...)` calls the folder that it fills, as a pattern for the one `path` lies in."""
    return f".{path.name}-*.part"


def sha256(path: Path) -> str:
    """The SHA-256 sum of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
