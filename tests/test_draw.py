"""Boxes and captions are drawn at the right positions and inside the image."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ssdcore.draw import contact_sheet, draw_detections

CLASSES = ("cat", "dog")


def draw(boxes: Any, labels: Any, scores: Tensor | None = None, size: tuple[int, int] = (200, 150)) -> np.ndarray:
    picture = draw_detections(
        Image.new("RGB", size), torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels), scores, CLASSES
    )
    assert picture.mode == "RGB" and picture.size == size
    return np.asarray(picture).astype(int)


def extent(pixels: np.ndarray) -> list[int]:
    """The box around all pixels that are not black, xyxy."""
    y, x = np.nonzero(pixels.any(axis=-1))
    return [x.min(), y.min(), x.max(), y.max()]


def test_box_and_caption_are_drawn() -> None:
    pixels = draw([[50.0, 60, 120, 110]], [1])
    x1, y1, x2, y2 = extent(pixels)
    assert (x1, x2, y2) == (50, 120, 110)
    assert 40 <= y1 <= 50  # the caption is on top of the box
    assert not pixels[70:100, 60:110].any()  # the inside of the box is unchanged


@pytest.mark.parametrize(
    "box",
    [
        [0.0, 0.0, 60.0, 50.0],  # no space above
        [190.0, 100.0, 199.0, 120.0],  # no space to the right
        [150.0, 140.0, 199.0, 149.0],
        [-30.0, -30.0, 250.0, 200.0],  # extends beyond the image
        [60.0, 50.0, 20.0, 10.0],  # corners swapped
        [300.0, 300.0, 400.0, 400.0],  # outside the image
    ],
)
def test_caption_stays_inside_the_image(box: list[float]) -> None:
    """A caption shows as many text pixels as one in the middle of the image, so that nothing of it is cut off."""
    assert text_pixels(box) == text_pixels([60.0, 60, 120, 110]) > 50


def text_pixels(box: list[float]) -> int:
    """The number of pixels that have neither the background's colour nor the class's colour."""
    grey = Image.new("RGB", (200, 150), (90, 90, 90))
    picture = draw_detections(grey, torch.tensor([box]), torch.tensor([1]), torch.tensor([0.87]), CLASSES)
    counts = picture.getcolors(maxcolors=2**16)
    assert counts is not None
    colour = max((count, value) for count, value in counts if value != (90, 90, 90))[1]
    return sum(count for count, value in counts if value not in ((90, 90, 90), colour))


def test_classes_have_different_colours_and_scores_are_shown() -> None:
    box = [[50.0, 60, 120, 110]]
    cat, dog = draw(box, [1]), draw(box, [2])
    assert np.abs(cat[110, 80] - dog[110, 80]).max() > 50
    plain, scored = draw(box, [1]), draw(box, [1], torch.tensor([0.5]))
    assert scored[:60].any(axis=-1).sum() > plain[:60].any(axis=-1).sum()


def test_the_highest_score_is_drawn_on_top() -> None:
    boxes = [[50.0, 60, 120, 110]] * 2
    best_cat = draw(boxes, [1, 2], torch.tensor([0.9, 0.1]))
    assert (best_cat[110, 80] == draw(boxes[:1], [1])[110, 80]).all()
    best_dog = draw(boxes, [1, 2], torch.tensor([0.1, 0.9]))
    assert (best_dog[110, 80] == draw(boxes[:1], [2])[110, 80]).all()


def test_line_width_grows_with_the_image() -> None:
    def thickness(size: int) -> int:
        pixels = draw([[0.3 * size, 0.3 * size, 0.8 * size, 0.8 * size]], [1], size=(size, size))
        return int((pixels[size // 2 :, size // 2].sum(axis=-1) > 0).sum())

    assert [thickness(size) for size in (100, 300, 1000)] == [1, 1, 4]


def test_inputs_are_not_modified() -> None:
    tensor = torch.full((3, 40, 60), 7, dtype=torch.uint8)
    picture = draw_detections(tensor, torch.tensor([[5.0, 20, 30, 30]]), torch.tensor([1]), None, CLASSES)
    assert picture.size == (60, 40) and picture.getpixel((59, 39)) == (7, 7, 7)
    assert (tensor == 7).all()
    original = Image.new("RGB", (60, 40))
    draw_detections(original, torch.tensor([[5.0, 20, 30, 30]]), torch.tensor([1]), None, CLASSES)
    assert original.getbbox() is None
    grey = draw_detections(Image.new("L", (9, 9), 5), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), CLASSES)
    assert grey.mode == "RGB" and grey.getpixel((0, 0)) == (5, 5, 5)


def test_invalid_arguments_raise_value_error() -> None:
    box = torch.zeros(1, 4)
    with pytest.raises(ValueError, match=r"the same length, got \[1, 2, 1\]"):
        draw_detections(Image.new("RGB", (9, 9)), box, torch.tensor([1, 1]), None, CLASSES)
    for label in (0, 3):
        with pytest.raises(ValueError, match=r"labels must be in 1\.\.2"):
            draw_detections(Image.new("RGB", (9, 9)), box, torch.tensor([label]), None, CLASSES)
    with pytest.raises(ValueError, match="at least 1 image and 1 column"):
        contact_sheet([], 2)


def test_contact_sheet_arranges_images_line_by_line() -> None:
    colours = ("red", "lime", "blue")
    images = [Image.new("RGB", size, c) for size, c in zip(((30, 20), (10, 40), (20, 20)), colours, strict=True)]
    sheet = contact_sheet(images, columns=2)
    assert sheet.size == (2 * 30 + 3 * 4, 2 * 40 + 3 * 4)
    assert sheet.getpixel((4, 4)) == (255, 0, 0)
    assert sheet.getpixel((4 + 30 + 4, 4)) == (0, 255, 0)
    assert sheet.getpixel((4, 4 + 40 + 4)) == (0, 0, 255)
    assert sheet.getpixel((0, 0)) == sheet.getpixel((70, 90)) == (255, 255, 255)
    assert contact_sheet(images[:1], columns=5).size == (38, 28)
