"""Backbones compute, from a batch of images, the six feature maps that SSD300's head reads."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

L2_NORM_SCALE = 20.0  # initial scale of conv4_3's L2-normalised features; SSD paper, section 3.1


class Backbone(nn.Module):
    """Computes from images [B, 3, 300, 300] six feature maps with 38, 19, 10, 5, 3 and 1 cells per side."""

    out_channels: tuple[int, ...]  # of each feature map


class VGG16(Backbone):
    """VGG-16 with fc6 and fc7 as convolutions, followed by the SSD paper's extra layers.

    The parameters have the names of torchvision's `ssd300_vgg16`. With pretrained weights, the model also starts from
    the same values as torchvision's: layers after conv5_3 get Xavier initialisation, and conv1_1 and conv1_2 are
    frozen. Without pretrained weights, all layers get He's initialisation. It keeps the features of every layer at
    unit scale if the images have unit scale.

    Args:
        weights: None, or a member of torchvision's `VGG16_Weights`, or its name, such as "IMAGENET1K_FEATURES".

    Source: Liu et al. (2016), figure 2.
    """

    out_channels = (512, 1024, 512, 256, 256, 256)

    def __init__(self, weights: str | object | None = None) -> None:
        super().__init__()
        from torchvision.models import vgg16  # imported here, because ssd300_tiny works without torchvision

        layers = vgg16(weights=weights).features
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        layers[pools[2]].ceil_mode = True  # 75 -> 38 cells per side, not 37
        if weights is not None:
            layers[: pools[0]].requires_grad_(False)

        self.scale_weight = nn.Parameter(torch.full((512,), L2_NORM_SCALE))
        self.features = layers[: pools[3]]  # conv1_1 .. conv4_3
        fc6_fc7 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),  # pool5 with stride 1 keeps 19 cells per side
            nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(1024, 1024, kernel_size=1),
            nn.ReLU(inplace=True),
        )
        self.extra = nn.ModuleList(
            [
                nn.Sequential(*layers[pools[3] : pools[4]], fc6_fc7),  # pool4 .. fc7
                _extra(1024, 256, 512, stride=2, padding=1),  # conv8
                _extra(512, 128, 256, stride=2, padding=1),  # conv9
                _extra(256, 128, 256),  # conv10
                _extra(256, 128, 256),  # conv11
            ]
        )
        if weights is None:
            he_init(self)
        else:
            xavier_init(fc6_fc7)
            xavier_init(self.extra[1:])

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)  # [B, 512, 38, 38]
        maps = [self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)]
        for layers in self.extra:
            x = layers(x)
            maps.append(x)
        return maps


class Tiny(Backbone):
    """A backbone that two CPU cores can train in minutes: 3 x 3 convolutions with batch normalisation.

    The first three convolutions reduce the resolution by 8. Three convolutions output features at 38 cells per
    side and three at 19, because most objects belong to these two feature maps. Each smaller map has one convolution.
    """

    out_channels = (64, 128, 128, 128, 128, 128)

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(
            [
                nn.Sequential(
                    _conv_bn(3, 16, stride=2),  # 150 cells per side
                    _conv_bn(16, 32, stride=2),  # 75
                    _conv_bn(32, 64, stride=2),  # 38
                    _conv_bn(64, 64),
                    _conv_bn(64, 64),
                ),
                nn.Sequential(_conv_bn(64, 128, stride=2), _conv_bn(128, 128), _conv_bn(128, 128)),  # 19
                _conv_bn(128, 128, stride=2),  # 10
                _conv_bn(128, 128, stride=2),  # 5
                _conv_bn(128, 128, stride=2),  # 3
                # 1 cell. Batch normalisation would have one value per image and channel to compute statistics from,
                # and the variance over a batch of one image would be undefined.
                nn.Sequential(nn.Conv2d(128, 128, kernel_size=3), nn.ReLU(inplace=True)),
            ]
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


def he_init(module: nn.Module) -> None:
    """Give every convolution in `module` He-normal weights and zero biases.

    This initialisation preserves the scale of the features in the forward pass.

    Source: He et al., "Delving Deep into Rectifiers" (2015), section 2.2.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def xavier_init(module: nn.Module) -> None:
    """Give every convolution in `module` Xavier-uniform weights and zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _extra(
    in_channels: int, bottleneck_channels: int, out_channels: int, stride: int = 1, padding: int = 0
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, bottleneck_channels, kernel_size=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(bottleneck_channels, out_channels, kernel_size=3, stride=stride, padding=padding),
        nn.ReLU(inplace=True),
    )


def _conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
