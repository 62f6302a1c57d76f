"""VGG-16 as the SSD paper uses it, for images of 300 x 300 and of 512 x 512."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdcore.models.backbone import Backbone, extra_layers, he_init, xavier_init
from ssdcore.models.pretrained import backbone_state

L2_NORM_SCALE = 20.0  # initial scale of conv4_3's L2-normalised features; SSD paper, section 3.1
CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # conv1_1 .. conv5_3 among torchvision's layers
FC6, FC7 = 31, 33  # their places in the file vgg16_reducedfc.pth, where fc6 and fc7 are convolutions


class VGG16(Backbone):
    """VGG-16 with fc6 and fc7 as convolutions, followed by the SSD paper's extra layers.

    The parameters have the names of torchvision's `ssd300_vgg16`. With pretrained weights, the model also starts from
    the same values as torchvision's: layers after conv5_3 get Xavier initialisation, and conv1_1 and conv1_2 are
    frozen. Without pretrained weights, all layers get He's initialisation. It keeps the features of every layer at
    unit scale if the images have unit scale.

    Args:
        image_size: 300 for six feature maps, 512 for seven.
        weights: None, or weights for torchvision's `vgg16` as `backbone_state` takes them. A file may also be
            `vgg16_reducedfc.pth`, whose fc6 and fc7 are loaded too.

    Raises:
        ValueError: the weights cannot be read, or do not belong to VGG-16.

    Source: Liu et al. (2016), figure 2; for 512, the authors' `ssd_coco.py` and `ssd_pascal.py`.
    """

    def __init__(self, image_size: int = 300, weights: str | Path | object | None = None) -> None:
        super().__init__()
        from torchvision.models import vgg16  # imported here, because ssd300_tiny works without torchvision

        with torch.device("meta"):  # spares the memory and the time of the classifier
            layers = vgg16().features
        layers.to_empty(device=torch.get_default_device())
        pools = [i for i, layer in enumerate(layers) if isinstance(layer, nn.MaxPool2d)]
        layers[pools[2]].ceil_mode = True  # 75 -> 38 cells per side, not 37
        fc6_fc7 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1),  # pool5 with stride 1 keeps 19 cells per side
            nn.Conv2d(512, 1024, kernel_size=3, padding=6, dilation=6),
            nn.ReLU(inplace=True),
            nn.Conv2d(1024, 1024, kernel_size=1),
            nn.ReLU(inplace=True),
        )
        if image_size == 300:  # 19 -> 10 -> 5 -> 3 -> 1 cells per side
            self.out_channels = (512, 1024, 512, 256, 256, 256)
            last = [extra_layers(256, 128, 256), extra_layers(256, 128, 256)]
        else:  # 32 -> 16 -> 8 -> 4 -> 2 -> 1 cells per side
            assert image_size == 512
            self.out_channels = (512, 1024, 512, 256, 256, 256, 256)
            last = [
                extra_layers(256, 128, 256, stride=2, padding=1),
                extra_layers(256, 128, 256, stride=2, padding=1),
                extra_layers(256, 128, 256, kernel_size=4, padding=1),
            ]
        self.scale_weight = nn.Parameter(torch.full((512,), L2_NORM_SCALE))
        self.features = layers[: pools[3]]  # conv1_1 .. conv4_3
        self.extra = nn.ModuleList(
            [
                nn.Sequential(*layers[pools[3] : pools[4]], fc6_fc7),  # pool4 .. fc7
                extra_layers(1024, 256, 512, stride=2, padding=1),  # conv8
                extra_layers(512, 128, 256, stride=2, padding=1),  # conv9
                *last,
            ]
        )
        he_init(self)
        if weights is not None:
            xavier_init(fc6_fc7)
            xavier_init(self.extra[1:])
            self._load(backbone_state("vgg16", weights))
            self.features[: pools[0]].requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.features(images)  # [B, 512, 38, 38], or 64 cells per side
        maps = [self.scale_weight.view(1, -1, 1, 1) * F.normalize(x)]
        for layers in self.extra:
            x = layers(x)
            maps.append(x)
        return maps

    def _load(self, state: dict[str, Tensor]) -> None:
        """Load conv1_1 to conv5_3, and fc6 and fc7 if they are convolutions."""
        by_number = {name.removeprefix("features."): tensor for name, tensor in state.items()}
        convs = dict(zip(CONVS, self._convs(), strict=True))
        if f"{FC6}.weight" in by_number:
            *_, fc6_fc7 = self.extra[0].children()
            fc6, fc7 = (layer for layer in fc6_fc7.children() if isinstance(layer, nn.Conv2d))
            convs |= {FC6: fc6, FC7: fc7}
        for number, layer in convs.items():
            tensors = {part: by_number.get(f"{number}.{part}") for part in ("weight", "bias")}
            for part, tensor in tensors.items():
                expected = list(getattr(layer, part).shape)
                if tensor is None or list(tensor.shape) != expected:
                    got = "nothing" if tensor is None else f"shape {list(tensor.shape)}"
                    raise ValueError(
                        f"weights_backbone must be VGG-16's, with features.{number}.{part} {expected}, got {got}"
                    )
            layer.load_state_dict(tensors)

    def _convs(self) -> list[nn.Module]:
        """conv1_1 to conv5_3."""
        return [
            layer for layer in (*self.features.children(), *self.extra[0].children()) if isinstance(layer, nn.Conv2d)
        ]
