"""What is written whole or not at all: under a temporary name first, renamed when it is complete."""

from __future__ import annotations

import hashlib
import os
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
        # mkdtemp's folder, and safetensors' files, are for their owner's eyes only.
        for place in [temporary, *temporary.rglob("*")]:
            give_usual_mode(place)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def give_usual_mode(path: Path) -> None:
    """Give a file or folder the mode that a new one has in this process."""
    mask = os.umask(0o077)  # which cannot be asked for without setting it
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


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


def write_file(path: Path, save: Callable[[Path], object]) -> None:
    """Replace the file `path`, at once, by the one that `save` writes where it is told to.

    Raises:
        OSError: It cannot be written; or whatever `save` raises. The file is as it was before then.
    """
    temporary = path.with_name(f".part-{path.name}")  # the ending tells some writers the format
    try:
        save(temporary)
        give_usual_mode(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # so that a power cut leaves the old file or the new one
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file, at once, by one with `text`."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
