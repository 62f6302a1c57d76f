"""Count what a dataset holds: images, objects per class, sizes of boxes, and boxes that no anchor can reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssdcore.anchors import AnchorConfig, make_anchors
from ssdcore.data.dataset import DetectionDataset
from ssdcore.kernels import box_iou

MATCH_IOU = 0.5  # IoU from which an anchor is a positive of an object; Liu et al., SSD, section 2.2
SIZES = (300, 512)  # pixels; sides of the images that SSD300 and SSD512 see
QUANTILES = {"smallest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "largest": 1.0}
# COCO's limits of the area in square pixels. They are meant for the original image; the network sees the resized one.
AREAS = {"small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, float("inf"))}
CHUNK = 256  # boxes compared with all anchors at once; 25 MB for SSD512's 24564


class Reach(NamedTuple):
    """How many objects of one size overlap an anchor."""

    size: str  # "small", "medium" or "large"
    objects: int
    unreached: int  # objects whose IoU with every anchor is below `MATCH_IOU`


def relative_boxes(datasets: Sequence[DetectionDataset]) -> Tensor:
    """Return the boxes of all objects that are not ignored, [T, 4] xyxy as fractions of their image."""
    boxes = [torch.zeros(0, 4)]
    for dataset in datasets:
        for index in range(len(dataset)):
            target = dataset.target(index)
            height, width = dataset.image_size(index)
            scale = torch.tensor([width, height, width, height])
            boxes.append(target["boxes"].as_subclass(Tensor)[~target["ignore"]] / scale)
    return torch.cat(boxes)


def reach(boxes: Tensor, config: AnchorConfig) -> list[Reach]:
    """Count the objects that no anchor overlaps with an IoU of at least `MATCH_IOU`, by their size after the resize.

    Such an object still gets the anchor with the highest IoU to learn from, but only this one.

    Args:
        boxes: [T, 4] xyxy as fractions of the image.
        config: the anchors.
    """
    anchors = make_anchors(config)  # [A, 4] xyxy in pixels of the resized image
    resized = boxes * config.image_size
    best = [box_iou(chunk, anchors).amax(dim=1) for chunk in resized.split(CHUNK)]
    unreached = torch.cat([torch.zeros(0), *best]) < MATCH_IOU
    areas = (resized[:, 2:] - resized[:, :2]).prod(dim=1)
    rows = []
    for size, (low, high) in AREAS.items():
        of_size = (low <= areas) & (areas < high)
        rows.append(Reach(size, int(of_size.sum()), int((of_size & unreached).sum())))
    return rows


def table_of_counts(datasets: Mapping[str, DetectionDataset]) -> str:
    """A table of images and of objects per class, with a column for each split."""
    classes = list(dict.fromkeys(name for dataset in datasets.values() for name in dataset.classes))
    columns = {}
    for split, dataset in datasets.items():
        targets = [dataset.target(index) for index in range(len(dataset))]
        labels = torch.cat([torch.zeros(0, dtype=torch.int64), *(target["labels"] for target in targets)])
        objects = torch.bincount(labels, minlength=len(dataset.classes) + 1)[1:].tolist()
        by_class = dict(zip(dataset.classes, objects, strict=True))
        columns[split] = [
            len(dataset),
            sum(not len(target["labels"]) for target in targets),
            sum(int(target["ignore"].sum()) for target in targets),
            len(labels),
            *(by_class.get(name, 0) for name in classes),
        ]
    names = ["images", "images without objects", "objects ignored", "objects", *(f"  {name}" for name in classes)]
    return _table(names, {split: [f"{number:,}" for number in numbers] for split, numbers in columns.items()})


def table_of_sizes(boxes: Tensor) -> str:
    """A table of the widths and heights of boxes, [T, 4] xyxy as fractions of the image."""
    sides = boxes[:, 2:] - boxes[:, :2]  # [T, 2] w, h
    mean_side = sides.prod(dim=1).sqrt()
    rows = {"width / image": (sides[:, 0], "{:.3f}"), "height / image": (sides[:, 1], "{:.3f}")}
    rows |= {f"side in pixels of {size} x {size}": (mean_side * size, "{:.0f}") for size in SIZES}
    columns = {
        name: [form.format(_quantile(values, quantile)) for values, form in rows.values()]
        for name, quantile in QUANTILES.items()
    }
    return _table(list(rows), columns)


def table_of_reach(rows: Sequence[Reach]) -> str:
    """A table of objects and unreached objects by size."""
    columns = {
        row.size: [f"{row.objects:,}", f"{row.unreached:,}", f"{row.unreached / max(1, row.objects):.1%}"]
        for row in rows
    }
    return _table(["objects", "reached by no anchor", "share"], columns)


def _quantile(values: Tensor, quantile: float) -> float:
    """The value that this share of the values lies below; torch.quantile takes at most 16 million values."""
    return float(values.sort().values[round(quantile * (len(values) - 1))])


def _table(names: Sequence[str], columns: Mapping[str, Sequence[str]]) -> str:
    """Rows with names on the left, and numbers on the right of their columns."""
    first = max(map(len, names))
    widths = {header: max(map(len, (header, *values))) for header, values in columns.items()}
    lines = [" " * first + "".join(f"  {header:>{widths[header]}}" for header in columns)]
    for number, name in enumerate(names):
        lines.append(f"{name:<{first}}" + "".join(f"  {v[number]:>{widths[h]}}" for h, v in columns.items()))
    return "\n".join(lines)
