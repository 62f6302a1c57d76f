"""The models, and the parts from which others are built.

Each backbone has its file, `ssd` holds the detector that they share, and `builders` the models by name.
"""

from ssdcore.models.backbone import Backbone, extra_layers
from ssdcore.models.builders import (
    MODELS,
    VGG_MEAN,
    VGG_STD,
    ssd300_resnet,
    ssd300_resnet50,
    ssd300_tiny,
    ssd300_vgg16,
    ssd512_vgg16,
)
from ssdcore.models.ssd import IMAGENET_MEAN, IMAGENET_STD, SSD

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "MODELS",
    "SSD",
    "VGG_MEAN",
    "VGG_STD",
    "Backbone",
    "extra_layers",
    "ssd300_resnet",
    "ssd300_resnet50",
    "ssd300_tiny",
    "ssd300_vgg16",
    "ssd512_vgg16",
]
