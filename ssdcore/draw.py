"""Pictures of detections."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

__all__ = ["contact_sheet", "draw_detections"]

GOLDEN_RATIO = 0.618034  # of the hue circle: neighbours in the class list get far colours
DARK_TEXT_ABOVE = 140  # luminance of 255, from which black reads better than white
PADDING = 2  # pixels around a label's letters
GAP = 4  # pixels between the pictures of a contact sheet

Colour = tuple[int, int, int]


def draw_detections(
    image: Image.Image | Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    classes: Sequence[str],
) -> Image.Image:
    """Draw boxes with their class names, and scores where given, on a copy of an image.

    Each class has a colour of its own. Lines and letters grow with the image. A label stands on
    its box, but is moved into the image where it would leave it.

    Args:
        image: a PIL image, or uint8 [3, H, W].
        boxes: [K, 4] xyxy in pixels of the image.
        labels: [K]; label k is named `classes[k - 1]`.
        scores: [K] or None. The best are drawn last, on top.
        classes: class names, without the background.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: boxes, labels and scores differ in number, or a label is outside 1..len(classes).
    """
    counts = [len(boxes), len(labels), len(boxes if scores is None else scores)]
    if len(set(counts)) != 1:
        raise ValueError(f"boxes, labels and scores must be equally many, got {counts}")
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= len(classes):
        raise ValueError(f"labels must be in 1..{len(classes)}, got {labels.tolist()}")

    picture = (F.to_pil_image(image) if isinstance(image, Tensor) else image).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    line_width = max(1, round(max(picture.size) / 250))
    font = ImageFont.load_default(size=max(10, round(max(picture.size) / 40)))
    drawn = []
    for k in range(len(boxes)) if scores is None else scores.argsort().tolist():
        label = int(labels[k])
        text = classes[label - 1] if scores is None else f"{classes[label - 1]} {float(scores[k]):.2f}"
        corners = _corners(boxes[k].tolist(), picture.size)
        canvas.rectangle(corners, outline=_class_colour(label), width=line_width)
        drawn.append((corners, text, _class_colour(label)))
    # After all boxes, so that no line runs through a name.
    for (x1, y1, _, _), text, colour in drawn:
        _draw_label(canvas, picture.size, x1, y1, text, colour, font)
    return picture


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Lay pictures out row by row on white, in cells as large as the largest.

    Raises:
        ValueError: no images, or columns < 1.
    """
    if not images or columns < 1:
        raise ValueError(f"at least 1 image and 1 column are needed, got {len(images)} and {columns}")
    columns = min(columns, len(images))
    width = GAP + max(image.width for image in images)
    height = GAP + max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width + GAP, math.ceil(len(images) / columns) * height + GAP), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        sheet.paste(image, (GAP + column * width, GAP + row * height))
    return sheet


def _class_colour(label: int) -> Colour:
    hue = label * GOLDEN_RATIO % 1
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 0.95))
    return red, green, blue


def _corners(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box clipped to the image, its corners in order: Pillow refuses others, and a model may give them."""
    x1, x2 = sorted(min(max(x, 0), size[0] - 1) for x in box[::2])
    y1, y2 = sorted(min(max(y, 0), size[1] - 1) for y in box[1::2])
    return x1, y1, x2, y2


def _draw_label(
    canvas: ImageDraw.ImageDraw,
    size: tuple[int, int],
    x1: float,
    y1: float,
    text: str,
    colour: Colour,
    font: Any,
) -> None:
    left, top, right, bottom = canvas.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * PADDING, bottom - top + 2 * PADDING
    x = max(0, min(x1, size[0] - width))
    y = max(0, y1 - height)
    canvas.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    text_colour = "black" if luminance > DARK_TEXT_ABOVE else "white"
    canvas.text((x + PADDING - left, y + PADDING - top), text, fill=text_colour, font=font)
