"""torchvision's detector, for the cases that time its loss and its postprocess."""

import functools

import torchvision
from torchvision.models.detection.ssd import SSD


@functools.cache
def torchvision_ssd() -> SSD:
    """Return torchvision's SSD300 at random initialisation.

    Its loss and its postprocess depend neither on its weights nor on its number of classes.
    """
    return torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2)
