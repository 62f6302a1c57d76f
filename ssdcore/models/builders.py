"""The models by name. Each builder takes the number of classes and a backbone's weights."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from ssdcore.anchors import SSD300_COCO, SSD300_NVIDIA, SSD512_COCO, AnchorConfig
from ssdcore.models.resnet import OUT_CHANNELS, ResNet
from ssdcore.models.ssd import IMAGENET_MEAN, IMAGENET_STD, SSD
from ssdcore.models.tiny import Tiny
from ssdcore.models.vgg import VGG16

VGG_MEAN = (0.48235, 0.45882, 0.40784)  # of RGB in 0..1; 123, 117, 104 in 0..255
VGG_STD = (1 / 255, 1 / 255, 1 / 255)  # the weights of VGG-16 that SSD starts from expect pixels in 0..255


def ssd300_vgg16(
    num_classes: int = 91,
    weights_backbone: str | Path | object | None = None,
    *,
    anchors: AnchorConfig = SSD300_COCO,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> SSD:
    """Build SSD300 on VGG-16, with the parameters, parameter names and outputs of torchvision's `ssd300_vgg16`.

    Args:
        num_classes: number of classes including the background.
        weights_backbone: None; or torchvision's weights for VGG-16 or their name; or the path of a file with a state
            dict of VGG-16, such as `vgg16_reducedfc.pth`.
        anchors: positions and shapes of the anchors.
        image_mean, image_std: mean and standard deviation of RGB in 0..1. The default for "IMAGENET1K_V1", which is
            also "DEFAULT", is ImageNet's. Any other default scales pixels to 0..255, as torchvision's detector,
            "IMAGENET1K_FEATURES" and `vgg16_reducedfc.pth` expect. To train from scratch, pass `IMAGENET_MEAN` and
            `IMAGENET_STD`: without batch normalisation, nothing else brings the features to unit scale.

    Raises:
        ValueError: `weights_backbone` is no weights for VGG-16.
    """
    return _on_vgg(300, num_classes, weights_backbone, anchors, image_mean, image_std)


def ssd512_vgg16(
    num_classes: int = 91,
    weights_backbone: str | Path | object | None = None,
    *,
    anchors: AnchorConfig = SSD512_COCO,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
) -> SSD:
    """Build SSD512 on VGG-16: seven feature maps and 24564 anchors. `anchors=SSD512_VOC` has the sizes for Pascal VOC.

    The arguments have the meaning that they have in `ssd300_vgg16`.
    """
    return _on_vgg(512, num_classes, weights_backbone, anchors, image_mean, image_std)


def ssd300_resnet(
    depth: int,
    num_classes: int = 81,
    weights_backbone: str | Path | object | None = None,
    *,
    anchors: AnchorConfig = SSD300_NVIDIA,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
) -> SSD:
    """Build SSD300 on a ResNet up to conv4, as NVIDIA's SSD300 v1.1 does; with depth 50, that model itself.

    Args:
        depth: 18, 34, 50, 101 or 152.
        num_classes: number of classes including the background.
        weights_backbone: None; or torchvision's weights for the ResNet or their name, such as "DEFAULT"; or the path of
            a file with a state dict of the ResNet.
        anchors: positions and shapes of the anchors.
        image_mean, image_std: mean and standard deviation of RGB in 0..1.

    Raises:
        ValueError: `depth` is another number; or `weights_backbone` is no weights for the ResNet.
    """
    backbone = ResNet(depth, weights_backbone)
    return SSD(backbone, num_classes, anchors, image_mean, image_std, name=f"ssd300_resnet{depth}")


def ssd300_tiny(
    num_classes: int = 91,
    *,
    anchors: AnchorConfig = SSD300_COCO,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
) -> SSD:
    """Build SSD300 on a backbone that two CPU cores can train in minutes.

    The grid sizes of the feature maps, the anchors and the structure of the head are those of `ssd300_vgg16`. The
    arguments have the meaning that they have there. There are no pretrained weights for this backbone.
    """
    return SSD(Tiny(), num_classes, anchors, image_mean, image_std, name="ssd300_tiny")


def _on_vgg(
    image_size: int,
    num_classes: int,
    weights: str | Path | object | None,
    anchors: AnchorConfig,
    image_mean: Sequence[float] | None,
    image_std: Sequence[float] | None,
) -> SSD:
    name = getattr(weights, "name", weights)  # of a member of torchvision's enum
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if name in ("DEFAULT", "IMAGENET1K_V1") else (VGG_MEAN, VGG_STD)
    return SSD(
        VGG16(image_size, weights),
        num_classes,
        anchors,
        mean if image_mean is None else image_mean,
        std if image_std is None else image_std,
        name=f"ssd{image_size}_vgg16",
    )


ssd300_resnet50 = partial(ssd300_resnet, 50)

# A file of weights holds the name of its model. To load a model of your own from a file, add its builder here.
MODELS: dict[str, Callable[..., SSD]] = {
    "ssd300_tiny": ssd300_tiny,
    "ssd300_vgg16": ssd300_vgg16,
    "ssd512_vgg16": ssd512_vgg16,
    **{f"ssd300_resnet{depth}": partial(ssd300_resnet, depth) for depth in OUT_CHANNELS},
}
