"""What every backbone is, and the layers that several backbones add behind a pretrained network."""

from torch import Tensor, nn


class Backbone(nn.Module):
    """Computes from a batch of images [B, 3, S, S] the feature maps that the head reads, largest first.

    A subclass sets `out_channels` and defines `forward(images) -> list[Tensor]`. The maps have the grid sizes of the
    model's `AnchorConfig`: 38, 19, 10, 5, 3 and 1 cells per side for SSD300.
    """

    out_channels: tuple[int, ...]  # of each feature map

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError


def extra_layers(
    in_channels: int,
    bottleneck_channels: int,
    out_channels: int,
    *,
    kernel_size: int = 3,
    stride: int = 1,
    padding: int = 0,
    batch_norm: bool = False,
) -> nn.Sequential:
    """Two convolutions that compute a smaller feature map: 1 x 1 to fewer channels, and then one that shrinks the map.

    Without stride and padding, a 3 x 3 convolution makes 3 cells per side of 5, and 1 of 3. With stride 2 and padding
    1, it halves their number and rounds up.

    Args:
        in_channels, bottleneck_channels, out_channels: before, between and after the convolutions.
        kernel_size, stride, padding: of the second convolution.
        batch_norm: whether batch normalisation follows each convolution, which then has no bias.

    Source: Liu et al., SSD (2016), figure 2; with batch normalisation, NVIDIA's SSD300 v1.1.
    """
    convs = [
        nn.Conv2d(in_channels, bottleneck_channels, kernel_size=1, bias=not batch_norm),
        nn.Conv2d(bottleneck_channels, out_channels, kernel_size, stride, padding, bias=not batch_norm),
    ]
    layers: list[nn.Module] = []
    for conv in convs:
        layers += [conv, nn.BatchNorm2d(conv.out_channels)] if batch_norm else [conv]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


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
