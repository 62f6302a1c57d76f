"""The default boxes of SSD300: 8732 anchors over six feature maps.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016), section 2.2; the arithmetic, to the last
bit, is torchvision's `DefaultBoxGenerator`.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class AnchorConfig:
    """Where the anchors lie; the defaults are SSD300's for COCO.

    Each cell of map k has two squares, of scales s_k and sqrt(s_k s_(k+1)), then a wide and a tall box of
    scale s_k for every aspect ratio. Its centre is (index + 0.5) * step.

    `clip` says what is limited to the image, for implementations differ:

    - `"none"`: nothing (Caffe's SSD models, MMDetection).
    - `"sizes"`: w and h (torchvision); 2 of the 8732 boxes differ from `"none"`.
    - `"centers"`: cx, cy, w and h (amdegroot, lufficc, NVIDIA); 114 boxes differ from `"sizes"`, all in the
      last row and column of the 10 x 10 map, whose centres lie outside.
    - `"corners"`: x1, y1, x2, y2 (Caffe's `PriorBox` layer with `clip: true`); no box reaches outside.
    """

    image_size: int = 300  # pixels, both sides
    grid_sizes: tuple[int, ...] = (38, 19, 10, 5, 3, 1)  # cells a side, for each map
    steps: tuple[int, ...] = (8, 16, 32, 64, 100, 300)  # pixels between centres
    scales: tuple[float, ...] = (0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05)  # of the image's side
    aspect_ratios: tuple[tuple[int, ...], ...] = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    clip: Literal["none", "sizes", "centers", "corners"] = "sizes"

    def __post_init__(self) -> None:
        maps = len(self.grid_sizes)
        for name, expected in (("steps", maps), ("aspect_ratios", maps), ("scales", maps + 1)):
            if len(getattr(self, name)) != expected:
                raise ValueError(f"{name} must have {expected} entries for {maps} maps, got {len(getattr(self, name))}")
        if self.clip not in ("none", "sizes", "centers", "corners"):
            raise ValueError(f'clip must be "none", "sizes", "centers" or "corners", got {self.clip!r}')

    @property
    def anchors_per_cell(self) -> tuple[int, ...]:
        """For each map."""
        return tuple(2 + 2 * len(ratios) for ratios in self.aspect_ratios)


SSD300_COCO = AnchorConfig()
SSD300_VOC = AnchorConfig(scales=(0.1, 0.2, 0.37, 0.54, 0.71, 0.88, 1.05))


def make_anchors(config: AnchorConfig = SSD300_COCO) -> Tensor:
    """The anchors, float32 [A, 4] xyxy in pixels of the resized image: by map, row, column, anchor."""
    maps = []
    for k, grid in enumerate(config.grid_sizes):
        cells = config.image_size / config.steps[k]  # not always `grid`: 9.375 for the 10 x 10 map
        centers = (torch.arange(grid) + 0.5) / cells  # [grid], as fractions of the image's side
        centers_xy = torch.cartesian_prod(centers, centers).flip(1)  # [grid * grid, 2], row by row
        sizes = torch.tensor(_cell_sizes(config, k))  # [a, 2] w, h
        maps.append(torch.cat([centers_xy.repeat_interleave(len(sizes), dim=0), sizes.repeat(grid**2, 1)], dim=1))
    boxes = torch.cat(maps)  # [A, 4] cxcywh, as fractions of the image's side
    if config.clip == "sizes":
        boxes[:, 2:].clamp_(0, 1)
    elif config.clip == "centers":
        boxes.clamp_(0, 1)
    center, half = boxes[:, :2], 0.5 * boxes[:, 2:]
    corners = torch.cat([(center - half) * config.image_size, (center + half) * config.image_size], dim=1)
    return corners.clamp(0, config.image_size) if config.clip == "corners" else corners


def _cell_sizes(config: AnchorConfig, k: int) -> list[tuple[float, float]]:
    scale, larger = config.scales[k], math.sqrt(config.scales[k] * config.scales[k + 1])
    sizes = [(scale, scale), (larger, larger)]
    for ratio in config.aspect_ratios[k]:
        root = math.sqrt(ratio)
        sizes += [(scale * root, scale / root), (scale / root, scale * root)]
    return sizes
