"""The augmentations that recipes name: this project's, and those of other projects.

Each is a function of the image size in pixels, and returns a callable `(image, target) -> (image, target)` with the
contract of `train_transform`. Where several projects agree, torchvision's operations are taken: saturation blends with
grey and hue turns in HSV as there, while Caffe and DALI compute both in HSV.

Sources: weiliu89/caffe, branch ssd, `examples/ssd/ssd_pascal.py`, `src/caffe/util/im_transforms.cpp` and
`src/caffe/util/sampler.cpp`; pytorch/vision, `references/detection/presets.py`; NVIDIA/DeepLearningExamples,
`PyTorch/Detection/SSD/ssd/coco_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import box_iou
from torchvision.transforms import v2
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ssdcore.transforms import FILL, MAX_ZOOM_OUT, RandomPatch, Transform, finish, train_transform

__all__ = ["AUGMENTATIONS"]

MIN_IOUS = (0.1, 0.3, 0.5, 0.7, 0.9)  # of the patches in Caffe, besides "the whole image" and "any patch"
CAFFE_TRIALS = 50  # random patches for each minimum IoU


def no_augmentation(size: int) -> Transform:
    """Resize alone. As in all augmentations, an object that is then less than a pixel wide or high is dropped."""
    return v2.Compose([v2.Resize((size, size)), *finish()])


def torchvision_augmentation(size: int) -> Transform:
    """torchvision's "ssd": colours, zoom-out, a patch with 40 trials for each minimum IoU, mirror; then resize."""
    return v2.Compose(
        [
            v2.RandomPhotometricDistort(p=0.5),
            v2.RandomZoomOut(fill=FILL, side_range=(1.0, MAX_ZOOM_OUT), p=0.5),
            RandomPatch(),
            v2.RandomHorizontalFlip(p=0.5),
            v2.Resize((size, size)),
            *finish(),
        ]
    )


def caffe_augmentation(size: int) -> Transform:
    """The authors' own: colours, zoom-out, one of the patches that seven samplers find, resize, mirror."""
    return v2.Compose(
        [
            _CaffeColours(),
            v2.RandomZoomOut(fill=FILL, side_range=(1.0, MAX_ZOOM_OUT), p=0.5),
            _CaffePatch(),
            _CaffeResize(size),
            v2.RandomHorizontalFlip(p=0.5),
            *finish(),
        ]
    )


def nvidia_augmentation(size: int) -> Transform:
    """NVIDIA's for SSD300 v1.1: one trial for a patch, mirror, resize, colours of every image; no zoom-out."""
    return v2.Compose(
        [RandomPatch(trials=1), v2.RandomHorizontalFlip(p=0.5), v2.Resize((size, size)), _NvidiaColours(), *finish()]
    )


AUGMENTATIONS: dict[str, Callable[[int], Transform]] = {
    "ssd": train_transform,
    "caffe": caffe_augmentation,
    "torchvision": torchvision_augmentation,
    "nvidia": nvidia_augmentation,
    "none": no_augmentation,
}


def _uniform(low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand(()))


def _chance() -> bool:
    return bool(torch.rand(()) < 0.5)


