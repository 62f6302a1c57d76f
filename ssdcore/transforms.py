"""From an image and its target to network input: the SSD paper's augmentation, and a plain resize for evaluation.

W. Liu et al., "SSD: Single Shot MultiBox Detector" (https://arxiv.org/abs/1512.02325) describes the augmentation in
section 2.2, "Data augmentation", and the zoom-out in section 3.6. The ranges are those of the authors' Caffe code. The
steps come from torchvision.transforms.v2, so random numbers come from torch's default generator, which each DataLoader
worker seeds for itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssdcore.objects import Target

__all__ = ["collate", "eval_transform", "train_transform"]

Transform = Callable[[Any, Target], tuple[Tensor, Target]]

MEAN_COLOUR = (123, 117, 104)  # RGB in 0..255, mean of ImageNet; fills the canvas of the zoom-out, as in the paper
FILL = {tv_tensors.Image: list(MEAN_COLOUR), "others": 0}
MAX_ZOOM_OUT = 4.0  # side of the largest canvas, in sides of the image; section 3.6 (16 times the area)
MIN_PATCH_SCALE = 0.3  # side of the smallest patch, in sides of the image; the authors' Caffe code
PATCH_TRIALS = 40  # random patches to try for one minimum IoU before another minimum is drawn; torchvision's default


def train_transform(size: int = 300) -> Transform:
    """Return the SSD paper's augmentation as a callable `(image, target) -> (image, target)`.

    The steps, in this order:

    1. With probability 0.5, zoom out: place the image on a larger canvas of the mean colour, up to 4 times the side.
    2. Crop a patch. Draw either "the whole image" or a minimum IoU of 0, 0.1, 0.3, 0.5, 0.7 or 0.9. For a minimum IoU,
       draw random patches until one contains the centre of some object and has at least this IoU with it. After
       `PATCH_TRIALS` patches, draw another minimum.
    3. Resize to size x size, without keeping the aspect ratio.
    4. With probability 0.5, mirror.
    5. Change brightness, contrast, saturation, hue and the order of the channels, each with probability 0.5.
    6. Clip the boxes to the image, and drop the objects whose centre the patch cut off or that are now less than a
       pixel wide or high.

    The paper changes the colours first. They are changed after the resize here, because on a 640 x 480 image that
    touches 3.4 times fewer pixels. Up to rounding, the result differs in two ways: contrast changes about the mean of
    the patch instead of the whole image, and the canvas of the zoom-out is coloured too.

    The input `image` is a `tv_tensors.Image` uint8 [3, H, W]; the output is float32 [3, size, size] in 0..1. `target`
    is a dict as `DetectionDataset` gives it. In the output, `boxes` are in pixels of the new image, and the dropped
    objects are removed from `boxes`, `labels` and `ignore`. Images without objects are treated like any others.
    """
    return v2.Compose(
        [
            # Without this step, zooming out from a 12-megapixel photograph would take half a gigabyte. No detail is
            # lost, because the smallest patch still has `size` pixels per side.
            _ShrinkToFit(math.ceil(size / MIN_PATCH_SCALE)),
            v2.RandomZoomOut(fill=FILL, side_range=(1.0, MAX_ZOOM_OUT), p=0.5),
            RandomPatch(min_scale=MIN_PATCH_SCALE, trials=PATCH_TRIALS),
            v2.Resize((size, size)),
            v2.RandomHorizontalFlip(p=0.5),
            v2.RandomPhotometricDistort(p=0.5),
            *finish(),
        ]
    )


def finish() -> list[Any]:
    """Return the last steps of an augmentation: convert to float, clip the boxes, drop objects cut off or tiny."""
    return [
        v2.ToDtype(torch.float32, scale=True),
        v2.ClampBoundingBoxes(),  # SanitizeBoundingBoxes would drop boxes that extend beyond the image
        v2.SanitizeBoundingBoxes(labels_getter=_per_object),
        v2.ToPureTensor(),
    ]


def eval_transform(size: int = 300) -> Transform:
    """Return a resize to size x size as a callable `(image, target) -> (image, target)`.

    The aspect ratio is not kept. The output image is float32 [3, size, size] in 0..1, `target["boxes"]` are in pixels
    of the new image, and no object is dropped.
    """
    return v2.Compose([v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor | list[Tensor], list[Target]]:
    """Collate items of a dataset for a DataLoader.

    Returns:
        The images, as one tensor [B, 3, H, W] if all have the same size and otherwise as a list; and the targets.
    """
    images = [image for image, _ in batch]
    targets = [target for _, target in batch]
    if len({image.shape for image in images}) == 1:
        return torch.stack(images), targets
    return images, targets


class _ShrinkToFit(v2.Transform):
    """Shrink images whose shorter side exceeds `limit` pixels, so that it becomes `limit`. Keeps the aspect ratio."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(next(item for item in flat_inputs if isinstance(item, tv_tensors.Image)))
        return {"shrink": min(height, width) > self.limit}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, [self.limit]) if params["shrink"] else inpt


