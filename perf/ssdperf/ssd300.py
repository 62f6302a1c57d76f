"""SSD300's dimensions, for problems that have the shape of a real detector's."""

from typing import NamedTuple

from ssdcore.anchors import SSD300_COCO

IMAGE_SIZE = SSD300_COCO.image_size  # pixels, both sides
NUM_CLASSES = 81  # COCO's 80 and the background
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of dx, dy, dw and dh; torchvision's SSD, and the default of every op


class Level(NamedTuple):
    """One feature map of the head: `side` x `side` cells with `anchors_per_cell` anchors each."""

    side: int
    anchors_per_cell: int

    @property
    def num_cells(self) -> int:
        return self.side**2

    @property
    def num_anchors(self) -> int:
        return self.num_cells * self.anchors_per_cell


LEVELS = tuple(map(Level, SSD300_COCO.grid_sizes, SSD300_COCO.anchors_per_cell))
NUM_ANCHORS = sum(level.num_anchors for level in LEVELS)  # 8732


def last_levels(num_anchors: int) -> tuple[Level, ...]:
    """Return the smallest feature maps, as many as have `num_anchors` anchors together: all six for 8732.

    Raises:
        ValueError: no number of feature maps has that many anchors.
    """
    sums = [sum(level.num_anchors for level in LEVELS[first:]) for first in range(len(LEVELS))]
    if num_anchors not in sums:
        raise ValueError(f"feature maps of SSD300 have {', '.join(map(str, sums))} anchors, got {num_anchors}")
    return LEVELS[sums.index(num_anchors) :]
