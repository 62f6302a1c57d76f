"""A backbone that two CPU cores can train in minutes."""

from torch import Tensor, nn

from ssdcore.models.backbone import Backbone


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


def _conv_bn(in_channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )
