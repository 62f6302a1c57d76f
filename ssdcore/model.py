"""SSD300: a backbone, two convolutions a map, and the ops of `ssdcore.kernels` on either side of training.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016). Names of parameters, inputs and outputs are
those of torchvision's `ssd300_vgg16`, so that its weights, its training scripts and torchmetrics work.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdcore.anchors import SSD300_COCO, AnchorConfig, make_anchors
from ssdcore.backbones import VGG16, Backbone, Tiny, xavier_init
from ssdcore.kernels import Detections, match_anchors, multibox_loss, postprocess_detections
from ssdcore.objects import DetectedObjects, Target

VGG_MEAN = (0.48235, 0.45882, 0.40784)  # of RGB in 0..1: 123, 117, 104 of 255
VGG_STD = (1 / 255, 1 / 255, 1 / 255)  # the weights of VGG-16 expect pixels in 0..255
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Convs(nn.Module):
    """One 3 x 3 convolution a map, from its features to `columns` numbers for each anchor of a cell."""

    def __init__(self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], columns: int) -> None:
        super().__init__()
        self.module_list = nn.ModuleList(
            nn.Conv2d(channels, anchors * columns, kernel_size=3, padding=1)
            for channels, anchors in zip(in_channels, anchors_per_cell, strict=True)
        )
        xavier_init(self)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [conv(x) for conv, x in zip(self.module_list, maps, strict=True)]


class Head(nn.Module):
    """The predictions as the convolutions leave them: the ops read the maps in place."""

    def __init__(self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classification_head = Convs(in_channels, anchors_per_cell, num_classes)
        self.regression_head = Convs(in_channels, anchors_per_cell, 4)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return self.classification_head(maps), self.regression_head(maps)


class SSD(nn.Module):
    """A single-shot detector.

    `model(images, targets)` returns the losses while training, `{"classification", "bbox_regression"}`, both
    scalars. Otherwise `model(images)` returns the detections: for each image a dict of `boxes` float32 [N, 4]
    xyxy in pixels of that image, `labels` int64 [N] and `scores` float32 [N], best first.

    `images` is a list of float [3, H, W] of any sizes, or a batch [B, 3, H, W]; RGB in 0..1. They are
    normalised and resized to the anchors' image size, whatever their aspect: bilinear without antialiasing,
    as in torchvision.

    `targets` is a list with for each image a dict of `boxes` float [G, 4] xyxy in pixels of the image, and
    `labels` int64 [G] in 1..num_classes - 1; 0 is the background. G may be 0. Their values are checked where
    they lie on the CPU, which costs nothing. On the GPU the check would have to wait for it, so there a box
    without area matches nothing and a label out of range gives a NaN loss.

    Under bf16 autocast the convolutions run in bf16 and the ops in fp32.

    Args:
        name: its key in `MODELS`, from which `ssdcore.weights` builds it again.
        backbone: from [B, 3, S, S] to the maps that `anchors` describes, with `out_channels`.
        num_classes: with the background.
        anchors: the default boxes.
        image_mean, image_std: of RGB in 0..1.

    Attributes:
        score_threshold, iou_threshold, topk_candidates, max_detections: of `postprocess_detections`; may be
            set at any time.
        min_negatives: of `multibox_loss`; 0, as in the paper: an image without objects teaches nothing.
    """

    anchors: Tensor  # [A, 4] xyxy
    image_mean: Tensor  # [3, 1, 1]
    image_std: Tensor  # [3, 1, 1]

    def __init__(
        self,
        name: str,
        backbone: Backbone,
        num_classes: int,
        anchors: AnchorConfig,
        image_mean: Sequence[float],
        image_std: Sequence[float],
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, background and one class, got {num_classes}")
        self.name = name
        self.num_classes = num_classes
        self.anchor_config = anchors
        self.backbone = backbone
        self.head = Head(backbone.out_channels, anchors.anchors_per_cell, num_classes)
        self.register_buffer("anchors", make_anchors(anchors), persistent=False)
        self.register_buffer("image_mean", torch.tensor(image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("image_std", torch.tensor(image_std).view(3, 1, 1), persistent=False)
        self.score_threshold = 0.01
        self.iou_threshold = 0.45
        self.topk_candidates = 400
        self.max_detections = 200
        self.min_negatives = 0

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Target] | None = None
    ) -> dict[str, Tensor] | list[DetectedObjects]:
        """The losses while training, the detections otherwise; see the class.

        Raises:
            ValueError: images or targets of another shape, dtype or number; on the CPU also a label out of
                range or a box without area, naming the image's index.
        """
        _check_images(images)
        sizes = torch.tensor([image.shape[-2:] for image in images], dtype=torch.float32)
        sizes = sizes[:, [1, 0, 1, 0]]  # [B, 4] w, h, w, h: on the CPU, since shapes need no GPU
        batch = self.resize(images)  # [B, 3, S, S]
        if self.training:
            if targets is None:
                raise ValueError("targets must be given while training, got None")
            _check_targets(targets, len(batch), self.num_classes)
            return self.loss(*self.predict(batch), targets, sizes)
        return self.detections(*self.predict(batch), sizes)

    def resize(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalise, then resize: [B, 3, S, S]."""
        if not isinstance(images, Tensor):
            return torch.cat([self.resize(image[None]) for image in images])
        images = (images - self.image_mean) / self.image_std
        size = 2 * (self.anchor_config.image_size,)
        return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear")

    def predict(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Class logits [B, a * C, H, W] and box deltas [B, a * 4, H, W], one of each for every map."""
        return self.head(self.backbone(batch))

    def loss(
        self, cls_logits: list[Tensor], box_deltas: list[Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """The losses; `sizes` [B, 4] w, h, w, h of the images that `targets` belong to, on the CPU."""
        device = self.anchors.device
        counts = torch.tensor([len(target["labels"]) for target in targets])  # [B]
        gt_offsets = F.pad(counts.cumsum(0), (1, 0)).to(device, non_blocking=True)  # [B + 1]
        scales = (self.anchor_config.image_size / sizes).repeat_interleave(counts, dim=0)  # [T, 4]
        # fp32: boxes that come from NumPy are often fp64.
        gt_boxes = torch.cat([target["boxes"] for target in targets]).to(device, torch.float32, non_blocking=True)
        gt_boxes = gt_boxes * scales.to(device, non_blocking=True)  # [T, 4] xyxy, in the anchors' frame
        gt_labels = torch.cat([target["labels"] for target in targets]).to(device, non_blocking=True)  # [T]
        matched_idxs = match_anchors(gt_boxes, gt_offsets, self.anchors)  # [B, A]
        return multibox_loss(
            cls_logits,
            box_deltas,
            matched_idxs,
            gt_boxes,
            gt_labels,
            gt_offsets,
            self.anchors,
            min_negatives=self.min_negatives,
        )._asdict()

    def postprocess(self, cls_logits: list[Tensor], box_deltas: list[Tensor]) -> Detections:
        """The detections of a batch in the anchors' frame, of fixed shapes.

        Nothing in `postprocess(*predict(batch))` waits for the GPU: it can be captured in a CUDA graph, and compiles
        as one graph.
        """
        return postprocess_detections(
            cls_logits,
            box_deltas,
            self.anchors,
            self.anchors.new_full((len(cls_logits[0]), 2), self.anchor_config.image_size),
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            topk_candidates=self.topk_candidates,
            max_detections=self.max_detections,
        )

    def detections(self, cls_logits: list[Tensor], box_deltas: list[Tensor], sizes: Tensor) -> list[DetectedObjects]:
        """What `forward` returns; `sizes` [B, 4] w, h, w, h of the images, on the CPU."""
        boxes, scores, labels, counts = self.postprocess(cls_logits, box_deltas)  # [B, D, 4] xyxy, [B, D], [B, D], [B]
        scales = (sizes / self.anchor_config.image_size).to(boxes.device, non_blocking=True)  # [B, 4]
        boxes = boxes * scales[:, None]
        return [
            {"boxes": boxes[b, :count], "labels": labels[b, :count], "scores": scores[b, :count]}
            for b, count in enumerate(counts.tolist())  # the one wait for the GPU
        ]


def ssd300_vgg16(
    num_classes: int = 91,
    weights_backbone: str | object | None = None,
    *,
    anchors: AnchorConfig = SSD300_COCO,
    image_mean: Sequence[float] = VGG_MEAN,
    image_std: Sequence[float] = VGG_STD,
) -> SSD:
    """torchvision's `ssd300_vgg16`: same parameters, same names, same answers.

    Args:
        num_classes: with the background.
        weights_backbone: None, or torchvision's weights for VGG-16 or their name: "IMAGENET1K_FEATURES".
        anchors: the default boxes.
        image_mean, image_std: of RGB in 0..1. VGG's own keep pixels at 0..255. To train from scratch give
            `IMAGENET_STD`: without batch normalisation nothing else brings the features down to unit size.
    """
    return SSD("ssd300_vgg16", VGG16(weights_backbone), num_classes, anchors, image_mean, image_std)


def ssd300_tiny(
    num_classes: int = 91,
    *,
    anchors: AnchorConfig = SSD300_COCO,
    image_mean: Sequence[float] = IMAGENET_MEAN,
    image_std: Sequence[float] = IMAGENET_STD,
) -> SSD:
    """SSD300 on a backbone that two CPU cores train in minutes; the same maps, anchors and head."""
    return SSD("ssd300_tiny", Tiny(), num_classes, anchors, image_mean, image_std)


MODELS: dict[str, Callable[..., SSD]] = {"ssd300_vgg16": ssd300_vgg16, "ssd300_tiny": ssd300_tiny}


def _check_images(images: Tensor | Sequence[Tensor]) -> None:
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must be a list of [3, H, W] or a batch [B, 3, H, W], got {list(images.shape)}")
    if len(images) == 0:
        raise ValueError("images must hold at least one image, got none")
    for i, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}] must have shape [3, H, W], got {list(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"images[{i}] must be float in 0..1, got {image.dtype}")


def _check_targets(targets: Sequence[Target], num_images: int, num_classes: int) -> None:
    if len(targets) != num_images:
        raise ValueError(f"targets must be one for each of {num_images} images, got {len(targets)}")
    for i, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(f'targets[{i}]["boxes"] must be float [G, 4], got {boxes.dtype} {list(boxes.shape)}')
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f'targets[{i}]["labels"] must be int64 [{len(boxes)}], one for each box, '
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if boxes.device.type == "cpu":
            sizes = boxes[:, 2:] - boxes[:, :2]
            bad = ~((sizes > 0) & sizes.isfinite()).all(dim=1)
            if bad.any():
                raise ValueError(
                    f'targets[{i}]["boxes"] must have a positive, finite width and height, got {boxes[bad][0].tolist()}'
                )
        if labels.device.type == "cpu" and not ((labels > 0) & (labels < num_classes)).all():
            raise ValueError(
                f'targets[{i}]["labels"] must be in 1..{num_classes - 1}, 0 being the background, got {labels.tolist()}'
            )
