"""ResNets as in NVIDIA's SSD300 v1.1."""

from collections import OrderedDict
from pathlib import Path

from torch import Tensor, nn

from ssdcore.models.backbone import Backbone, extra_layers, xavier_init
from ssdcore.models.pretrained import backbone_state

OUT_CHANNELS = {  # of each feature map, by the depth of the ResNet
    18: (256, 512, 512, 256, 256, 128),
    34: (256, 512, 512, 256, 256, 256),
    50: (1024, 512, 512, 256, 256, 256),
    101: (1024, 512, 512, 256, 256, 256),
    152: (1024, 512, 512, 256, 256, 256),
}
BOTTLENECK_CHANNELS = (256, 256, 128, 128, 128)  # of the five extra layers
STAGES = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")  # of torchvision's ResNets; layer3 is conv4


class ResNet(Backbone):
    """A ResNet up to conv4, whose stride is 1 instead of 2, followed by five extra layers with batch normalisation.

    The ResNet's parameters have torchvision's names behind `features.`. The extra layers get Xavier initialisation. The
    last feature map has one cell. Batch normalisation there needs two images or more in training.

    Args:
        depth: 18, 34, 50, 101 or 152.
        weights: None, or weights for torchvision's ResNet of this depth as `backbone_state` takes them.

    Raises:
        ValueError: `depth` is another number; or the weights cannot be read, or do not belong to this ResNet.

    Source: NVIDIA/DeepLearningExamples, PyTorch/Detection/SSD, `ssd/model.py`.
    """

    def __init__(self, depth: int = 50, weights: str | Path | object | None = None) -> None:
        super().__init__()
        from torchvision.models import get_model  # imported here, because ssd300_tiny works without torchvision

        if depth not in OUT_CHANNELS:
            raise ValueError(f"depth must be one of {', '.join(map(str, OUT_CHANNELS))}, got {depth}")
        classifier = get_model(f"resnet{depth}")
        if weights is not None:
            _load(classifier, backbone_state(f"resnet{depth}", weights), depth)
        self.out_channels = OUT_CHANNELS[depth]
        self.features = nn.Sequential(OrderedDict((name, getattr(classifier, name)) for name in STAGES))
        for layer in classifier.layer3.modules():
            if isinstance(layer, nn.Conv2d):
                layer.stride = (1, 1)  # keeps 38 cells per side
        # 38 -> 19 -> 10 -> 5 -> 3 -> 1 cells per side
        strides, paddings = (2, 2, 2, 1, 1), (1, 1, 1, 0, 0)
        self.extra = nn.ModuleList(
            extra_layers(inputs, bottleneck, outputs, stride=stride, padding=padding, batch_norm=True)
            for inputs, bottleneck, outputs, stride, padding in zip(
                self.out_channels[:-1], BOTTLENECK_CHANNELS, self.out_channels[1:], strides, paddings, strict=True
            )
        )
        xavier_init(self.extra)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [self.features(images)]  # [B, out_channels[0], 38, 38]
        for layers in self.extra:
            maps.append(layers(maps[-1]))
        return maps


def _load(classifier: nn.Module, state: dict[str, Tensor], depth: int) -> None:
    """Load the classifier's weights. What comes after conv4 may be missing, and is not used."""
    unused = ("layer4.", "fc.")
    missing = classifier.state_dict().keys() - state.keys()
    missing = {name for name in missing if not name.startswith(unused) and not name.endswith("num_batches_tracked")}
    if missing:
        raise ValueError(f"weights_backbone must be those of ResNet-{depth}, which has {min(missing)}, got none")
    used = {name: tensor for name, tensor in state.items() if not name.startswith(unused)}
    try:
        classifier.load_state_dict(used, strict=False)
    except RuntimeError as error:  # the shapes differ
        raise ValueError(f"weights_backbone must be those of ResNet-{depth}: {error}") from error
