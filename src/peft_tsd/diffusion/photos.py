"""Photos from a folder, each a square of the resolution that is trained at."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import RecipeError, one_line

FORMATS = (".jpg", ".jpeg", ".png", ".webp")


class Photo(NamedTuple):
    """A photo as it is trained on."""

    name: str
    image: Image.Image
    """RGB, upright, a square."""
    original_size: tuple[int, int]
    """Height and width before scaling."""
    crop: tuple[int, int]
    """Top and left of the square in the scaled photo."""

    def pixels(self) -> Tensor:
        """Shape (3, side, side), from -1 to 1."""
        return torch.from_numpy(np.asarray(self.image, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)

    @property
    def time_ids(self) -> list[int]:
        """SDXL's conditioning on original size, crop and target size (Podell et al., arXiv 2307.01952)."""
        side = self.image.height
        return [*self.original_size, *self.crop, side, side]


class Photos(NamedTuple):
    """The photos of a folder, by name."""

    photos: list[Photo]
    left_out: list[str]
    """Files of the folder that are no photos."""

    @property
    def sha256(self) -> str:
        """Of all pixels: two folders with the same are the same data."""
        digest = hashlib.sha256()
        for photo in self.photos:
            digest.update(photo.image.tobytes())
        return digest.hexdigest()


def read_photos(folder: str, resolution: int, key: str) -> Photos:
    """Every photo in `folder`, scaled by its shorter side to `resolution` and cropped to its middle.

    Args:
        folder: Its .jpg, .jpeg, .png and .webp files are read, in the order of their names; nothing below it is.
        resolution: Pixels a side.
        key: The recipe's key for the folder, for error messages.

    Raises:
        RecipeError: There is no such folder, it holds no photo, or one of them cannot be read.
    """
    path = Path(folder).expanduser()
    if not path.is_dir():
        what = "is a file; give the folder it is in" if path.is_file() else "no such folder"
        raise RecipeError(f"{key}={folder!r}: {what}")
    files = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    names = [p for p in files if p.is_file() and p.suffix.lower() in FORMATS]
    left_out = [p.name + "/" * p.is_dir() for p in files if p not in names]
    if not names:
        holds = f"holds {', '.join(left_out[:5])} and no photo" if left_out else "is empty"
        raise RecipeError(f"{key}={folder!r} {holds}; put the photos there, as {', '.join(FORMATS)}")
    return Photos([_read(path, resolution, key) for path in names], left_out)


def _read(path: Path, resolution: int, key: str) -> Photo:
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened)
            # What is transparent becomes white, not whatever colour lies under it.
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("RGB")
    # Pillow raises SyntaxError for some broken files, and warns or raises of too large ones.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RecipeError(
            f"{key}: the photo {str(path)!r} cannot be read: {one_line(error)}; replace it, or take it out"
        ) from None
    return square(image, resolution, path.name)


def square(image: Image.Image, side: int, name: str = "") -> Photo:
    """The middle of `image`, `side` pixels wide and high."""
    scale = side / min(image.size)
    width, height = (max(side, round(length * scale)) for length in image.size)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    top, left = (height - side) // 2, (width - side) // 2
    return Photo(name, scaled.crop((left, top, left + side, top + side)), (image.height, image.width), (top, left))
