"""How other projects name and order the weights of an SSD, and what their code does before and after the network.

Sources: `ssd300_vgg16` of torchvision; the code and the configurations of amdegroot/ssd.pytorch, lufficc/SSD,
open-mmlab/mmdetection and NVIDIA/DeepLearningExamples (PyTorch/Detection/SSD).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from ssdcore.anchors import SSD300_COCO, SSD300_NVIDIA, SSD300_VOC, SSD512_COCO, SSD512_VOC, AnchorConfig
from ssdcore.models import IMAGENET_MEAN, IMAGENET_STD, VGG_MEAN, VGG_STD

CLASS_HEAD = "head.classification_head.module_list."
BOX_HEAD = "head.regression_head.module_list."
CAFFE_MEAN = (123 / 255, 117 / 255, 104 / 255)  # torchvision's VGG_MEAN is this, rounded to five digits
VOC_CLASSES, COCO_CLASSES = 21, 81  # with the background


@dataclass(frozen=True)
class Source:
    """A model as another project saves it.

    Attributes:
        project: the project's name.
        model: the model's name in `MODELS`.
        prefixes: how the names of our tensors begin, and how the project's names of these tensors begin.
        anchors: the project's default boxes, by the dataset for which they are meant: "voc" or "coco".
        image_mean, image_std: of RGB in 0..1.
        score_threshold, iou_threshold, topk_candidates: arguments of `postprocess_detections`.
        max_detections: the argument of `postprocess_detections` for a number of classes with the background.
        clip_before_nms: whether boxes are clipped to the image before NMS.
        other_anchors: the entry of `anchors` for a number of classes that is neither VOC's nor COCO's. None if the
            project's code takes it from a configuration.
        anchors_innermost: the channels of the head are ordered by class (or coordinate) and then by anchor.
        background_last: the background is the last class.
    """

    project: str
    model: str
    prefixes: Mapping[str, str]
    anchors: Mapping[str, AnchorConfig]
    image_mean: Sequence[float]
    image_std: Sequence[float]
    score_threshold: float
    iou_threshold: float
    topk_candidates: int
    max_detections: Callable[[int], int]
    clip_before_nms: bool
    other_anchors: str | None
    anchors_innermost: bool = False
    background_last: bool = False

    def their_names(self, our_names: Iterable[str]) -> dict[str, str]:
        """The project's name of each of our tensors."""
        return {
            name: next(theirs + name[len(ours) :] for ours, theirs in self.prefixes.items() if name.startswith(ours))
            for name in our_names
        }

    def our_order(self, name: str, tensor: Tensor, anchors_per_cell: Sequence[int]) -> Tensor:
        """The tensor with the channels of the head in our order: by anchor, and then by class, background first.

        Args:
            name: our name of the tensor.
            tensor: the project's tensor.
            anchors_per_cell: for each feature map.
        """
        if not name.startswith((CLASS_HEAD, BOX_HEAD)):
            return tensor
        anchors = anchors_per_cell[int(name.split(".")[-2])]
        if self.anchors_innermost:
            tensor = tensor.unflatten(0, (-1, anchors)).transpose(0, 1).flatten(0, 1)
        if self.background_last and name.startswith(CLASS_HEAD):
            tensor = tensor.unflatten(0, (anchors, -1)).roll(1, dims=1).flatten(0, 1)
        return tensor

    def anchors_for(self, num_classes: int) -> str | None:
        """The entry of `anchors` for a number of classes with the background; None if it cannot be known."""
        if len(self.anchors) == 1:
            return next(iter(self.anchors))
        return {VOC_CLASSES: "voc", COCO_CLASSES: "coco"}.get(num_classes, self.other_anchors)


def _vgg(maps: int, trunk: str, norm: str, extra: str, cls: str, reg: str) -> dict[str, str]:
    """The prefixes of a detector on VGG-16 with all layers up to fc7 in one list.

    Args:
        maps: number of feature maps.
        trunk: of the list.
        norm: the scale of conv4_3's normalised features.
        extra: of a convolution behind fc7, where {i} is its block, {j} its place in the block and {n} its place among
            all of them.
        cls, reg: of the head's convolutions, where {i} is the feature map.
    """
    behind_conv4 = {"0.1.": 24, "0.3.": 26, "0.5.": 28, "0.7.1.": 31, "0.7.3.": 33}  # conv5_1 .. conv5_3, fc6, fc7
    return {
        "backbone.scale_weight": norm,
        "backbone.features.": trunk,
        **{f"backbone.extra.{place}": f"{trunk}{number}." for place, number in behind_conv4.items()},
        **{
            f"backbone.extra.{i + 1}.{2 * j}.": extra.format(i=i, j=j, n=2 * i + j)
            for i in range(maps - 2)
            for j in (0, 1)
        },
        **{f"{CLASS_HEAD}{i}.": cls.format(i=i) for i in range(maps)},
        **{f"{BOX_HEAD}{i}.": reg.format(i=i) for i in range(maps)},
    }


