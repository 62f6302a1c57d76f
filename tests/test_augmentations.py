"""Each augmentation keeps the contract of `train_transform`, and has its project's ranges."""

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision import tv_tensors

from ssdcore.augmentations import AUGMENTATIONS, _CaffeColours, _CaffePatch, _NvidiaColours
from ssdcore.objects import Target


def example(side: int = 120) -> tuple[tv_tensors.Image, Target]:
    image = tv_tensors.Image(torch.randint(0, 256, (3, side, 2 * side), dtype=torch.uint8))
    boxes = torch.tensor([[10.0, 10, 60, 90], [100, 20, 230, 110]])
    return image, {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(side, 2 * side)),
        "labels": torch.tensor([1, 2]),
        "ignore": torch.tensor([False, True]),
        "image_id": 7,
    }


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_returns_an_image_of_the_size_and_boxes_inside_it(name: str) -> None:
    transform = AUGMENTATIONS[name](64)
    torch.manual_seed(0)
    numbers = set()
    for _ in range(40):
        image, target = transform(*example())
        assert image.shape == (3, 64, 64) and image.dtype == torch.float32
        assert type(image) is torch.Tensor and 0 <= image.min() <= image.max() <= 1
        boxes = target["boxes"]
        assert len(boxes) == len(target["labels"]) == len(target["ignore"]) and target["image_id"] == 7
        assert ((boxes >= 0) & (boxes <= 64)).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        numbers.add(len(boxes))
    # Caffe's patch that asks for nothing may contain the centre of no object.
    assert numbers == {"none": {2}, "caffe": {0, 1, 2}}.get(name, {1, 2})


def test_without_augmentation_boxes_are_scaled_alone() -> None:
    first, second = (AUGMENTATIONS["none"](60)(*example())[1]["boxes"] for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first[0], torch.tensor([2.5, 5, 15, 45]))


def test_caffes_patches_keep_the_centre_rule_and_the_ranges() -> None:
    image, target = example()
    patch = _CaffePatch()
    torch.manual_seed(0)
    drawn = [patch.make_params([image, target["boxes"]]) for _ in range(300)]
    whole = sum(not params for params in drawn)
    assert 300 / 7 * 0.6 < whole < 300 / 2  # one of at most seven, and seldom of only two
    for params in filter(None, drawn):
        top, left, height, width = (params[name] for name in ("top", "left", "height", "width"))
        assert 0 <= top <= top + height <= 120 and 0 <= left <= left + width <= 240
        ratio = (width / 240) / (height / 120)
        assert 0.48 < ratio < 2.08  # 0.5 to 2 before rounding to pixels
        assert 0.29**2 < height * width / (120 * 240) <= 1
        centres = [(35, 50), (165, 65)]
        inside = [left < x < left + width and top < y < top + height for x, y in centres]
        assert params["is_within_crop_area"].tolist() == inside
    empty = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(120, 240))
    assert patch.make_params([image, empty]) == {}


def test_caffes_colours_have_the_documented_ranges() -> None:
    torch.manual_seed(0)
    drawn = [_CaffeColours().make_params([]) for _ in range(400)]
    for name, low, high in (("brightness", -0.126, 0.126), ("contrast", 0.5, 1.5), ("hue", -0.1, 0.1)):
        values = [params[name] for params in drawn if params[name] is not None]
        assert 150 < len(values) < 250 and low <= min(values) and max(values) <= high
    grey = tv_tensors.Image(torch.full((3, 2, 2), 250, dtype=torch.uint8))
    params = {"brightness": 10 / 255, "contrast": None, "saturation": None, "hue": None, "contrast_first": True}
    assert int(_CaffeColours().transform(grey, params).max()) == 255  # clipped, not wrapped
    params = {**params, "brightness": -0.1, "contrast": 0.5}
    assert _CaffeColours().transform(grey, params).unique().tolist() == [(250 - 26) // 2]


def test_nvidias_contrast_changes_about_the_middle() -> None:
    grey = tv_tensors.Image(torch.full((3, 2, 2), 228, dtype=torch.uint8))
    params = {"saturation": 1.0, "hue": 0.0, "contrast": 0.5, "brightness": 1.1}
    changed = _NvidiaColours().transform(grey, params)
    assert changed.unique().tolist() == [round(1.1 * (128 + 0.5 * 100))]
