"""Anchors: 8732 default boxes over six feature maps for SSD300, 24564 over seven for SSD512.

Positions and sizes follow Liu et al., "SSD: Single Shot MultiBox Detector" (2016), section 2.2. The arithmetic is that
of torchvision's `DefaultBoxGenerator`, so that the anchors are bit-identical to torchvision's.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorConfig:
    """The positions and shapes of a model's anchors. The defaults are SSD300's for COCO.

    The cell in grid row i and grid column j of a feature map has its centre at x = (j + 0.5) * step and
    y = (i + 0.5) * step. Each cell of feature map k has these anchors, in this order:

    1. a square of scale s_k;
    2. a square of scale sqrt(s_k * s_(k+1));
    3. for every aspect ratio, a wide box and then a tall box of scale s_k.

    `clip` says which coordinates are limited to the image. Implementations of SSD differ here:

    - `"none"`: no coordinate (Caffe's SSD models, MMDetection).
    - `"sizes"`: width and height (torchvision). 2 of the 8732 anchors differ from `"none"`.
    - `"centers"`: centre, width and height (amdegroot, lufficc, NVIDIA). 114 anchors differ from `"sizes"`. All of them
      are in the last grid row and grid column of the 10 x 10 map, whose centres lie outside the image.
    - `"corners"`: x1, y1, x2 and y2 (Caffe's `PriorBox` layer with `clip: true`). No anchor extends beyond the image.

    Raises:
        ValueError: `steps`, `scales` or `aspect_ratios` has the wrong number of entries, or `clip` is unknown.
    """

    image_size: int = 300  # pixels, width and height
    grid_sizes: tuple[int, ...] = (38, 19, 10, 5, 3, 1)  # cells per side of each feature map
    steps: tuple[int, ...] = (8, 16, 32, 64, 100, 300)  # pixels between the centres of two cells, for each feature map
    scales: tuple[float, ...] = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)  # s_k, as fractions of the image's side
    aspect_ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))  # for each feature map
    clip: Literal["none", "sizes", "centers", "corners"] = "sizes"

    def __post_init__(self) -> None:
        num_maps = len(self.grid_sizes)
        for name, expected in (("steps", num_maps), ("aspect_ratios", num_maps), ("scales", num_maps + 1)):
            count = len(getattr(self, name))
            if count != expected:
                raise ValueError(f"{name} must have {expected} entries for {num_maps} feature maps, got {count}")
        if self.clip not in ("none", "sizes", "centers", "corners"):
            raise ValueError(f'clip must be "none", "sizes", "centers" or "corners", got {self.clip!r}')

    @property
    def anchors_per_cell(self) -> tuple[int, ...]:
        """The number of anchors of one cell, for each feature map."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)


SSD300_COCO = AnchorConfig()
SSD300_VOC = AnchorConfig(scales=(0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05))
SSD300_NVIDIA = AnchorConfig(clip="centers")
SSD512_COCO = AnchorConfig(
    image_size=512,
    grid_sizes=(64, 32, 16, 8, 4, 2, 1),
    steps=(8, 16, 32, 64, 128, 256, 512),
    scales=(0.04, 0.1, 0.26, 0.42, 0.58, 0.74, 0.9, 1.06),
    aspect_ratios=((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
)
SSD512_VOC = replace(SSD512_COCO, scales=(0.07, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 1.05))


def make_anchors(config: AnchorConfig = SSD300_COCO) -> Tensor:
    """Compute the anchors of all feature maps.

    Args:
        config: positions and shapes.

    Returns:
        fp32 [A, 4] xyxy in pixels of the resized image. The order is by feature map, then grid row, then grid
        column, then anchor within the cell.
    """
    maps = []
    for k, grid_size in enumerate(config.grid_sizes):
        steps_per_side = config.image_size / config.steps[k]  # not always `grid_size`: 9.375 for the 10 x 10 map
        centers = (torch.arange(grid_size) + 0.5) / steps_per_side  # [grid_size], as fractions of the image's side
        centers_xy = torch.cartesian_prod(centers, centers).flip(1)  # [grid_size ** 2, 2] x, y; x varies fastest
        sizes = torch.tensor(_cell_sizes(config, k))  # [a, 2] w, h
        maps.append(torch.cat([centers_xy.repeat_interleave(len(sizes), dim=0), sizes.repeat(grid_size**2, 1)], dim=1))
    boxes = torch.cat(maps)  # [A, 4] cxcywh, as fractions of the image's side
    if config.clip == "sizes":
        boxes[:, 2:].clamp_(0, 1)
    elif config.clip == "centers":
        boxes.clamp_(0, 1)
    center, half = boxes[:, :2], 0.5 * boxes[:, 2:]
    corners = torch.cat([(center - half) * config.image_size, (center + half) * config.image_size], dim=1)
    return corners.clamp(0, config.image_size) if config.clip == "corners" else corners


def _cell_sizes(config: AnchorConfig, k: int) -> list[tuple[float, float]]:
    """Width and height of each anchor of a cell of feature map `k`, as fractions of the image's side."""
    scale, larger = config.scales[k], math.sqrt(config.scales[k] * config.scales[k + 1])
    sizes = [(scale, scale), (larger, larger)]
    for ratio in config.aspect_ratios[k]:
        root = math.sqrt(ratio)
        sizes += [(scale * root, scale / root), (scale / root, scale * root)]
    return sizes
