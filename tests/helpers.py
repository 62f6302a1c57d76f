"""Problems of a detector's shape, for the tests that need no surprise in them."""

import functools

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.ssd import SSD


def random_boxes(count: int, size: float = 300.0, seed: int = 0, spread: float = 0.3) -> Tensor:
    """[count, 4] xyxy inside a square of `size` pixels, sides up to `spread` of it."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * size * (1 - spread)
    return torch.cat((corner, corner + (0.01 + torch.rand(count, 2, generator=generator) * spread) * size), dim=1)


@functools.cache
def ssd300_anchors() -> Tensor:
    """torchvision's 8732 default boxes of SSD300, [8732, 4] xyxy in pixels."""
    generator = DefaultBoxGenerator(
        [[2], [2, 3], [2, 3], [2, 3], [2], [2]],
        scales=[0.07, 0.15, 0.33, 0.51, 0.69, 0.87, 1.05],
        steps=[8, 16, 32, 64, 100, 300],
    )
    maps = [torch.zeros(1, 1, side, side) for side in (38, 19, 10, 5, 3, 1)]
    return generator(ImageList(torch.zeros(1, 3, 300, 300), [(300, 300)]), maps)[0]


@functools.cache
def torchvision_ssd() -> SSD:
    """torchvision's detector, whose loss and postprocess depend neither on its weights nor on its classes."""
    return torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2)


def ragged_truths(counts: list[int], num_classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """`gt_boxes`, `gt_labels` and `gt_offsets` of a batch whose images have `counts` ground truths."""
    total = sum(counts)
    labels = torch.randint(1, num_classes, (total,), generator=torch.Generator().manual_seed(seed))
    return random_boxes(total, seed=seed), labels, torch.tensor([0, *counts]).cumsum(0)