def _whole_pixels(config: AnchorConfig) -> AnchorConfig:
    """`config` with sizes cut to whole pixels and without clipping, as MMDetection and Caffe's scripts have them."""
    size = config.image_size
    # Rounded before, because 0.15 * 300 could be a little less than 45. None of SSD300's sizes changes.
    return replace(config, scales=tuple(int(round(scale * size, 6)) / size for scale in config.scales), clip="none")


def _clipped(config: AnchorConfig) -> AnchorConfig:
    return replace(config, clip="centers")


def _torchvision() -> Source:
    return Source(
        project="torchvision",
        model="ssd300_vgg16",
        prefixes={"": ""},  # our names are torchvision's
        anchors={"coco": SSD300_COCO},
        image_mean=VGG_MEAN,
        image_std=VGG_STD,
        score_threshold=0.01,
        iou_threshold=0.45,
        topk_candidates=400,
        max_detections=lambda num_classes: 200,
        clip_before_nms=True,
        other_anchors=None,
    )


def _amdegroot() -> Source:
    return Source(
        project="amdegroot/ssd.pytorch",
        model="ssd300_vgg16",
        prefixes=_vgg(6, "vgg.", "L2Norm.weight", "extras.{n}.", "conf.{i}.", "loc.{i}."),
        anchors={"voc": _clipped(SSD300_VOC), "coco": _clipped(SSD300_COCO)},
        image_mean=CAFFE_MEAN,
        image_std=VGG_STD,
        score_threshold=0.01,
        iou_threshold=0.45,
        topk_candidates=200,
        # 200 of each class: its code means to keep 200 of the image, but sets the others to zero in a copy.
        max_detections=lambda num_classes: 200 * (num_classes - 1),
        clip_before_nms=False,
        other_anchors="coco",
    )


def _lufficc(size: int) -> Source:
    small = size == 300
    voc = SSD300_VOC if small else replace(SSD512_VOC, scales=(*SSD512_VOC.scales[:-1], 537.65 / size))  # not 537.6
    head = "box_head.predictor."
    return Source(
        project="lufficc/SSD",
        model=f"ssd{size}_vgg16",
        prefixes=_vgg(
            6 if small else 7,
            "backbone.vgg.",
            "backbone.l2_norm.weight",
            "backbone.extras.{n}.",
            head + "cls_headers.{i}.",
            head + "reg_headers.{i}.",
        ),
        anchors={"voc": _clipped(voc), "coco": _clipped(SSD300_COCO if small else SSD512_COCO)},
        image_mean=CAFFE_MEAN,
        image_std=VGG_STD,
        score_threshold=0.01,
        iou_threshold=0.45,
        topk_candidates=8732 if small else 24564,  # all anchors
        max_detections=lambda num_classes: 100,
        clip_before_nms=False,
        other_anchors=None,
    )


def _mmdetection(size: int) -> Source:
    small = size == 300
    maps = 6 if small else 7
    return Source(
        project="MMDetection",
        model=f"ssd{size}_vgg16",
        prefixes=_vgg(
            maps,
            "backbone.features.",
            "neck.l2_norm.weight",
            "neck.extra_layers.{i}.{j}.conv.",
            "bbox_head.cls_convs.{i}.0.",
            "bbox_head.reg_convs.{i}.0.",
        ),
        anchors={
            "voc": _whole_pixels(SSD300_VOC if small else SSD512_VOC),
            "coco": _whole_pixels(SSD300_COCO if small else SSD512_COCO),
        },
        image_mean=IMAGENET_MEAN,
        image_std=VGG_STD,
        score_threshold=0.02,
        iou_threshold=0.45,
        topk_candidates=1000 * maps,  # its code takes 1000 of each feature map, among all classes
        max_detections=lambda num_classes: 200,
        clip_before_nms=True,
        other_anchors=None,
        background_last=True,
    )


def _nvidia(depth: int) -> Source:
    children = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6}  # of torchvision's ResNet, by number
    return Source(
        project="NVIDIA SSD300 v1.1",
        model=f"ssd300_resnet{depth}",
        prefixes={
            **{
                f"backbone.features.{name}.": f"feature_extractor.feature_extractor.{i}."
                for name, i in children.items()
            },
            "backbone.extra.": "additional_blocks.",
            CLASS_HEAD: "conf.",
            BOX_HEAD: "loc.",
        },
        anchors={"coco": SSD300_NVIDIA},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        score_threshold=0.05,
        # Its code keeps a box if the IoU is less than 0.5, ours if it is not greater than the threshold.
        iou_threshold=float(np.nextafter(np.float32(0.5), np.float32(0))),
        topk_candidates=200,
        max_detections=lambda num_classes: 200,
        clip_before_nms=False,
        other_anchors=None,
        anchors_innermost=True,
    )


SOURCES = (
    _torchvision(),
    _amdegroot(),
    *(build(size) for build in (_lufficc, _mmdetection) for size in (300, 512)),
    *(_nvidia(depth) for depth in (18, 34, 50, 101, 152)),
)
