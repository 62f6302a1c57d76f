"""A single-shot detector: a backbone, a head with two convolutions per feature map, and the ops of `ssdcore.kernels`.

The ops match anchors and compute the loss in training, and turn the head's outputs into detections otherwise.

Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016). Parameters, inputs and outputs have the names that
torchvision's `ssd300_vgg16` gives them, so that its weights, its training scripts and torchmetrics work unchanged.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssdcore.anchors import SSD300_COCO, AnchorConfig, make_anchors
from ssdcore.kernels import Detections, match_anchors, multibox_loss, postprocess_detections
from ssdcore.models.backbone import Backbone, xavier_init
from ssdcore.objects import DetectedObjects, GroundTruth, Target, ragged

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of RGB in 0..1
IMAGENET_STD = (0.229, 0.224, 0.225)  # of RGB in 0..1


class Convs(nn.Module):
    """One 3 x 3 convolution per feature map. It predicts `columns` numbers for each anchor of a cell."""

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
    """The prediction layers: class logits [B, a * C, H, W] and box deltas [B, a * 4, H, W] for each feature map.

    The outputs are not permuted or concatenated, because the ops of `ssdcore.kernels` read them in place.
    """

    def __init__(self, in_channels: Sequence[int], anchors_per_cell: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.classification_head = Convs(in_channels, anchors_per_cell, num_classes)
        self.regression_head = Convs(in_channels, anchors_per_cell, 4)

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return self.classification_head(maps), self.regression_head(maps)


class SSD(nn.Module):
    """A single-shot detector.

    In training mode, `model(images, targets)` returns the losses, a dict of two scalars: `classification` and
    `bbox_regression`.

    In eval mode, `model(images)` returns the detected objects, one dict per image: `boxes` fp32 [N, 4] xyxy in pixels
    of that image, `labels` int64 [N] and `scores` fp32 [N], sorted by descending score.

    `images` is a list of float tensors [3, H, W] of any sizes, or one batch [B, 3, H, W], RGB in 0..1. The model
    normalises them and resizes them to the anchors' image size, without keeping the aspect ratio. As in torchvision,
    the interpolation is bilinear without antialiasing.

    `targets` is a list of one dict per image: `boxes` float [G, 4] xyxy in pixels of the image, and `labels` int64 [G]
    in 1..num_classes - 1, because 0 is the background. G may be 0. The model checks the values of targets on the CPU,
    where the check costs almost nothing. It does not check values on a GPU, because it would have to wait for the
    GPU. There, a box without area matches no anchor, and a label out of range gives a NaN loss.

    Under bf16 autocast the convolutions run in bf16 and the ops in fp32.

    `torch.compile(model, fullgraph=True)` compiles both modes, without checks of the targets' values. Compiled code
    fits one number of dicts, in `targets` or in the result, and one size where a size is 0 or 1. So each new number of
    images costs a compilation, and in training each new set of images with no object or one. `torch.compile` gives up
    after eight. `ground_truth` joins the targets to three tensors, `infer` returns tensors, and neither problem occurs.

    Args:
        backbone: computes from [B, 3, S, S] the feature maps that `anchors` describes.
        num_classes: number of classes including the background.
        anchors: positions and shapes of the anchors.
        image_mean, image_std: mean and standard deviation of RGB in 0..1, for the normalisation.
        name: the model's name in `MODELS`, from which `ssdcore.weights` builds the model again.

    Attributes:
        score_threshold, iou_threshold, topk_candidates, max_detections: arguments of `postprocess_detections`. They
            may be changed at any time.
        classes: the `num_classes - 1` names that `save_pretrained` and `push_to_hub` write; label i + 1 is the name at
            index i. They are those of the file that the model was loaded from, otherwise "1", "2", ..., and may be set.
        category_ids: the dataset's id of each class, which is written too; by default the labels.
        clip_before_nms: whether boxes are clipped to the image before NMS, as in torchvision and the paper's code, or
            after it. It may be changed at any time.
        min_negatives: argument of `multibox_loss`. The default is 0 as in the paper, so that an image without objects
            does not contribute to the loss.
        normalizer: argument of `multibox_loss`. The default is "batch" as in the paper; NVIDIA's SSD has "image".

    Raises:
        ValueError: `num_classes` is less than 2; or the backbone has another number of feature maps than `anchors`.
    """

    anchors: Tensor  # [A, 4] xyxy
    image_mean: Tensor  # [3, 1, 1]
    image_std: Tensor  # [3, 1, 1]

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        anchors: AnchorConfig = SSD300_COCO,
        image_mean: Sequence[float] = IMAGENET_MEAN,
        image_std: Sequence[float] = IMAGENET_STD,
        *,
        name: str = "custom",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2 (the background and one class), got {num_classes}")
        num_maps, expected = len(backbone.out_channels), len(anchors.grid_sizes)
        if num_maps != expected:
            raise ValueError(f"backbone must have {expected} feature maps, as the anchors have, got {num_maps}")
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
        self.clip_before_nms = True
        self.min_negatives = 0
        self.normalizer: Literal["batch", "image"] = "batch"
        self.category_ids = tuple(range(1, num_classes))
        self.classes = tuple(map(str, self.category_ids))

    def forward(
        self, images: Tensor | Sequence[Tensor], targets: Sequence[Target] | GroundTruth | None = None
    ) -> dict[str, Tensor] | list[DetectedObjects]:
        """Return the losses in training mode and the detected objects in eval mode, as the class docstring describes.

        Raises:
            ValueError: the shape, dtype or number of images or targets is wrong; or a target on the CPU has a label
                out of range or a box without area. The message names the index of the image.
        """
        _check_images(images)
        sizes = _sizes(images)  # [B, 4] w, h, w, h
        batch = self.resize(images)  # [B, 3, S, S]
        if self.training:
            if targets is None:
                raise ValueError("targets must be given in training mode, got None")
            _check_targets(targets, batch.shape[0], self.num_classes)
            if isinstance(targets, GroundTruth):
                return self._loss(*self.predict(batch), targets)
            return self.loss(*self.predict(batch), targets, sizes)
        return self.detections(*self.predict(batch), sizes)

    def ground_truth(self, images: Tensor | Sequence[Tensor], targets: Sequence[Target]) -> GroundTruth:
        """Check the targets of a batch and join them to three tensors, which `model(images, ...)` takes in their place.

        With these and one batch of images, two compilations of `model` serve all numbers of images and objects and all
        image sizes, except that a batch of one image and a size equal to the model's own cost one each.

        Args:
            images: those of the training step, of which only the shapes matter here.
            targets: one per image, in pixels of the image.

        Raises:
            ValueError: as in `model(images, targets)`.
        """
        _check_images(images)
        _check_targets(targets, len(images), self.num_classes)
        return self._ground_truth(targets, _sizes(images))

    def infer(self, images: Tensor | Sequence[Tensor]) -> Detections:
        """Return the detections in pixels of each image, with fixed shapes.

        In eval mode, these are the objects that `model(images)` returns as dicts. Nothing here waits for the GPU. Two
        compilations of `infer` serve all batches of images, with the exceptions that `ground_truth` names.

        Args:
            images: a list of float tensors [3, H, W], or one batch [B, 3, H, W], RGB in 0..1.

        Raises:
            ValueError: the shape, dtype or number of images is wrong.
        """
        _check_images(images)
        return self._in_pixels(self.postprocess(*self.predict(self.resize(images))), _sizes(images))

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "SSD":
        """Load a model that `save_pretrained` or `push_to_hub` wrote. Needs `pip install 'ssdcore[hub]'`.

        Args:
            source: a folder, or the name of a repository on the Hugging Face Hub, such as "user/model".
            options: `device`, where the model is placed, by default the CPU; and the options of huggingface_hub's
                `from_pretrained`: `revision`, `token`, `cache_dir`, `force_download` and `local_files_only`.

        Returns:
            The model in eval mode, with its `classes` and `category_ids`.

        Raises:
            ImportError: huggingface_hub is missing.
            ValueError: as in `ssdcore.weights.load_model`.
        """
        from ssdcore.hub import HubModel

        detector: SSD = HubModel.from_pretrained(source, **options).detector
        return detector

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write the model to a folder, as a repository of the Hugging Face Hub holds it.

        `model.safetensors` is the file that `ssdcore.weights.save_weights` writes, and holds all that `load_model`
        needs. `config.json` says the same to people. Needs `pip install 'ssdcore[hub]'`.

        Args:
            folder: it is made if it does not exist.
            options: those of huggingface_hub's `save_pretrained`.

        Raises:
            ImportError: huggingface_hub is missing.
            ValueError: `classes` or `category_ids` has the wrong number of entries.
        """
        from ssdcore.hub import HubModel

        hub_model = HubModel(self)
        hub_model.save_pretrained(folder, **{"config": hub_model.config(), **options})

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face Hub, and return the address of the commit.

        Args:
            repo_id: the repository, such as "user/model". It is made if it does not exist.
            options: those of huggingface_hub's `push_to_hub`: `private`, `token`, `commit_message` and others.

        Raises:
            ImportError: huggingface_hub is missing.
            ValueError: `classes` or `category_ids` has the wrong number of entries.
        """
        from ssdcore.hub import HubModel

        hub_model = HubModel(self)
        address: str = hub_model.push_to_hub(repo_id, **{"config": hub_model.config(), **options})
        return address

    def resize(self, images: Tensor | Sequence[Tensor]) -> Tensor:
        """Normalise the images and then resize them to [B, 3, S, S], where S is the anchors' image size."""
        if not isinstance(images, Tensor):
            return torch.cat([self.resize(image[None]) for image in images])
        images = (images - self.image_mean) / self.image_std
        size = 2 * (self.anchor_config.image_size,)
        return images if images.shape[-2:] == size else F.interpolate(images, size, mode="bilinear")

    def predict(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Return class logits [B, a * C, H, W] and box deltas [B, a * 4, H, W], one of each per feature map."""
        return self.head(self.backbone(batch))

    def loss(
        self, cls_logits: list[Tensor], box_deltas: list[Tensor], targets: Sequence[Target], sizes: Tensor
    ) -> dict[str, Tensor]:
        """Match the anchors with the targets and compute the losses.

        Args:
            cls_logits, box_deltas: from `predict`.
            targets: one per image, in pixels of the original image.
            sizes: [B, 4] w, h, w, h of the original images in pixels, on the CPU.

        Returns:
            The fp32 scalars `classification` and `bbox_regression`.
        """
        return self._loss(cls_logits, box_deltas, self._ground_truth(targets, sizes))

    def _ground_truth(self, targets: Sequence[Target], sizes: Tensor) -> GroundTruth:
        boxes, labels, offsets = ragged(targets, self.anchors.device)
        scales = self.anchor_config.image_size / sizes  # [B, 4]
        counts = torch.tensor([len(target["labels"]) for target in targets])  # [B], on the CPU, as `sizes`
        scales = scales.repeat_interleave(counts, dim=0, output_size=boxes.shape[0])  # [T, 4]
        boxes = boxes * scales.to(boxes.device, non_blocking=True)  # in the anchors' frame
        return GroundTruth(boxes, labels, offsets)

    def _loss(self, cls_logits: list[Tensor], box_deltas: list[Tensor], truths: GroundTruth) -> dict[str, Tensor]:
        matched_idxs = match_anchors(truths.boxes, truths.offsets, self.anchors)  # [B, A]
        return multibox_loss(
            cls_logits,
            box_deltas,
            matched_idxs,
            truths.boxes,
            truths.labels,
            truths.offsets,
            self.anchors,
            min_negatives=self.min_negatives,
            normalizer=self.normalizer,
        )._asdict()

    def postprocess(self, cls_logits: list[Tensor], box_deltas: list[Tensor]) -> Detections:
        """Return the detections of a batch in pixels of the resized image, with fixed shapes.

        Nothing in `postprocess(*predict(batch))` waits for the GPU, so it can be captured in a CUDA graph and
        `torch.compile` compiles it as one graph.
        """
        size = self.anchor_config.image_size
        # The op always clips. To clip later, it gets a frame in which the image is surrounded by eight of its size.
        border = 0 if self.clip_before_nms else size
        found = postprocess_detections(
            cls_logits,
            box_deltas,
            self.anchors + border if border else self.anchors,
            self.anchors.new_full((cls_logits[0].shape[0], 2), size + 2 * border),
            score_threshold=self.score_threshold,
            iou_threshold=self.iou_threshold,
            topk_candidates=self.topk_candidates,
            max_detections=self.max_detections,
        )
        # Not `_replace`, because PyTorch 2.11 fails to compile a function that returns what it made.
        return Detections((found.boxes - border).clamp(0, size), *found[1:]) if border else found

    def detections(self, cls_logits: list[Tensor], box_deltas: list[Tensor], sizes: Tensor) -> list[DetectedObjects]:
        """Return the detected objects of each image in pixels of the original image.

        Args:
            cls_logits, box_deltas: from `predict`.
            sizes: [B, 4] w, h, w, h of the original images in pixels, on the CPU.
        """
        found = self._in_pixels(self.postprocess(cls_logits, box_deltas), sizes)
        # `narrow`, because PyTorch 2.11's compiler fails at a slice whose length it does not know.
        return [
            {
                "boxes": found.boxes[b].narrow(0, 0, count),
                "labels": found.labels[b].narrow(0, 0, count),
                "scores": found.scores[b].narrow(0, 0, count),
            }
            for b, count in enumerate(found.num_detections.tolist())  # the only wait for the GPU
        ]

    def _in_pixels(self, found: Detections, sizes: Tensor) -> Detections:
        """`found`, with its boxes in pixels of the original images, whose `sizes` are [B, 4] w, h, w, h."""
        scales = (sizes / self.anchor_config.image_size).to(found.boxes.device, non_blocking=True)  # [B, 4]
        return Detections(found.boxes * scales[:, None], *found[1:])


def _sizes(images: Tensor | Sequence[Tensor]) -> Tensor:
    """The sizes of the images in pixels, [B, 4] w, h, w, h; on the CPU, because shapes are known there."""
    if isinstance(images, Tensor):
        batch, _, height, width = images.shape
        return torch.tensor([width, height, width, height], dtype=torch.float32).expand(batch, 4)
    return torch.stack([_sizes(image[None])[0] for image in images])


def _check_images(images: Tensor | Sequence[Tensor]) -> None:
    if isinstance(images, Tensor) and images.dim() != 4:
        raise ValueError(f"images must be a list of [3, H, W] or a batch [B, 3, H, W], got {list(images.shape)}")
    # `shape`, because `len` would make the batch size a constant of an exported program.
    if (images.shape[0] if isinstance(images, Tensor) else len(images)) == 0:
        raise ValueError("images must contain at least one image, got 0")
    # The images of a batch have one shape. A loop over them would compile the model anew for each batch size.
    for i, image in enumerate(images[:1] if isinstance(images, Tensor) else images):
        if image.dim() != 3 or image.shape[0] != 3 or 0 in image.shape:
            raise ValueError(f"images[{i}] must have shape [3, H, W], got {list(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"images[{i}] must be float in 0..1, got {image.dtype}")


def _check_targets(targets: Sequence[Target] | GroundTruth, num_images: int, num_classes: int) -> None:
    if isinstance(targets, GroundTruth):
        num_targets = targets.offsets.shape[0] - 1
        if num_targets != num_images:
            raise ValueError(f"targets must be those of {num_images} images, got those of {num_targets}")
        return
    if len(targets) != num_images:
        raise ValueError(f"targets must have {num_images} entries, one per image, got {len(targets)}")
    for i, target in enumerate(targets):
        boxes, labels = target["boxes"], target["labels"]
        if boxes.dim() != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
            raise ValueError(f'targets[{i}]["boxes"] must be float [G, 4], got {boxes.dtype} {list(boxes.shape)}')
        if labels.shape != boxes.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(
                f'targets[{i}]["labels"] must be int64 [{len(boxes)}], one per box, '
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if torch.compiler.is_compiling():
            continue  # a value that decides about an error cannot be compiled
        if boxes.device.type == "cpu":
            sizes = boxes[:, 2:] - boxes[:, :2]
            invalid = ~((sizes > 0) & sizes.isfinite()).all(dim=1)
            if invalid.any():
                example = boxes[invalid][0].tolist()
                raise ValueError(f'targets[{i}]["boxes"] must have positive, finite sizes, got {example}')
        if labels.device.type == "cpu" and not ((labels > 0) & (labels < num_classes)).all():
            raise ValueError(
                f'targets[{i}]["labels"] must be in 1..{num_classes - 1} (0 is the background), got {labels.tolist()}'
            )
