"""Average precision, checked against values computed by hand, against pycocotools, and for general properties."""

import contextlib
import io
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from ssdcore.data import DetectionDataset, open_dataset
from ssdcore.evaluate import evaluate_detections, to_coco_results, voc_average_precision

SIZE = 1000
CATEGORY_IDS = (3, 18, 90)  # of the classes cat, dog and eel

Box = Sequence[float]
Annotated = tuple[Box, int, bool]  # xyxy, label, ignore
Detected = tuple[Box, int, float]  # xyxy, label, score


def coco_content(images: Sequence[Sequence[Annotated]]) -> dict[str, Any]:
    """COCO annotations of the objects of each image; image i has the id 10 * (i + 1)."""
    return {
        "images": [{"id": 10 * i, "file_name": "a", "width": SIZE, "height": SIZE} for i in range(1, len(images) + 1)],
        "categories": [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, ("cat", "dog", "eel"), strict=True)],
        "annotations": [
            {
                "id": 1000 * i + k,
                "image_id": 10 * i,
                "category_id": CATEGORY_IDS[label - 1],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1),
                "iscrowd": int(ignore),
            }
            for i, objects in enumerate(images, start=1)
            for k, ((x1, y1, x2, y2), label, ignore) in enumerate(objects)
        ],
    }


def make_dataset(images: Sequence[Sequence[Annotated]]) -> DetectionDataset:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "annotations").mkdir()
        (root / "annotations/instances_val.json").write_text(json.dumps(coco_content(images)))
        (root / "a").touch()
        return open_dataset(root, "val")


