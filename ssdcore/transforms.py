"""From photographs to network input: the SSD paper's augmentation, and the plain resize for evaluation.

W. Liu et al., "SSD: Single Shot MultiBox Detector" (https://arxiv.org/abs/1512.02325): section 2.2, "Data
augmentation", and the zoom-out of section 3.6, with the ranges of the authors' Caffe code. Built from
torchvision.transforms.v2, so random numbers come from torch's generator: seeded per DataLoader worker.
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

MEAN_COLOUR = (123, 117, 104)  # RGB of 255, mean of ImageNet; the paper's filler for zoom-out
MAX_ZOOM_OUT = 4.0  # side of the canvas, in sides of the image; section 3.6: 16 times the area
MIN_PATCH_SCALE = 0.3  # sides of the smallest patch, in sides of the image; the authors' Caffe code
PATCH_TRIALS = 40  # random patches tried for one overlap before another is drawn; torchvision's number


def train_transform(size: int = 300) -> Transform:
    """The SSD paper's augmentation: `(image, target) -> (image, target)`.

    In turn: zoom out on the mean colour (p = 0.5, up to 4 times the side); a patch that is the whole image,
    or overlaps some object by IoU 0.1, 0.3, 0.5, 0.7 or 0.9, or is random; resize to size x size,
    whatever the aspect; mirror (p = 0.5); brightness, contrast, saturation, hue and channel order (p = 0.5
    each); and drop the objects whose centre the patch cut off.

    The colours are distorted last, unlike in the paper, which starts with them: on a 640 x 480 image that
    touches 3.4 times fewer pixels. It is the same distortion up to rounding, save that contrast turns about
    the mean of the patch and that the zoom-out's border is coloured too.

    Images without boxes pass through like any other. `image` is a `tv_tensors.Image` uint8 [3, H, W]; it
    becomes float32 [3, size, size] in 0..1. `target` is a dict as `DetectionDataset` gives it: `boxes`
    become pixels of the new image, and `boxes`, `labels` and `ignore` lose the same rows.
    """
    fill = {tv_tensors.Image: list(MEAN_COLOUR), "others": 0}
    return v2.Compose(
        [
            # The smallest patch of it still has `size` pixels a side, so nothing is lost,
            # and zooming out of a 12-megapixel photograph does not take half a gigabyte.
            _ShrinkToFit(math.ceil(size / MIN_PATCH_SCALE)),
            v2.RandomZoomOut(fill=fill, side_range=(1.0, MAX_ZOOM_OUT), p=0.5),
            _RandomPatch(min_scale=MIN_PATCH_SCALE, trials=PATCH_TRIALS),
            v2.Resize((size, size)),
            v2.RandomHorizontalFlip(p=0.5),
            v2.RandomPhotometricDistort(p=0.5),
            v2.ToDtype(torch.float32, scale=True),
            v2.ClampBoundingBoxes(),  # SanitizeBoundingBoxes drops whole what reaches out of the image
            v2.SanitizeBoundingBoxes(labels_getter=_per_object),
            v2.ToPureTensor(),
        ]
    )


def eval_transform(size: int = 300) -> Transform:
    """Resize to size x size, whatever the aspect: `(image, target) -> (image, target)`.

    `image` becomes float32 [3, size, size] in 0..1; `target["boxes"]` become pixels of the new image, and
    nothing is dropped.
    """
    return v2.Compose([v2.Resize((size, size)), v2.ToDtype(torch.float32, scale=True), v2.ToPureTensor()])


def collate(batch: Sequence[tuple[Tensor, Target]]) -> tuple[Tensor | list[Tensor], list[Target]]:
    """Batch items for a DataLoader: images [B, 3, H, W] if all have one size, else a list; the targets."""
    images = [image for image, _ in batch]
    targets = [target for _, target in batch]
    if len({image.shape for image in images}) == 1:
        return torch.stack(images), targets
    return images, targets


class _ShrinkToFit(v2.Transform):
    """Resize images whose shorter side exceeds `limit` pixels, so that it is `limit`, keeping the aspect."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = F.get_size(next(item for item in flat_inputs if isinstance(item, tv_tensors.Image)))
        return {"shrink": min(height, width) > self.limit}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return F.resize(inpt, [self.limit]) if params["shrink"] else inpt


class _RandomPatch(v2.RandomIoUCrop):
    """RandomIoUCrop with the trials of one overlap drawn and judged together: the same distribution, at a
    tenth of the time, and an image without boxes stays whole instead of failing every trial."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(item for item in flat_inputs if isinstance(item, tv_tensors.Image))
        boxes = next(item for item in flat_inputs if isinstance(item, tv_tensors.BoundingBoxes))
        height, width = F.get_size(image)
        x1, y1, x2, y2 = boxes.as_subclass(Tensor).unbind(-1)  # each [G]
        if not len(boxes):
            return {}
        while True:
            min_iou = self.options[int(torch.randint(len(self.options), ()))]
            if min_iou >= 1:  # torchvision's code for the whole image
                return {}
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
            good = (self.min_aspect_ratio <= aspect) & (aspect <= self.max_aspect_ratio)
            good = good & inside & (iou >= min_iou)
            trial = int(good.any(dim=1).int().argmax())  # the first good one, else 0
            if good[trial].any():
                return {
                    "top": int(top[trial]),
                    "left": int(left[trial]),
                    "height": int(patch_h[trial]),
                    "width": int(patch_w[trial]),
                    "is_within_crop_area": inside[trial],
                }


def _per_object(inputs: tuple[Any, Target]) -> tuple[Tensor, Tensor]:
    _, target = inputs
    return target["labels"], target["ignore"]
