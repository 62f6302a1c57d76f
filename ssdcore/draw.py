"""Draw detected or annotated objects on images."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F

__all__ = ["contact_sheet", "draw_detections"]

GOLDEN_RATIO = 0.618034  # step between the hues of two labels, as a fraction of the hue circle; keeps hues far apart
DARK_TEXT_ABOVE = 140  # luminance in 0..255; on a brighter colour, black text is easier to read than white
PADDING = 2  # pixels between the text of a caption and its edge
GAP = 4  # pixels between two pictures of a contact sheet

Colour = tuple[int, int, int]


def draw_detections(
    image: Image.Image | Tensor,
    boxes: Tensor,
    labels: Tensor,
    scores: Tensor | None,
    classes: Sequence[str],
) -> Image.Image:
    """Draw boxes with captions on a copy of an image. A caption is the class name, followed by the score if given.

    Every class has its own colour. Line width and text size grow with the image. A caption is placed on top of its box,
    and is moved into the image where it would extend beyond it.

    Args:
        image: a PIL image, or uint8 [3, H, W].
        boxes: [K, 4] xyxy in pixels of the image.
        labels: integers [K]; the name of label k is `classes[k - 1]`.
        scores: [K], or None. The objects with the highest scores are drawn last, on top of the others.
        classes: class names, without the background.

    Returns:
        An RGB image of the same size.

    Raises:
        ValueError: the numbers of boxes, labels and scores differ, or a label is outside 1..len(classes).
    """
    counts = [len(boxes), len(labels), len(boxes if scores is None else scores)]
    if len(set(counts)) != 1:
        raise ValueError(f"boxes, labels and scores must have the same length, got {counts}")
    if len(labels) and not 1 <= int(labels.min()) <= int(labels.max()) <= len(classes):
        raise ValueError(f"labels must be in 1..{len(classes)}, got {labels.tolist()}")

    picture = (F.to_pil_image(image) if isinstance(image, Tensor) else image).convert("RGB")
    canvas = ImageDraw.Draw(picture)
    line_width = max(1, round(max(picture.size) / 250))
    font = ImageFont.load_default(size=max(10, round(max(picture.size) / 40)))
    captions = []
    for k in range(len(boxes)) if scores is None else scores.argsort().tolist():
        label = int(labels[k])
        text = classes[label - 1] if scores is None else f"{classes[label - 1]} {float(scores[k]):.2f}"
        corners = _corners(boxes[k].tolist(), picture.size)
        canvas.rectangle(corners, outline=_class_colour(label), width=line_width)
        captions.append((corners, text, _class_colour(label)))
    # Captions are drawn after all boxes, so that no line crosses a text.
    for (x1, y1, _, _), text, colour in captions:
        _draw_caption(canvas, picture.size, x1, y1, text, colour, font)
    return picture


def contact_sheet(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Arrange images from left to right and top to bottom on a white picture, spaced by the size of the largest.

    Args:
        images: at least one image, of any sizes.
        columns: images per line, at least 1.

    Raises:
        ValueError: there is no image, or `columns` is less than 1.
    """
    if not images or columns < 1:
        raise ValueError(f"contact_sheet needs at least 1 image and 1 column, got {len(images)} and {columns}")
    columns = min(columns, len(images))
    width = GAP + max(image.width for image in images)
    height = GAP + max(image.height for image in images)
    sheet = Image.new("RGB", (columns * width + GAP, math.ceil(len(images) / columns) * height + GAP), "white")
    for index, image in enumerate(images):
        line, column = divmod(index, columns)
        sheet.paste(image, (GAP + column * width, GAP + line * height))
    return sheet


def _class_colour(label: int) -> Colour:
    hue = label * GOLDEN_RATIO % 1
    red, green, blue = (round(255 * value) for value in colorsys.hsv_to_rgb(hue, 0.85, 0.95))
    return red, green, blue


def _corners(box: list[float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box clipped to the image, with x1 <= x2 and y1 <= y2.

    Pillow raises an error for other boxes, and a model may predict them.
    """
    x1, x2 = sorted(min(max(x, 0), size[0] - 1) for x in box[::2])
    y1, y2 = sorted(min(max(y, 0), size[1] - 1) for y in box[1::2])
    return x1, y1, x2, y2


def _draw_caption(
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
