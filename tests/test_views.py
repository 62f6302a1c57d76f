"""Several views of an image: mirror images and models of other sizes, averaged."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssdcore.anchors import SSD300_COCO
from ssdcore.data import open_dataset
from ssdcore.detect import detect_dataset
from ssdcore.kernels import Detections
from ssdcore.models import SSD, ssd300_tiny
from ssdcore.stopwatch import Stopwatch
from ssdcore.synthetic import make_synthetic
from ssdcore.transforms import eval_transform, train_transform
from ssdcore.views import detect_batch, merge

SIZES = torch.tensor([[200, 100], [300, 300]])  # height and width
TINY_512 = replace(SSD300_COCO, image_size=512, grid_sizes=(64, 32, 16, 8, 4, 2), steps=(8, 16, 32, 64, 128, 256))


def make_model(seed: int, num_classes: int = 4, anchors: Any = SSD300_COCO) -> SSD:
    torch.manual_seed(seed)
    model = ssd300_tiny(num_classes, anchors=anchors).eval()
    model.score_threshold = 0.2
    return model


def make_images(seed: int, size: int = 300) -> Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed))


def view(*detections: tuple[Sequence[float], int, float], pad: int = 1) -> Detections:
    """The detections of one image (box, label, score), padded."""
    count = len(detections)
    return Detections(
        torch.tensor([[*(list(box) for box, _, _ in detections), *[[0.0] * 4] * pad]]).float(),
        torch.tensor([[*(score for _, _, score in detections), *[0.0] * pad]]),
        torch.tensor([[*(label for _, label, _ in detections), *[-1] * pad]]),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor([[*range(count), *[-1] * pad]]),
    )


def test_scores_and_boxes_of_the_same_object_are_averaged() -> None:
    first = view(([0, 0, 10, 10], 1, 0.9), ([50, 50, 60, 60], 1, 0.8), pad=2)
    second = view(([0, 0, 10, 12], 1, 0.3), ([50, 50, 60, 60], 2, 0.6))
    merged = merge([first, second], iou_threshold=0.5, max_detections=5)
    assert merged.num_detections.tolist() == [3]
    torch.testing.assert_close(merged.scores, torch.tensor([[0.6, 0.4, 0.3, 0, 0]]))
    assert merged.labels.tolist() == [[1, 1, 2, -1, -1]]
    assert merged.anchor_idxs.tolist() == [[0, 1, 1, -1, -1]]
    expected = torch.tensor([[0, 0, 10, (0.9 * 10 + 0.3 * 12) / 1.2], [50, 50, 60, 60], [50, 50, 60, 60]])
    torch.testing.assert_close(merged.boxes[0], torch.cat([expected, torch.zeros(2, 4)]))


def test_a_view_gives_its_best_box_for_an_object() -> None:
    first = view(([0, 0, 10, 10], 1, 0.8))
    second = view(([0, 0, 10, 8], 1, 0.4), ([0, 0, 8, 10], 1, 0.2))
    merged = merge([first, second], iou_threshold=0.5, max_detections=5)
    torch.testing.assert_close(merged.scores[0, :1], torch.tensor([(0.8 + 0.4) / 2]))


def test_the_average_decides_the_order_and_nms_the_limit() -> None:
    first = view(([0, 0, 10, 10], 1, 0.9), ([20, 20, 30, 30], 1, 0.8), ([40, 40, 50, 50], 1, 0.7))
    second = view(([20, 20, 30, 30], 1, 0.6))
    merged = merge([first, second], iou_threshold=0.5, max_detections=2)
    torch.testing.assert_close(merged.scores, torch.tensor([[0.7, 0.45]]))
    assert merged.boxes[0, 0].tolist() == pytest.approx([20, 20, 30, 30])


def test_a_box_without_area_stays_as_it_is() -> None:
    merged = merge([view(([5, 5, 5, 9], 1, 0.5)), view(([5, 5, 5, 9], 1, 0.4))], iou_threshold=0.5, max_detections=3)
    assert merged.boxes[0].tolist() == [[5, 5, 5, 9]] * 2 + [[0] * 4]
    assert merged.scores[0].tolist() == pytest.approx([0.25, 0.2, 0])


def test_views_without_detections_give_none() -> None:
    merged = merge([view(pad=2), view(pad=3)], iou_threshold=0.5, max_detections=2)
    assert merged.num_detections.tolist() == [0] and merged.labels.tolist() == [[-1, -1]]


def test_the_average_of_equal_views_is_the_view() -> None:
    model, images = make_model(0), make_images(0)
    with torch.inference_mode():
        found = model.postprocess(*model.predict(model.resize(images)))
    assert found.num_detections.min() > 10
    merged = merge([found, found], model.iou_threshold, model.max_detections)
    # Boxes and scores pass through a sum and a division, which round.
    torch.testing.assert_close(merged.scores, found.scores)
    torch.testing.assert_close(merged.boxes, found.boxes)
    assert (merged.labels == found.labels).all() and (merged.num_detections == found.num_detections).all()


def test_one_view_gives_what_the_model_detects() -> None:
    model, images = make_model(0), make_images(0)
    with torch.inference_mode():
        expected = model(images.to(memory_format=torch.channels_last))
    for detected, plain, (height, width) in zip(
        detect_batch([model], {300: images}, SIZES), expected, SIZES.tolist(), strict=True
    ):
        assert len(plain["scores"]) > 10
        assert (detected["scores"] == plain["scores"]).all() and (detected["labels"] == plain["labels"]).all()
        assert (detected["boxes"] == plain["boxes"] * (torch.tensor([width, height] * 2) / 300)).all()


def test_with_flip_a_mirrored_image_has_the_mirrored_objects() -> None:
    model, images = make_model(0), make_images(1)
    plain = detect_batch([model], {300: images}, SIZES, flip=True)
    mirrored = detect_batch([model], {300: images.flip(-1)}, SIZES, flip=True)
    one_view = detect_batch([model], {300: images}, SIZES)
    for objects, others, alone, (_, width) in zip(plain, mirrored, one_view, SIZES.tolist(), strict=True):
        assert len(objects["scores"]) > 10 and not torch.equal(objects["scores"], alone["scores"])
        x1, y1, x2, y2 = others["boxes"].unbind(-1)
        # The two sums of two views have another order, and 300 - x rounds.
        torch.testing.assert_close(objects["scores"], others["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            objects["boxes"], torch.stack([width - x2, y1, width - x1, y2], dim=-1), rtol=1e-4, atol=1e-2
        )


def test_models_of_two_sizes_see_the_images_at_their_own_size(tmp_path: Path) -> None:
    dataset = open_dataset(make_synthetic(tmp_path / "shapes", train=1, val=3, progress=False), "val")
    small, large = make_model(0), make_model(1, anchors=TINY_512)
    stopwatch = Stopwatch(torch.device("cpu"))
    both = detect_dataset([small, large], dataset, quiet=True, stopwatch=stopwatch)
    assert list(stopwatch.seconds) == ["reading", "network", "postprocess"]
    assert both.keys() == set(dataset.image_ids.tolist())
    sizes = torch.tensor([dataset.image_size(i) for i in range(3)])
    batches = {size: torch.stack([eval_transform(size)(*dataset[i])[0] for i in range(3)]) for size in (300, 512)}
    expected = detect_batch([small, large], batches, sizes)
    for image_id, objects in zip(dataset.image_ids.tolist(), expected, strict=True):
        assert all((both[image_id][name] == objects[name]).all() for name in objects)


def test_models_with_other_numbers_of_classes_raise_value_error(tmp_path: Path) -> None:
    dataset = open_dataset(make_synthetic(tmp_path / "shapes", train=1, val=1, progress=False), "val")
    with pytest.raises(ValueError, match=r"same number of classes, got \[4, 3\]"):
        detect_dataset([make_model(0), make_model(1, num_classes=3)], dataset, quiet=True)
    with pytest.raises(ValueError, match=r"at least one .* got \[\]"):
        detect_dataset([], dataset, quiet=True)


def test_images_are_resized_as_in_training() -> None:
    trained, evaluated = (
        next(step for step in transform.transforms if type(step).__name__ == "Resize").__dict__
        for transform in (train_transform(300), eval_transform(300))
    )
    for name in ("size", "interpolation", "max_size", "antialias"):
        assert trained[name] == evaluated[name]


def test_a_stopwatch_counts_each_part(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)

    def slow(seconds: Sequence[float]) -> Any:
        nonlocal now
        for number in seconds:
            now += number
            yield number

    stopwatch = Stopwatch(torch.device("cpu"))
    for _ in stopwatch.waits("reading", slow([1.0, 2.0])):
        with stopwatch.part("network"):
            now += 10.0
        now += 100.0
    with pytest.raises(KeyError), stopwatch.part("network"):
        now += 5.0
        raise KeyError
    assert stopwatch.seconds == {"reading": 3.0, "network": 25.0}
