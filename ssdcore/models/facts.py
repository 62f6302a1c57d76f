"""What is known of each model: its size, counted without computing anything, beside the published figures."""

from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ssdcore.models.builders import MODELS


class Published(NamedTuple):
    """Figures that others give for a model."""

    num_classes: int  # with the background
    parameters: int
    gmacs: float  # 10**9 multiply-accumulates for one image
    source: str


class Facts(NamedTuple):
    """The size of a model with `num_classes` classes."""

    name: str
    image_size: int  # pixels, width and height
    anchors: int
    num_classes: int  # with the background
    parameters: int
    gmacs: float  # 10**9 multiply-accumulates of the convolutions for one image
    published: Published | None


PUBLISHED = {
    "ssd300_vgg16": Published(91, 35_641_826, 34.86, "torchvision, SSD300_VGG16_Weights"),
    "ssd300_resnet50": Published(81, 22_894_902, 20.15, "NVIDIA SSD300 v1.1, counted from its code"),
}
COCO_CLASSES = 81  # with the background


def facts(name: str) -> Facts:
    """Count the parameters and the multiply-accumulates of a model of `MODELS`, for the classes of COCO.

    The model is built without memory for its weights, and its layers compute shapes only. A convolution is counted
    exactly, all else is left out.
    """
    published = PUBLISHED.get(name)
    num_classes = published.num_classes if published else COCO_CLASSES
    with torch.device("meta"):
        model = MODELS[name](num_classes).eval()
    size = model.anchor_config.image_size
    with FlopCounterMode(display=False) as counter:
        model.predict(torch.empty(1, 3, size, size, device="meta"))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # A multiply-accumulate is two operations.
    return Facts(name, size, len(model.anchors), num_classes, parameters, counter.get_total_flops() / 2e9, published)


def table() -> str:
    """The facts of all models as text, a line each, with the published figures beside the counted ones."""
    lines = [("model", "input", "anchors", "classes", "parameters", "GMACs", "published", "source")]
    for row in map(facts, MODELS):
        published = row.published
        lines.append(
            (
                row.name,
                f"{row.image_size} x {row.image_size}",
                str(row.anchors),
                str(row.num_classes),
                f"{row.parameters:,}",
                f"{row.gmacs:.2f}",
                f"{published.parameters:,}, {published.gmacs:.2f}" if published else "",
                published.source if published else "",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
