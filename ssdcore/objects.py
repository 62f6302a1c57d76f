"""The objects of one image as plain dicts: `Target` for the annotated ones, `DetectedObjects` for the detected ones.

Every tensor has one entry per object. Label 0 is the background and does not occur. The dicts have the names that
torchvision's detectors and torchmetrics use, so that they can be exchanged with both.

`GroundTruth` holds the annotated objects of a whole batch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The ground truth of one image. `SSD` needs these entries and ignores others:
#   boxes: float [G, 4] xyxy in pixels of the image
#   labels: int64 [G] in 1..num_classes - 1
# `DetectionDataset` adds:
#   ignore: bool [G], true for objects that count neither as found nor as missed
#   image_id: int
Target = dict[str, Any]

# What a detector found in one image, sorted by descending score:
#   boxes: fp32 [K, 4] xyxy in pixels of the image
#   labels: int64 [K] in 1..num_classes - 1
#   scores: fp32 [K]
DetectedObjects = dict[str, Tensor]


class GroundTruth(NamedTuple):
    """The targets of a batch as three tensors, on the model's device. `SSD.ground_truth` makes it."""

    boxes: Tensor  # fp32 [T, 4] xyxy in pixels of the resized image, one image after the other
    labels: Tensor  # int64 [T]
    offsets: Tensor  # int64 [B + 1]; image b owns the rows offsets[b]:offsets[b + 1]


def ragged(targets: Sequence[Target], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Join the ground truth of a batch as the ops of `ssdcore.kernels` take it, without waiting for the GPU.

    Args:
        targets: one per image, on any device; `boxes` of any float dtype, because boxes that come from NumPy are often
            fp64.
        device: where the result is placed.

    Returns:
        `gt_boxes` fp32 [T, 4], `gt_labels` int64 [T] and `gt_offsets` int64 [B + 1], the first row of each image.
    """
    gt_boxes = torch.cat([target["boxes"].to(device, torch.float32, non_blocking=True) for target in targets])
    gt_labels = torch.cat([target["labels"].to(device, non_blocking=True) for target in targets])
    counts = torch.tensor([0, *(len(target["labels"]) for target in targets)])
    return gt_boxes, gt_labels, counts.cumsum(0).to(device, non_blocking=True)