class _CaffeColours(v2.Transform):
    """Brightness by -32..32 of 255, contrast and saturation by 0.5..1.5, hue by -36..36 degrees, each at random.

    Contrast is changed before saturation and hue or after them. It multiplies the pixels, as brightness elsewhere.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {
            "brightness": _uniform(-32 / 255, 32 / 255) if _chance() else None,
            "contrast": _uniform(0.5, 1.5) if _chance() else None,
            "saturation": _uniform(0.5, 1.5) if _chance() else None,
            "hue": _uniform(-18 / 180, 18 / 180) if _chance() else None,  # OpenCV's circle has 180 steps
            "contrast_first": _chance(),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        steps: list[tuple[str, Callable[[Any, float], Any]]] = [
            ("saturation", F.adjust_saturation),
            ("hue", F.adjust_hue),
        ]
        steps.insert(0 if params["contrast_first"] else 2, ("contrast", F.adjust_brightness))
        image = inpt
        if params["brightness"] is not None:
            shift = round(255 * params["brightness"])
            image = tv_tensors.wrap((image.to(torch.int16) + shift).clamp(0, 255).to(torch.uint8), like=inpt)
        for name, change in steps:
            if params[name] is not None:
                image = change(image, params[name])
        return image


class _NvidiaColours(v2.Transform):
    """Saturation and contrast by 0.5..1.5, brightness by 0.875..1.125, hue by half a degree: always all of them.

    Contrast changes about the value 128, and the result is brightened.
    """

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {
            "saturation": _uniform(0.5, 1.5),
            "hue": _uniform(-0.5, 0.5) / 360,
            "contrast": _uniform(0.5, 1.5),
            "brightness": _uniform(0.875, 1.125),
        }

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Image):
            return inpt
        image = F.adjust_hue(F.adjust_saturation(inpt, params["saturation"]), params["hue"])
        changed = params["brightness"] * (128 + params["contrast"] * (image.to(torch.float32) - 128))
        return tv_tensors.wrap(changed.round().clamp(0, 255).to(torch.uint8), like=inpt)


class _CaffeResize(v2.Transform):
    """Resize with an interpolation that is drawn for each image."""

    # Each with or without antialiasing. OpenCV's area interpolation averages the pixels that become one, as bilinear
    # interpolation with antialiasing does. Bicubic with antialiasing stands for Lanczos, which tensors do not have.
    modes = (
        (InterpolationMode.BILINEAR, False),
        (InterpolationMode.BILINEAR, True),
        (InterpolationMode.NEAREST, False),
        (InterpolationMode.BICUBIC, False),
        (InterpolationMode.BICUBIC, True),
    )

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = [size, size]

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"mode": self.modes[int(torch.randint(len(self.modes), ()))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        mode, antialias = params["mode"]
        return F.resize(inpt, self.size, mode, antialias=antialias)


class _CaffePatch(RandomPatch):
    """One of the patches that seven samplers find, each with the same chance; the whole image is always one of them.

    The samplers ask for an IoU of at least 0.1, 0.3, 0.5, 0.7, 0.9 with some object, and for nothing. A patch of scale
    0.3 to 1 has an aspect ratio of 0.5 to 2. Objects whose centre it does not contain are dropped.
    """

    def __init__(self) -> None:
        super().__init__(trials=CAFFE_TRIALS)

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        image = next(item for item in flat_inputs if isinstance(item, tv_tensors.Image))
        boxes = next(item for item in flat_inputs if isinstance(item, tv_tensors.BoundingBoxes)).as_subclass(Tensor)
        height, width = F.get_size(image)
        if not len(boxes):
            return {}
        found: list[dict[str, Any]] = [{}]
        for min_iou in (*MIN_IOUS, None):
            scale = self.min_scale + (self.max_scale - self.min_scale) * torch.rand(self.trials)
            # The ratio must not make a side longer than the image's.
            low = torch.maximum(torch.tensor(self.min_aspect_ratio), scale**2)
            high = torch.minimum(torch.tensor(self.max_aspect_ratio), scale**-2)
            ratio = (low + (high - low) * torch.rand(self.trials)).sqrt()
            patch_w, patch_h = width * scale * ratio, height * scale / ratio
            left = (width - patch_w) * torch.rand(self.trials)
            top = (height - patch_h) * torch.rand(self.trials)
            patches = torch.stack([left, top, left + patch_w, top + patch_h], dim=1)
            if min_iou is None:
                trial = 0
            else:
                enough = (box_iou(patches, boxes.float()) >= min_iou).any(dim=1)
                trial = int(enough.int().argmax())
                if not enough[trial]:
                    continue
            x1, y1, x2, y2 = (round(x) for x in patches[trial].tolist())
            cx, cy = (boxes[:, 0] + boxes[:, 2]) / 2, (boxes[:, 1] + boxes[:, 3]) / 2
            inside = (x1 < cx) & (cx < x2) & (y1 < cy) & (cy < y2)
            size = {"top": y1, "left": x1, "height": max(1, y2 - y1), "width": max(1, x2 - x1)}
            found.append({**size, "is_within_crop_area": inside})
        return found[int(torch.randint(len(found), ()))]
