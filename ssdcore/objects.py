"""The objects of one image as plain dicts: `Target` for the annotated ones, `DetectedObjects` for the detected ones.

Both have one entry per object in every tensor, and label 0 is the background. The keys are those of torchvision's
detectors and of torchmetrics, so that values pass between them unchanged.
"""

from typing import Any

from torch import Tensor

# The ground truth of one image. `SSD` needs these keys and ignores others:
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
