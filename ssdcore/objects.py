"""The objects of one image as plain dicts: `Target` for the annotated ones, `DetectedObjects` for the detected ones.

Every tensor has one entry per object. Label 0 is the background and does not occur. The dicts have the names that
torchvision's detectors and torchmetrics use, so that they can be exchanged with both.
"""

from typing import Any

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