class RandomPatch(v2.RandomIoUCrop):
    """torchvision's RandomIoUCrop, ten times faster, with the same distribution of patches.

    All trials for one minimum IoU are drawn and checked together. An image without boxes stays whole, while in
    RandomIoUCrop every trial fails.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(item for item in flat_inputs if isinstance(item, tv_tensors.Image))
        boxes = next(item for item in flat_inputs if isinstance(item, tv_tensors.BoundingBoxes))
        height, width = F.get_size(image)
        x1, y1, x2, y2 = boxes.as_subclass(Tensor).unbind(-1)  # each [G]
        if not len(boxes):
            return {}
        while True:
            min_iou = self.options[int(torch.randint(len(self.options), ()))]
            if min_iou >= 1:  # stands for the whole image in torchvision
                return {}
            # [2, trials, 1] width and height of the patches, as fractions of the image's
            scale = self.min_scale + (self.max_scale - self.min_scale) * torch.rand(2, self.trials, 1)
            patch_w, patch_h = (width * scale[0]).floor(), (height * scale[1]).floor()  # each [trials, 1]
            left = ((width - patch_w) * torch.rand(self.trials, 1)).floor()
            top = ((height - patch_h) * torch.rand(self.trials, 1)).floor()
            right, bottom = left + patch_w, top + patch_h

            cx, cy = (x1 + x2) / 2, (y1 + y2) / 2
            inside = (left < cx) & (cx < right) & (top < cy) & (cy < bottom)  # [trials, G]
            overlap_w = (torch.minimum(right, x2) - torch.maximum(left, x1)).clamp(min=0)
            overlap_h = (torch.minimum(bottom, y2) - torch.maximum(top, y1)).clamp(min=0)
            overlap = overlap_w * overlap_h
            iou = overlap / (patch_w * patch_h + (x2 - x1) * (y2 - y1) - overlap)
            aspect = patch_w / patch_h
            valid_aspect = (self.min_aspect_ratio <= aspect) & (aspect <= self.max_aspect_ratio)
            valid = valid_aspect & inside & (iou >= min_iou)  # [trials, G]
            trial = int(valid.any(dim=1).int().argmax())  # the first valid trial, or 0 if none is valid
            if valid[trial].any():
                return {
                    "top": int(top[trial]),
                    "left": int(left[trial]),
                    "height": int(patch_h[trial]),
                    "width": int(patch_w[trial]),
                    "is_within_crop_area": inside[trial],
                }


def _per_object(inputs: tuple[Any, Target]) -> tuple[Tensor, Tensor]:
    """The tensors from which SanitizeBoundingBoxes removes the dropped objects, besides the boxes."""
    _, target = inputs
    return target["labels"], target["ignore"]
