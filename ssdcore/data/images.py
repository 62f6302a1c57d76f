"""Decode image files to 8-bit RGB, one rule for each kind of file.

| file | rule |
|---|---|
| 8 bits: greyscale, palette, CMYK, YCbCr | converted by Pillow; the three channels of a greyscale image are equal |
| 16-bit greyscale | divided by 257, so that 0..65535 becomes 0..255, whatever range the image uses |
| 16-bit colour | Pillow keeps the upper 8 bits |
| alpha | dropped; transparent pixels keep the colour that is stored for them |
| 32-bit integers or floats | an error, because the range of their values is unknown |
| EXIF orientation | turned upright, unless the caller knows that the stored size is the annotated one |
| truncated, damaged or missing | an error that names the file |
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}

ORIENTATION_TAG = 0x0112  # of EXIF; 1 is upright
SWAPS_SIDES = {5, 6, 7, 8}  # orientations that exchange width and height


class Inspection(NamedTuple):
    """What `inspect_image` found in one file."""

    digest: str  # of the file's bytes; equal for identical files
    mode: str  # Pillow's, such as "RGB" or "L"
    orientation: int  # EXIF; 1 is upright
    size: tuple[int, int]  # (height, width) in pixels, as `read_rgb` gives it


def read_rgb(path: str | Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Read an image file as 8-bit RGB, turned upright as its EXIF orientation says.

    16-bit greyscale is scaled from 0..65535 to 0..255, also if the image uses a part of this range. Alpha is dropped.

    Args:
        path: the file, in any mode with at most 8 bits per channel, or with 16 bits of grey.
        size: (height, width) in pixels. A file whose stored size equals `size` is not turned.

    Raises:
        ValueError: the file cannot be read, or holds 32-bit integers or floats. The message names the file.
    """
    try:
        with Image.open(path) as file:
            return _to_rgb(file, size)
    except Exception as error:  # Pillow's decoders raise many types of exception
        raise ValueError(_cannot_be_read(path, error)) from error


def images_in(folder: Path, pattern: str = "*") -> list[Path]:
    """Return the image files that match a glob pattern in a folder, sorted.

    Hidden files and what lies in hidden folders are left out, because notebooks and macOS put copies there.
    """
    files = (path for path in folder.glob(pattern) if path.suffix.lower() in IMAGE_SUFFIXES)
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def size_in_header(path: Path, upright: bool = False) -> tuple[int, int]:
    """Return (height, width) of an image file in pixels, as stored or turned `upright`. Decodes no format but TIFF.

    Raises:
        ValueError: the header, or a TIFF, cannot be read. The message names the file.
    """
    try:
        with Image.open(path) as file:
            if upright and file.format == "TIFF":
                # Pillow exchanges the sides of a TIFF when it opens it, but removes the orientation when it loads it.
                file.load()
            turned = upright and file.getexif().get(ORIENTATION_TAG, 1) in SWAPS_SIDES
            return (file.width, file.height) if turned else (file.height, file.width)
    except Exception as error:  # Pillow's decoders raise many types of exception
        raise ValueError(_cannot_be_read(path, error)) from error


def inspect_image(path: Path, size: tuple[int, int] | None = None) -> Inspection:
    """Decode an image file as `read_rgb` does, and return what is known about it.

    Raises:
        ValueError: as in `read_rgb`.
    """
    try:
        content = path.read_bytes()
        with Image.open(io.BytesIO(content)) as file:
            mode, orientation = file.mode, file.getexif().get(ORIENTATION_TAG, 1)
            image = _to_rgb(file, size)
    except Exception as error:  # Pillow's decoders raise many types of exception
        raise ValueError(_cannot_be_read(path, error)) from error
    return Inspection(hashlib.sha256(content).hexdigest(), mode, orientation, (image.height, image.width))


def _to_rgb(file: Image.Image, size: tuple[int, int] | None) -> Image.Image:
    file.load()  # for some formats, Pillow already applies the orientation here
    image = file if size == (file.height, file.width) else ImageOps.exif_transpose(file)
    if image.mode.startswith("I;16"):
        # 65535 / 257 = 255. Pillow itself would clip the values at 255, so that most images would become white.
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"its mode is {image.mode}, expected an image with 8 bits per channel or 16 bits of grey")
    return image.convert("RGB")


def _cannot_be_read(path: str | Path, error: Exception) -> str:
    # Pillow's own message would name the memory address of the bytes.
    reason = "its format is unknown" if isinstance(error, UnidentifiedImageError) else error
    return f"{path}: cannot be read as an image: {reason}"