def make_detections(images: Mapping[int, Sequence[Detected]]) -> dict[int, dict[str, torch.Tensor]]:
    return {
        image_id: {
            "boxes": torch.tensor([box for box, _, _ in detected], dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor([label for _, label, _ in detected], dtype=torch.int64),
            "scores": torch.tensor([score for _, _, score in detected]),
        }
        for image_id, detected in images.items()
    }


def evaluate(dataset: DetectionDataset, images: Mapping[int, Sequence[Detected]]) -> dict[str, Any]:
    return evaluate_detections(dataset, make_detections(images), quiet=True)


A, B, C = (0, 0, 100, 100), (200, 0, 300, 100), (400, 0, 500, 100)
NOWHERE, NOWHERE_ELSE = (700, 700, 800, 800), (850, 850, 950, 950)


@pytest.mark.parametrize(
    ("recall", "precision", "eleven_point", "area"),
    [
        ([], [], 0.0, 0.0),
        ([1.0], [1.0], 1.0, 1.0),
        ([0.5], [1.0], 6 / 11, 0.5),  # reaches the recalls 0, 0.1, ..., 0.5
        ([0.0, 0.5, 1.0], [0.0, 1 / 2, 2 / 3], 2 / 3, 2 / 3),  # the later precision 2/3 replaces 1/2
        ([1 / 3, 1 / 3, 2 / 3, 2 / 3], [1, 1 / 2, 2 / 3, 1 / 2], (4 + 3 * 2 / 3) / 11, 1 / 3 + 2 / 9),
        ([0.3], [1.0], 4 / 11, 0.3),  # a recall of 3 of 10 reaches 0.3
        ([6 / 10], [1.0], 7 / 11, 0.6),
        ([7 / 10], [1.0], 8 / 11, 0.7),
    ],
)
def test_voc_average_precision_equals_values_computed_by_hand(
    recall: list[float], precision: list[float], eleven_point: float, area: float
) -> None:
    curve = np.array(recall), np.array(precision, dtype=np.float64)
    assert voc_average_precision(*curve, eleven_point=True) == pytest.approx(eleven_point)
    assert voc_average_precision(*curve, eleven_point=False) == pytest.approx(area)


def test_all_metrics_equal_values_computed_by_hand() -> None:
    """By score: a true, a false, a true and a false positive. One object is missed. Every true positive is exact."""
    dataset = make_dataset([[(A, 1, False), (B, 1, False)], [(C, 1, False)], []])
    results = evaluate(dataset, {10: [(A, 1, 0.9), (NOWHERE, 1, 0.6)], 20: [(C, 1, 0.7)], 30: [(C, 1, 0.8)]})
    # Of COCO's 101 recalls, 0.00..0.33 have precision 1 and 0.34..0.66 have precision 2/3.
    for name in ("AP", "AP50", "AP75"):
        assert results[name] == pytest.approx((34 + 33 * 2 / 3) / 101)
    assert results["AR1"] == results["AR100"] == pytest.approx(2 / 3)
    assert results["APs"] is None and results["APm"] is None  # an object of 100 x 100 pixels is large
    assert results["APl"] == pytest.approx(results["AP"])
    assert results["AP_per_class"] == {"cat": pytest.approx(results["AP"]), "dog": None, "eel": None}
    assert results["AP50_per_class"]["cat"] == pytest.approx(results["AP50"])
    assert results["VOC07"] == results["VOC07_per_class"]["cat"] == pytest.approx((4 + 3 * 2 / 3) / 11)
    assert results["VOC12"] == results["VOC12_per_class"]["cat"] == pytest.approx(1 / 3 + 2 / 9)
    assert results["VOC12_per_class"]["dog"] is None
    json.dumps(results, allow_nan=False)


def test_means_include_only_classes_with_objects() -> None:
    dataset = make_dataset([[(A, 1, False), (B, 3, False)]])
    results = evaluate(dataset, {10: [(A, 1, 0.9), (B, 2, 0.8)]})
    assert results["AP50_per_class"] == {"cat": pytest.approx(1), "dog": None, "eel": 0}
    assert results["VOC07"] == results["VOC12"] == 0.5 == pytest.approx(results["AP50"])


@pytest.mark.parametrize(("height", "ap"), [(50, 1.0), (49, 0.0)])
def test_voc_iou_threshold_is_inclusive(height: int, ap: float) -> None:
    results = evaluate(make_dataset([[(A, 1, False)]]), {10: [((0, 0, 100, height), 1, 0.9)]})
    assert results["VOC07"] == results["VOC12"] == ap


def test_voc_gives_a_detected_object_no_second_choice() -> None:
    """The second detected object overlaps an already assigned object most.

    It is a false positive in VOC's metrics. COCO's metrics assign it to the other annotated object.
    """
    dataset = make_dataset([[((0, 0, 100, 100), 1, False), ((0, 0, 100, 80), 1, False)]])
    results = evaluate(dataset, {10: [((0, 0, 100, 100), 1, 0.9), ((0, 0, 100, 95), 1, 0.8)]})
    assert results["VOC12"] == 0.5
    assert results["AP50"] == pytest.approx(1)


def test_objects_of_another_class_are_never_matched() -> None:
    results = evaluate(make_dataset([[(A, 1, False), (B, 2, False)]]), {10: [(A, 2, 0.9), (B, 2, 0.8)]})
    assert results["VOC12_per_class"] == {"cat": 0, "dog": 0.5, "eel": None}
    assert results["AP50_per_class"] == {"cat": 0, "dog": pytest.approx(0.5), "eel": None}


def test_duplicates_are_false_positives() -> None:
    dataset = make_dataset([[(A, 1, False), (B, 1, False)]])
    results = evaluate(dataset, {10: [(A, 1, 0.9), (A, 1, 0.8), (B, 1, 0.7)]})
    assert results["VOC12"] == pytest.approx(1 / 2 + 1 / 2 * 2 / 3)


def test_ignored_objects_count_neither_as_missed_nor_as_false_positives() -> None:
    dataset = make_dataset([[(A, 1, False), (B, 1, True)]])
    for extra in ([], [(B, 1, 0.9)], [(B, 1, 0.9), (B, 1, 0.8)]):
        results = evaluate(dataset, {10: [(A, 1, 0.5), *extra]})
        assert results["VOC07"] == results["VOC12"] == 1 == pytest.approx(results["AP50"])
    only_ignored = evaluate(make_dataset([[(B, 1, True)]]), {10: [(B, 1, 0.9), (A, 1, 0.5)]})
    assert only_ignored["AP"] is None and only_ignored["VOC07"] is None and only_ignored["VOC12"] is None


def test_images_without_annotated_or_detected_objects_count() -> None:
    detected = {10: [(A, 1, 0.5)]}
    assert evaluate(make_dataset([[(A, 1, False)], []]), detected)["AP50"] == pytest.approx(1)
    false_positive = evaluate(make_dataset([[(A, 1, False)], []]), detected | {20: [(A, 1, 0.9)]})
    assert false_positive["AP50"] == pytest.approx(0.5) and false_positive["VOC12"] == pytest.approx(0.5)
    missed = evaluate(make_dataset([[(A, 1, False)], [(A, 1, False)]]), detected)
    assert missed["AP50"] == pytest.approx(51 / 101) and missed["VOC12"] == pytest.approx(0.5)


@pytest.mark.parametrize("detected", [{}, {10: []}])
def test_without_detected_objects_metrics_are_zero_or_undefined(detected: dict[int, list[Detected]]) -> None:
    results = evaluate(make_dataset([[(A, 1, False)]]), detected)
    assert results["AP"] == results["AP50"] == results["AR100"] == results["VOC07"] == results["VOC12"] == 0
    no_objects = evaluate(make_dataset([[]]), detected)
    assert no_objects["AP"] is None and no_objects["AR100"] is None and no_objects["VOC07"] is None


def random_objects(rng: np.random.Generator) -> tuple[list[list[Annotated]], dict[int, list[Detected]]]:
    """Annotated objects of eight images, and detected objects near them."""
    images, detections = [], {}
    for i in range(1, 9):
        corner, side = rng.uniform(0, 700, (6, 2)), rng.uniform(10, 200, (6, 2))
        boxes = np.concatenate([corner, corner + side], axis=1).astype(np.float32)
        labels = rng.integers(1, 4, 6).tolist()
        images.append(
            [(box.tolist(), label, bool(rng.random() < 0.2)) for box, label in zip(boxes, labels, strict=True)]
        )
        moved = np.concatenate([boxes, boxes]) + rng.normal(0, 12, (12, 4)).astype(np.float32)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2] + 1)
        detections[10 * i] = [
            (box.tolist(), label, float(score))
            for box, label, score in zip(moved, labels * 2, rng.random(12), strict=True)
        ]
    return images, detections


