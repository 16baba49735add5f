"""Photos come out upright, square and in order, whatever they were."""

import numpy as np
import pytest
from PIL import Image

from peft_tsd.diffusion.photos import read_photos, square
from peft_tsd.errors import RecipeError


def corners(image: Image.Image) -> Image.Image:
    """The four quarters in four colours: red, green / blue, white."""
    width, height = image.size
    for i, colour in enumerate([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)]):
        image.paste(colour, (width // 2 * (i % 2), height // 2 * (i // 2), width, height))
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """A camera that was held in any of eight ways gives the same picture."""
    upright = corners(Image.new("RGB", (60, 40)))
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for turn in undo.get(orientation, []):
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    [photo] = read_photos(str(tmp_path), 20, "data.folder").photos
    assert photo.original_size == (40, 60)
    pixels = np.asarray(photo.image)
    for place, colour in (((3, 3), (255, 0, 0)), ((3, 16), (0, 255, 0)), ((16, 3), (0, 0, 255))):
        assert np.abs(pixels[place].astype(int) - colour).max() < 16


def test_sizes_formats_and_what_is_left_out(tmp_path):
    for name, size in (("b.JPG", (100, 50)), ("a.webp", (30, 90)), ("c.png", (8, 8)), ("d.jpeg", (20, 20))):
        Image.new("RGB", size, (10, 200, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("-")
    (tmp_path / "clip.gif").write_bytes(b"GIF89a")
    (tmp_path / ".DS_Store").write_bytes(b"-")
    (tmp_path / "raw").mkdir()
    found = read_photos(str(tmp_path), 16, "data.folder")
    assert [photo.name for photo in found.photos] == ["a.webp", "b.JPG", "c.png", "d.jpeg"]
    assert found.left_out == ["clip.gif", "notes.txt", "raw/"]
    for photo in found.photos:
        assert photo.image.size == (16, 16)
        assert photo.image.mode == "RGB"
        pixels = photo.pixels()
        assert pixels.shape == (3, 16, 16)
        assert abs(float(pixels[1].mean()) - (200 / 127.5 - 1)) < 0.05
    wide, tall = found.photos[1], found.photos[0]
    assert (wide.original_size, wide.crop) == ((50, 100), (0, 8))
    assert (tall.original_size, tall.crop) == ((90, 30), (16, 0))
    assert wide.time_ids == [50, 100, 0, 8, 16, 16]


def test_transparency_grey_and_palettes(tmp_path):
    Image.new("RGBA", (10, 10), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (10, 10), 77).save(tmp_path / "grey.png")
    Image.new("P", (10, 10), 0).save(tmp_path / "palette.png")
    clear, grey, palette = (np.asarray(p.image) for p in read_photos(str(tmp_path), 8, "data.folder").photos)
    assert (clear == 255).all()
    assert (grey == 77).all()
    assert palette.shape == (8, 8, 3)


def test_the_middle_is_kept():
    image = Image.new("RGB", (90, 30))
    image.paste((255, 255, 255), (30, 0, 60, 30))
    photo = square(image, 30)
    assert np.asarray(photo.image).min() == 255
    assert photo.crop == (0, 30)


def test_the_digest_is_of_the_pixels(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / name / f"{name}.png")
    one, other = (read_photos(str(tmp_path / name), 8, "k").sha256 for name in ("one", "other"))
    assert one == other
    Image.new("RGB", (8, 8), (1, 2, 4)).save(tmp_path / "other" / "other.png")
    assert read_photos(str(tmp_path / "other"), 8, "k").sha256 != one


@pytest.mark.parametrize("cut", [0, 30, 200])
def test_broken_photos_are_named(tmp_path, cut):
    path = tmp_path / "a.jpg"
    Image.effect_noise((40, 40), 90).save(path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        RecipeError, match=r"data.folder: the photo '.*a.jpg' cannot be read: .*; replace it"
    ) as caught:
        read_photos(str(tmp_path), 8, "data.folder")
    assert "\n" not in str(caught.value)
