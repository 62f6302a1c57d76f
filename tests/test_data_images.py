"""Decoding image files: one rule for each kind of file, and errors that name the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from small_datasets import HEIGHT, WIDTH, truncate, write_image, write_voc

from ssdcore.data import open_dataset, read_rgb
from ssdcore.data.images import inspect_image


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", ".jpg"), ("CMYK", ".jpg"), ("P", ".png"), ("RGBA", ".png"), ("1", ".png")]
)
def test_images_of_every_8_bit_mode_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "JPEGImages/a.jpg").unlink()
    write_image(root / f"JPEGImages/a{suffix}", mode)
    image, _ = open_dataset(root, "train")[0]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.uint8
    assert (image[:, -1].float().mean() - image[:, 0].float().mean()) > 200  # brighter at the bottom


@pytest.mark.parametrize(("mode", "suffix"), [("I", ".tif"), ("F", ".tif")])
def test_images_of_32_bits_raise_value_error(tmp_path: Path, mode: str, suffix: str) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    (root / "JPEGImages/a.jpg").unlink()
    write_image(root / f"JPEGImages/a{suffix}", mode)
    with pytest.raises(
        ValueError, match=rf"a\{suffix}: .* mode is {mode}, expected an image with 8 bits per channel or 16"
    ):
        open_dataset(root, "train")[0]


def test_read_rgb_turns_images_upright_unless_they_have_the_given_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    path = tmp_path / "a.jpg"
    write_image(path, "L", exif=exif)
    image = read_rgb(path)
    assert image.mode == "RGB" and image.size == (HEIGHT, WIDTH)
    assert read_rgb(str(path), size=(WIDTH, HEIGHT)).size == (HEIGHT, WIDTH)
    assert read_rgb(path, size=(HEIGHT, WIDTH)).size == (WIDTH, HEIGHT)
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be read"):
        read_rgb(tmp_path / "b.jpg")


def test_exif_orientation_is_applied_only_if_the_annotated_size_requires_it(tmp_path: Path) -> None:
    root = write_voc(tmp_path, {"train": {"a": []}})
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by 90 degrees
    write_image(root / "JPEGImages/a.jpg", exif=exif)
    assert open_dataset(root, "train")[0][0].shape == (3, HEIGHT, WIDTH)
    xml = root / "Annotations/a.xml"
    xml.write_text(f"<annotation><size><width>{HEIGHT}</width><height>{WIDTH}</height></size></annotation>")
    assert open_dataset(root, "train")[0][0].shape == (3, WIDTH, HEIGHT)
    write_image(root / "JPEGImages/a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg: annotated as 30 x 40 pixels, but has 40 x 30"):
        open_dataset(root, "train")[0]


def scramble(path: Path) -> None:
    path.write_bytes(b"\0" * 500)


@pytest.mark.parametrize("damage", [truncate, scramble])
def test_damaged_images_raise_an_error_that_names_the_file(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    root = write_voc(tmp_path, {"train": {"a": [], "b": []}})
    damage(root / "JPEGImages/b.jpg")
    dataset = open_dataset(root, "train")
    dataset[0]
    with pytest.raises(ValueError, match=r"b\.jpg: cannot be read"):
        dataset[1]


@pytest.mark.parametrize(("mode", "suffix"), [("I;16", ".png"), ("I;16", ".tif"), ("I;16B", ".tif")])
def test_16_bit_greyscale_is_scaled_to_8_bits(tmp_path: Path, mode: str, suffix: str) -> None:
    values = np.array([[0, 256, 385, 386, 32768, 65535]], dtype=">u2" if mode == "I;16B" else np.uint16)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(values).save(path)
    assert Image.open(path).mode == mode
    # 385 / 257 lies below 1.5, 386 / 257 above it.
    assert np.asarray(read_rgb(path)).tolist() == [[[v] * 3 for v in (0, 1, 1, 2, 128, 255)]]
    assert inspect_image(path).mode == mode


def test_16_bit_greyscale_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8  # turned by 90 degrees to the left
    path = tmp_path / "a.png"
    Image.fromarray(np.array([[0, 25700]], dtype=np.uint16)).save(path, exif=exif)
    assert np.asarray(read_rgb(path))[..., 0].tolist() == [[100], [0]]


def test_alpha_is_dropped_and_transparent_pixels_keep_their_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (1, 1), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert read_rgb(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)


def test_inspection_tells_contents_modes_and_orientations_apart(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    write_image(tmp_path / "a.jpg", "L", exif=exif)
    write_image(tmp_path / "b.jpg", "CMYK")
    (tmp_path / "copy.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    first, other, copied = (inspect_image(tmp_path / f"{name}.jpg") for name in ("a", "b", "copy"))
    assert first == copied and first.digest != other.digest
    assert (first.mode, first.orientation, first.size) == ("L", 6, (WIDTH, HEIGHT))
    assert (other.mode, other.orientation, other.size) == ("CMYK", 1, (HEIGHT, WIDTH))
    assert inspect_image(tmp_path / "a.jpg", (HEIGHT, WIDTH)).size == (HEIGHT, WIDTH)
    with pytest.raises(ValueError, match=r"none\.jpg: cannot be read"):
        inspect_image(tmp_path / "none.jpg")
    (tmp_path / "text.jpg").write_text("text")
    with pytest.raises(ValueError, match=r"text\.jpg: cannot be read as an image: its format is unknown$"):
        inspect_image(tmp_path / "text.jpg")