def test_coco_metrics_equal_those_of_pycocotools_on_files(tmp_path: Path) -> None:
    images, detected = random_objects(np.random.default_rng(0))
    dataset, detections = make_dataset(images), make_detections(detected)
    results = evaluate_detections(dataset, detections, quiet=True)

    gt_file, results_file = tmp_path / "gt.json", tmp_path / "results.json"
    gt_file.write_text(json.dumps(coco_content(images)))
    results_file.write_text(json.dumps(to_coco_results(dataset, detections)))
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(gt_file))
        evaluation = COCOeval(gt, gt.loadRes(str(results_file)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
    assert 0.1 < results["AP"] < 0.9
    for name, value in zip(names, evaluation.stats, strict=True):
        assert results[name] == pytest.approx(value, abs=1e-9), name
    for name in ("AP", "AP50"):
        assert np.mean(list(results[f"{name}_per_class"].values())) == pytest.approx(results[name])


def voc_curve_by_devkit(images: Any, detections: Mapping[int, Sequence[Detected]], label: int) -> tuple[Any, Any]:
    """Recall and precision of one class, by the loop of the VOC devkit, on plain boxes."""
    ranked = sorted(((s, i, b) for i, dets in detections.items() for b, c, s in dets if c == label), reverse=True)
    objects = {10 * (i + 1): [o for o in image if o[1] == label] for i, image in enumerate(images)}
    matched = set()
    true, false = [], []
    for _, image_id, box in ranked:
        best, best_iou = None, -math.inf
        for k, (gt_box, _, _) in enumerate(objects[image_id]):
            width = min(box[2], gt_box[2]) - max(box[0], gt_box[0])
            height = min(box[3], gt_box[3]) - max(box[1], gt_box[1])
            if width > 0 and height > 0:
                areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (box, gt_box)]
                iou = width * height / (sum(areas) - width * height)
                if iou > best_iou:
                    best, best_iou = k, iou
        is_true = is_false = 0
        if best is not None and best_iou >= 0.5:
            if not objects[image_id][best][2]:
                is_true = int((image_id, best) not in matched)
                is_false = 1 - is_true
                matched.add((image_id, best))
        else:
            is_false = 1
        true.append(is_true)
        false.append(is_false)
    tp, fp = np.cumsum(true), np.cumsum(false)
    total = sum(not ignore for image in objects.values() for _, _, ignore in image)
    return tp / total, tp / np.maximum(tp + fp, 1)


@pytest.mark.parametrize("seed", range(3))
def test_voc_metrics_equal_those_of_the_devkit_loop(seed: int) -> None:
    images, detected = random_objects(np.random.default_rng(seed))
    results = evaluate(make_dataset(images), detected)
    for label, name in enumerate(("cat", "dog", "eel"), start=1):
        curve = voc_curve_by_devkit(images, detected, label)
        for metric, eleven_point in (("VOC07", True), ("VOC12", False)):
            expected = voc_average_precision(*curve, eleven_point=eleven_point)
            assert results[f"{metric}_per_class"][name] == pytest.approx(expected)


@st.composite
def grids(draw: st.DrawFn) -> list[list[Annotated]]:
    """One to three images whose objects lie on a 5 x 5 grid, so that they do not overlap."""
    images: list[list[Annotated]] = []
    for _ in range(draw(st.integers(1, 3))):
        positions = draw(st.lists(st.integers(0, 24), unique=True, max_size=5))
        images.append(
            [
                ((100 * (p % 5), 100 * (p // 5), 100 * (p % 5) + 60, 100 * (p // 5) + 60), label, False)
                for p, label in zip(positions, draw(st.lists(st.integers(1, 3), min_size=5)), strict=False)
            ]
        )
    return images


def perfect(images: Sequence[Sequence[Annotated]]) -> dict[int, list[Detected]]:
    """Every object detected exactly, with distinct scores in 0.5..1."""
    total = sum(map(len, images))
    scores = iter(np.linspace(1, 0.5, total))
    return {10 * i: [(box, c, float(next(scores))) for box, c, _ in image] for i, image in enumerate(images, 1)}


MAIN_METRICS = ("AP", "AP50", "AP75", "AR100", "VOC07", "VOC12")


@settings(max_examples=25, deadline=None)
@given(grids())
def test_perfect_detections_score_one(images: list[list[Annotated]]) -> None:
    results = evaluate(make_dataset(images), perfect(images))
    expected = 1.0 if any(images) else None
    assert all(results[name] == (expected and pytest.approx(expected)) for name in MAIN_METRICS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_order_of_detected_objects_does_not_matter(seed: int, random: Any) -> None:
    images, detected = random_objects(np.random.default_rng(seed))
    dataset = make_dataset(images)
    shuffled_images = random.sample(list(detected.items()), len(detected))
    shuffled = {i: random.sample(dets, len(dets)) for i, dets in shuffled_images}
    assert evaluate(dataset, shuffled) == evaluate(dataset, detected)


@settings(max_examples=25, deadline=None)
@given(grids(), st.data())
def test_low_scoring_false_positives_never_raise_a_metric(images: list[list[Annotated]], data: st.DataObject) -> None:
    images = [*images, []]
    detected = {i: dets[: data.draw(st.integers(0, 5))] for i, dets in perfect(images).items()}
    dataset = make_dataset(images)
    before = evaluate(dataset, detected)
    image_id = data.draw(st.sampled_from(sorted(detected)))
    label = data.draw(st.integers(1, 3))
    score = data.draw(st.floats(0.0, 0.49))
    detected[image_id] = [*detected[image_id], (NOWHERE, label, score), (NOWHERE_ELSE, label, score / 2)]
    after = evaluate(dataset, detected)
    for name in MAIN_METRICS:
        if before[name] is not None:
            assert after[name] <= before[name] + 1e-12


def test_coco_results_have_xywh_boxes_and_category_ids() -> None:
    detections = make_detections({7: [((1, 2, 4, 8), 2, 0.5), ((0, 0, 1, 1), 1, 0.25)]})
    expected = [
        {"image_id": 7, "category_id": 18, "bbox": [1, 2, 3, 6], "score": 0.5},
        {"image_id": 7, "category_id": 3, "bbox": [0, 0, 1, 1], "score": 0.25},
    ]
    assert to_coco_results(CATEGORY_IDS, detections) == expected
    assert to_coco_results(make_dataset([[]]), detections) == expected
    json.dumps(expected)


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    dataset, detections = make_dataset([[(A, 1, False)]]), make_detections({10: [(A, 1, 0.5)]})
    evaluate_detections(dataset, detections, quiet=True)
    assert capsys.readouterr().out == ""
    evaluate_detections(dataset, detections)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 13  # COCO's twelve metrics, and one line with VOC's means
    assert printed[0].endswith("= 1.000") and printed[-1].endswith("VOC07 1.000, VOC12 1.000")


@pytest.mark.parametrize(
    ("image_id", "change", "message"),
    [
        (11, {}, "image_id 11"),
        (10, {"labels": torch.tensor([0])}, r"must be in 1\.\.3"),
        (10, {"labels": torch.tensor([4])}, r"must be in 1\.\.3"),
        (10, {"boxes": torch.zeros(1, 5)}, r"must have shape \[1, 4\], got \[1, 5\]"),
        (10, {"labels": torch.tensor([1, 1])}, r"must have shape \[1\], got \[2\]"),
        (10, {"scores": torch.tensor([math.nan])}, "must be finite"),
        (10, {"boxes": torch.full((1, 4), math.inf)}, "must be finite"),
    ],
)
def test_malformed_detections_raise_value_error(image_id: int, change: dict[str, Any], message: str) -> None:
    detected = make_detections({10: [(A, 1, 0.5)]})[10] | change
    with pytest.raises(ValueError, match=message):
        evaluate_detections(make_dataset([[(A, 1, False)]]), {image_id: detected})
