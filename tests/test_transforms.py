"""Augmentation moves boxes with their pixels, and keeps labels with their boxes."""

import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from ssdcore.transforms import RandomPatch, collate, eval_transform, train_transform

SIZE = 100
WHITE, RED = 1, 2  # labels, by the colour of the object


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On images this small threads gain nothing, and on a busy machine the threads wait long for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_sample(boxes: Any, height: int = 120, width: int = 160) -> tuple[Any, dict[str, Any]]:
    """A black image with a white rectangle for the first box and a red one for the second."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    for (x1, y1, x2, y2), channels in zip(boxes, (slice(0, 3), slice(0, 1)), strict=False):
        image[channels, max(y1, 0) : y2, max(x1, 0) : x2] = 255
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.tensor([WHITE, RED][: len(boxes)], dtype=torch.int64),
        "ignore": torch.tensor([False, True][: len(boxes)], dtype=torch.bool),
        "image_id": 5,
    }
    return tv_tensors.Image(image), target


APART = [[20, 30, 60, 90], [90, 10, 150, 100]]


def steps(size: int) -> list[Any]:
    transform: Any = train_transform(size)
    return list(transform.transforms)


def extent(mask: Tensor) -> Tensor:
    """The box around the true pixels of a mask [H, W], xyxy."""
    y, x = mask.nonzero(as_tuple=True)
    return torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1]).float()


def test_boxes_move_with_their_pixels_and_labels_with_their_boxes() -> None:
    geometry = v2.Compose([t for t in steps(SIZE) if not isinstance(t, v2.RandomPhotometricDistort)])
    torch.manual_seed(0)
    seen = {WHITE: 0, RED: 0}
    for _ in range(150):
        image, target = geometry(*make_sample(APART))
        assert len(target["boxes"]) == len(target["labels"]) == len(target["ignore"])
        assert torch.equal(target["ignore"], target["labels"] == RED)
        for box, label in zip(target["boxes"], target["labels"].tolist(), strict=True):
            # The canvas of the zoom-out has at most 123 / 255 in red and green.
            mask = (image[0] > 0.7) & ((image[1] > 0.7) == (label == WHITE))
            if label == RED:
                mask &= image[2] < 0.1
            assert (extent(mask) - box).abs().max() <= 2, (extent(mask), box)
            seen[label] += 1
    assert min(seen.values()) > 50  # otherwise the loop above checked almost nothing


def test_train_transform_returns_valid_network_input() -> None:
    transform = train_transform(SIZE)
    torch.manual_seed(0)
    for _ in range(50):
        image, target = transform(*make_sample(APART))
        assert image.shape == (3, SIZE, SIZE) and image.dtype == torch.float32
        assert image.min() >= 0 and image.max() <= 1
        boxes = target["boxes"]
        assert boxes.dtype == torch.float32 and len(boxes) >= 1
        assert boxes.min() >= 0 and boxes.max() <= SIZE and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        assert target["image_id"] == 5


def test_every_random_step_happens() -> None:
    """Zoom-out, crop, mirroring and colour changes each show in some of 200 runs."""
    transform = train_transform(SIZE)
    torch.manual_seed(0)
    smaller = larger = mirrored = coloured = 0
    resized = 40 * SIZE / 160  # width of the white box if the image is only resized
    for _ in range(200):
        image, target = transform(*make_sample(APART))
        boxes = dict(zip(target["labels"].tolist(), target["boxes"], strict=True))
        if WHITE in boxes:
            zoom = (boxes[WHITE][2] - boxes[WHITE][0]) / resized
            smaller += bool(zoom < 0.8)
            larger += bool(zoom > 1.2)
        if len(boxes) == 2:
            mirrored += bool(boxes[WHITE][0] > boxes[RED][0])
        if RED in boxes:
            red = boxes[RED]
            x, y = ((red[:2] + red[2:]) / 2).long().tolist()
            coloured += bool((image[:, y, x] - torch.tensor([1.0, 0, 0])).abs().max() > 0.1)
    assert min(smaller, larger, mirrored, coloured) > 10


def test_images_without_boxes_are_transformed() -> None:
    torch.manual_seed(0)
    for _ in range(20):
        image, target = train_transform(SIZE)(*make_sample([]))
        assert image.shape == (3, SIZE, SIZE)
        assert target["boxes"].shape == (0, 4) and target["labels"].shape == (0,) and target["ignore"].shape == (0,)


def test_boxes_that_extend_beyond_the_image_are_kept() -> None:
    torch.manual_seed(0)
    counts = [len(train_transform(SIZE)(*make_sample([[-20, 20, 90, 140]]))[1]["boxes"]) for _ in range(30)]
    assert counts == [1] * 30  # every patch contains the centre of an object, and there is only one object


def test_large_images_are_shrunk_first() -> None:
    image, target = make_sample([[300, 600, 900, 1800]], height=3000, width=2000)
    shrunk, after = steps(30)[0](image, target)
    assert shrunk.shape == (3, 150, 100)  # 30 / 0.3
    assert after["boxes"].tolist() == [[15, 30, 45, 90]]
    small = make_sample(APART, height=120, width=90)
    assert steps(30)[0](*small)[0].shape == (3, 120, 90)


@pytest.mark.parametrize("min_iou", [0.0, 0.3, 0.7])
def test_patches_have_the_distribution_of_torchvisions(min_iou: float) -> None:
    image, target = make_sample([[30, 20, 130, 110], [0, 0, 30, 30]])
    draws = 300
    patches: dict[type, Tensor] = {}
    for kind, seed in ((RandomPatch, 0), (v2.RandomIoUCrop, 1)):
        torch.manual_seed(seed)
        crop = kind(sampler_options=[min_iou])
        all_params = [crop.make_params([image, target["boxes"]]) for _ in range(draws)]
        patches[kind] = torch.tensor(
            [[p["left"], p["top"], p["width"], p["height"], *p["is_within_crop_area"].tolist()] for p in all_params],
            dtype=torch.float32,
        )
    actual, expected = patches[RandomPatch], patches[v2.RandomIoUCrop]
    error = (actual.var(0) / draws + expected.var(0) / draws).sqrt() + 1e-6
    assert ((actual.mean(0) - expected.mean(0)).abs() < 4 * error).all()
    spread = (actual.std(0) / expected.std(0))[:4]
    assert ((spread > 0.8) & (spread < 1.25)).all()


def test_the_same_seed_gives_the_same_result_after_pickling() -> None:
    results = []
    for transform in (train_transform(SIZE), pickle.loads(pickle.dumps(train_transform(SIZE)))):
        torch.manual_seed(3)
        results.append(transform(*make_sample(APART)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1]["boxes"], results[1][1]["boxes"])


def test_eval_transform_only_resizes() -> None:
    image, target = eval_transform(50)(*make_sample([[-16, 12, 80, 60], [80, 60, 160, 120]], 120, 160))
    assert image.shape == (3, 50, 50) and image.dtype == torch.float32
    torch.testing.assert_close(target["boxes"], torch.tensor([[-5.0, 5, 25, 25], [25, 25, 50, 50]]))
    assert image[:, 15, 10].tolist() == [1, 1, 1] and image[:, 40, 40].tolist() == [1, 0, 0]
    assert target["labels"].tolist() == [1, 2]


def test_collate_stacks_images_of_one_size_and_lists_others() -> None:
    small, large = (torch.zeros(3, 4, 4), {"a": 1}), (torch.zeros(3, 5, 4), {"a": 2})
    images, targets = collate([small, small])
    assert isinstance(images, Tensor) and images.shape == (2, 3, 4, 4)
    assert targets == [{"a": 1}, {"a": 1}]
    images, targets = collate([small, large])
    assert isinstance(images, list) and [image.shape for image in images] == [(3, 4, 4), (3, 5, 4)]
