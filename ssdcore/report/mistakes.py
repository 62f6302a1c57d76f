"""The worst mistakes of a model: objects that it missed, and false alarms, each with a pair of pictures."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ssdcore.data import DetectionDataset
from ssdcore.draw import draw_detections
from ssdcore.report.matches import FALSE_POSITIVE, MIN_IOU, NEVER, NO_ROW, Matches, overlaps

NEARBY_IOU = 0.1  # below it, a box has too little in common with an object to be a bad box of it
CONTEXT = 3.0  # side of a picture, in sides of the object
MIN_CONTEXT = 0.25  # side of a picture, in the longer side of the image
PICTURE_SIDE = 340  # pixels of the longer side; about what a phone shows
JPEG_QUALITY = 80


@dataclass(frozen=True)
class Mistake:
    """An object that was missed, or a false alarm."""

    image: int  # index in the dataset
    box: np.ndarray  # fp64 [4] xyxy
    label: int
    score: float | None  # of a false alarm
    text: str  # what went wrong


def worst_misses(matches: Matches, classes: tuple[str, ...], threshold: float, most: int) -> list[Mistake]:
    """The annotated objects without a match above a score threshold.

    The worst are those that were found with the lowest score or not at all, and among these the largest.
    """
    missed = np.flatnonzero(~matches.gt_ignore & (matches.gt_scores <= threshold))
    sizes = matches.gt_boxes[missed, 2:] - matches.gt_boxes[missed, :2]
    order = missed[np.lexsort((-sizes.prod(axis=1), matches.gt_scores[missed]))]
    return [
        Mistake(
            int(matches.gt_images[row]),
            matches.gt_boxes[row],
            int(matches.gt_labels[row]),
            None,
            _what_was_found(matches, classes, threshold, row),
        )
        for row in order[:most]
    ]


def worst_false_alarms(matches: Matches, classes: tuple[str, ...], threshold: float, most: int) -> list[Mistake]:
    """The detected objects above a score threshold without a match. The worst are those with the highest scores."""
    wrong = np.flatnonzero((matches.outcomes == FALSE_POSITIVE) & (matches.scores > threshold))
    order = wrong[np.argsort(-matches.scores[wrong], kind="stable")]
    return [
        Mistake(
            int(matches.images[row]),
            matches.boxes[row],
            int(matches.labels[row]),
            float(matches.scores[row]),
            _what_is_there(matches, classes, row),
        )
        for row in order[:most]
    ]


def _what_was_found(matches: Matches, classes: tuple[str, ...], threshold: float, gt_row: int) -> str:
    if matches.gt_scores[gt_row] != NEVER:
        return f"found with a score of {matches.gt_scores[gt_row]:.2f} only"
    detected = np.flatnonzero((matches.images == matches.gt_images[gt_row]) & (matches.scores > threshold))
    iou = overlaps(matches, detected, np.array([gt_row]))[:, 0]
    if iou.max(initial=0.0) < NEARBY_IOU:
        return "not found, and no box is near"
    nearest = detected[iou.argmax()]
    name = classes[matches.labels[nearest] - 1]
    owner = "" if matches.gt_rows[nearest] == NO_ROW else ", which matches another object"
    return f"not found; the nearest box is {name} {matches.scores[nearest]:.2f} with an IoU of {iou.max():.2f}{owner}"


def _what_is_there(matches: Matches, classes: tuple[str, ...], row: int) -> str:
    annotated = np.flatnonzero(matches.gt_images == matches.images[row])
    iou = overlaps(matches, np.array([row]), annotated)[0]
    same_class = matches.gt_labels[annotated] == matches.labels[row]
    best_of_class = float(iou[same_class].max(initial=0.0))
    if best_of_class >= MIN_IOU:
        return "an object that another box was matched with"
    if len(iou) and iou.max() >= MIN_IOU:
        return f"annotated as {classes[matches.gt_labels[annotated[iou.argmax()]] - 1]}"
    if best_of_class >= NEARBY_IOU:
        return f"a box that is off, with an IoU of {best_of_class:.2f}"
    return "nothing of this class is annotated here"


def pictures(dataset: DetectionDataset, matches: Matches, mistake: Mistake, threshold: float) -> tuple[str, str] | None:
    """The surroundings of a mistake as two data URIs: with the annotated objects, and with the detected ones.

    The second shows those above the score threshold. A white line marks the mistake in both. None if the image cannot
    be read.
    """
    transform, dataset.transform = dataset.transform, None
    try:
        image, target = dataset[mistake.image]
    except ValueError:
        return None
    finally:
        dataset.transform = transform
    if target["image_id"] != int(dataset.image_ids[mistake.image]):
        return None  # a dataset may give the next image in place of one that cannot be read
    x1, y1, x2, y2 = _window(mistake.box, F.get_size(image)[::-1])
    scale = PICTURE_SIDE / max(x2 - x1, y2 - y1)
    size = [max(1, round(scale * (y2 - y1))), max(1, round(scale * (x2 - x1)))]
    background = F.to_pil_image(F.resized_crop(image, y1, x1, y2 - y1, x2 - x1, size, antialias=True))
    # The mark is drawn first, so that it covers no box and no caption.
    _mark(background, (mistake.box - (x1, y1, x1, y1)) * scale)

    def draw(boxes: np.ndarray, labels: np.ndarray, scores: Tensor | None) -> str:
        origin = np.array([x1, y1, x1, y1])
        inside = ((boxes[:, :2] < (x2, y2)) & (boxes[:, 2:] > (x1, y1))).all(axis=1)
        picture = draw_detections(
            background,
            torch.from_numpy((boxes[inside] - origin) * scale),
            torch.from_numpy(labels[inside]),
            None if scores is None else scores[torch.from_numpy(inside)],
            dataset.classes,
        )
        return _data_uri(picture)

    annotated = matches.gt_images == mistake.image
    detected = (matches.images == mistake.image) & (matches.scores > threshold)
    return (
        draw(matches.gt_boxes[annotated], matches.gt_labels[annotated], None),
        draw(matches.boxes[detected], matches.labels[detected], torch.from_numpy(matches.scores[detected])),
    )


def _window(box: np.ndarray, size: list[int]) -> tuple[int, int, int, int]:
    """The part of an image of `size` (width, height) to show: a square around the box, moved into the image."""
    centre, side = (box[:2] + box[2:]) / 2, float((box[2:] - box[:2]).max())
    side = max(CONTEXT * side, MIN_CONTEXT * max(size))
    low, high = [], []
    for c, s in zip(centre, size, strict=True):
        length = min(round(side), s)
        start = round(min(max(c - length / 2, 0), s - length))
        low.append(start)
        high.append(start + max(1, length))
    return low[0], low[1], high[0], high[1]


def _mark(picture: Image.Image, box: np.ndarray) -> None:
    """Draw a white frame with a black edge around a box."""
    canvas = ImageDraw.Draw(picture)
    for distance, width, colour in ((6, 4, "black"), (5, 2, "white")):
        corners = [box[0] - distance, box[1] - distance, box[2] + distance, box[3] + distance]
        canvas.rectangle([float(x) for x in corners], outline=colour, width=width)


def _data_uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
