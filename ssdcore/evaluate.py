"""How good detections are: COCO's twelve numbers, and Pascal VOC's average precision of 2007 and 2012."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchvision.ops import box_iou

from ssdcore.data import DetectionDataset

__all__ = ["evaluate_detections", "to_coco_results", "voc_average_precision"]

Detections = Mapping[int, Mapping[str, Tensor]]

VOC_MIN_IOU = 0.5  # VOC devkit, VOCopts.minoverlap
COCO_NAMES = (  # in the order of COCOeval.stats
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
TRUE_POSITIVE, FALSE_POSITIVE, NEITHER = 1, 0, -1


def evaluate_detections(dataset: DetectionDataset, detections: Detections, *, quiet: bool = False) -> dict[str, Any]:
    """Score detections against a dataset's annotations, over all of its images.

    Images without detections count (their objects are missed), and so do images without objects (what is
    found there is false). The dataset's `ignore` boxes are neither to be found nor wrong to find: COCO's
    metrics treat them as crowds, VOC's as difficult. Equal scores are ranked by image, in the dataset's
    order, then as given.

    COCO's numbers are those of pycocotools' COCOeval, which reads the 100 best detections of an image and
    class. VOC's follow the devkit's VOCevaldet.m: a detection takes the object of its class that it overlaps
    most, and is true if their IoU is >= 0.5 and no better-scored one took that object. (The devkit compares
    with `>=`; Python ports of it often with `>`.) The IoU is that of plain boxes, without the devkit's
    extra pixel.

    Args:
        dataset: as `open_dataset` gives it.
        detections: by image_id: `boxes` [K, 4] xyxy in pixels of the image, `labels` [K] in 1..n as in the
            dataset's targets, `scores` [K]. Images may be absent.
        quiet: print nothing, instead of pycocotools' summary and the VOC means.

    Returns:
        A dict that JSON can hold. What is not defined, for want of objects, is None.

        - `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`, `AR100`, `ARs`, `ARm`, `ARl`: COCO's
        - `AP_per_class`, `AP50_per_class`: the first two by class name
        - `VOC07`, `VOC12`: mean over the classes of the 11-point and of the area average precision
        - `VOC07_per_class`, `VOC12_per_class`: the same by class name

    Raises:
        ValueError: detections of an image that the dataset has not, of wrong shape, with labels outside
            1..n, or not finite.
    """
    _check(dataset, detections)
    results = _coco_metrics(dataset, detections, quiet) | _voc_metrics(dataset, detections)
    if not quiet:
        means = (f"{name} {results[name]:.3f}" for name in ("VOC07", "VOC12") if results[name] is not None)
        print(" Mean average precision at IoU=0.50:", ", ".join(means) or "not defined")
    return results


def to_coco_results(
    dataset_or_category_ids: DetectionDataset | Sequence[int], detections: Detections
) -> list[dict[str, Any]]:
    """Detections in COCO's form for results, ready for `json.dump`.

    Args:
        dataset_or_category_ids: a dataset, or its `category_ids`: label k becomes `category_ids[k - 1]`.
        detections: as `evaluate_detections` takes them.

    Returns:
        One dict a detection: `image_id`, `category_id`, `bbox` [x, y, width, height] and `score`.

    Source: https://cocodataset.org/#format-results
    """
    category_ids = getattr(dataset_or_category_ids, "category_ids", dataset_or_category_ids)
    return [
        {
            "image_id": int(image_id),
            "category_id": category_ids[label - 1],
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for image_id, found in detections.items()
        for (x1, y1, x2, y2), label, score in zip(
            found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True
        )
    ]


def voc_average_precision(recall: np.ndarray, precision: np.ndarray, eleven_point: bool) -> float:
    """Average precision of one class, as the Pascal VOC devkit defines it.

    Args:
        recall: [N] in 0..1, rising, after each detection in order of falling score.
        precision: [N] in 0..1, after the same detections.
        eleven_point: VOC 2007: the mean over the recalls r = 0, 0.1, ..., 1 of the best precision at a
            recall >= r, 0 where there is none. Else VOC 2010 and later: the area under the precision,
            made falling by taking at each recall the best precision at any recall >= it.

    The eleven recalls are the nearest floating-point numbers to k / 10, so that a recall of exactly 3 / 10
    reaches the third; the devkit's own 0:0.1:1 holds 0.30000000000000004 and misses it.

    Source: VOCevaldet.m and VOCap.m of the VOC devkits of 2007 and 2012.
    """
    if eleven_point:
        levels = np.arange(11) / 10
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in levels]))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * best))


def _check(dataset: DetectionDataset, detections: Detections) -> None:
    unknown = set(detections) - set(dataset.image_ids.tolist())
    if unknown:
        raise ValueError(f"detections of image_id {min(unknown)}, which the dataset does not have")
    for image_id, found in detections.items():
        where = f"detections[{image_id}]"
        count = len(found["scores"])
        for name, shape in {"boxes": (count, 4), "labels": (count,), "scores": (count,)}.items():
            if tuple(found[name].shape) != shape:
                raise ValueError(f"{where}[{name!r}] must have shape {list(shape)}, got {list(found[name].shape)}")
            if not torch.isfinite(found[name]).all():
                raise ValueError(f"{where}[{name!r}] must be finite")
        labels = found["labels"]
        if count and not 1 <= int(labels.min()) <= int(labels.max()) <= len(dataset.classes):
            raise ValueError(f"{where}['labels'] must be in 1..{len(dataset.classes)}, got {labels.tolist()}")


def _coco_metrics(dataset: DetectionDataset, detections: Detections, quiet: bool) -> dict[str, Any]:
    truth = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        columns = (target["boxes"], target["labels"], target["ignore"], dataset.areas(index))
        for (x1, y1, x2, y2), label, ignore, area in zip(*(c.tolist() for c in columns), strict=True):
            truth.append(
                {
                    "image_id": target["image_id"],
                    "category_id": dataset.category_ids[label - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(ignore),
                }
            )
    found = to_coco_results(dataset, detections)
    for result in found:
        result |= {"area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}

    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_coco(dataset, truth), _coco(dataset, found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        evaluation.summarize()

    # [IoU thresholds, recalls, classes, areas, maximal detections]: all areas, 100 detections
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    column = {category_id: k for k, category_id in enumerate(evaluation.params.catIds)}
    by_class = {
        name: precision[:, :, column[category_id]]
        for name, category_id in zip(dataset.classes, dataset.category_ids, strict=True)
    }
    return {
        **{name: _defined(value) for name, value in zip(COCO_NAMES, evaluation.stats, strict=True)},
        "AP_per_class": {name: _defined(values.mean()) for name, values in by_class.items()},
        "AP50_per_class": {name: _defined(values[0].mean()) for name, values in by_class.items()},
    }


def _coco(dataset: DetectionDataset, annotations: list[dict[str, Any]]) -> Any:
    """Annotations or detections as pycocotools wants them; unlike COCO.loadRes, it takes none at all."""
    coco = COCO()
    # Ids begin at 1: COCOeval takes a match with the annotation 0 for none.
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    coco.dataset = {
        "images": [{"id": image_id} for image_id in dataset.image_ids.tolist()],
        "categories": [{"id": category_id} for category_id in dataset.category_ids],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _defined(value: float) -> float | None:
    return None if value == -1 else float(value)


def _voc_metrics(dataset: DetectionDataset, detections: Detections) -> dict[str, Any]:
    objects = np.zeros(len(dataset.classes), np.int64)  # to be found, by class
    rows = [(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))]  # scores, labels, outcomes
    for index in range(len(dataset)):
        target = dataset.target(index)
        objects += np.bincount(target["labels"][~target["ignore"]] - 1, minlength=len(objects))
        found = detections.get(target["image_id"])
        if found is not None:
            rows.append(
                (
                    found["scores"].double().cpu().numpy(),
                    found["labels"].cpu().numpy(),
                    _voc_outcomes(target, found),
                )
            )
    scores, labels, outcomes = (np.concatenate(column) for column in zip(*rows, strict=True))

    metrics: dict[str, Any] = {}
    for name, eleven_point in {"VOC07": True, "VOC12": False}.items():
        per_class: dict[str, float | None] = {}
        for label, class_name in enumerate(dataset.classes, start=1):
            counted = (labels == label) & (outcomes != NEITHER)
            order = np.argsort(-scores[counted], kind="stable")
            true_positives = np.cumsum(outcomes[counted][order] == TRUE_POSITIVE)
            total = objects[label - 1]
            per_class[class_name] = None
            if total:
                recall = true_positives / total
                precision = true_positives / np.arange(1, len(order) + 1)
                per_class[class_name] = voc_average_precision(recall, precision, eleven_point)
        defined = [value for value in per_class.values() if value is not None]
        metrics[name] = float(np.mean(defined)) if defined else None
        metrics[f"{name}_per_class"] = per_class
    return metrics


def _voc_outcomes(target: Mapping[str, Any], found: Mapping[str, Tensor]) -> np.ndarray:
    """What each detection of one image counts as, int64 [K].

    A detection's object does not depend on the others' (the devkit gives no second choice), so within an
    image it is enough to see which detection of each object comes first.
    """
    outcomes = np.full(len(found["scores"]), FALSE_POSITIVE)
    boxes = target["boxes"].as_subclass(Tensor).double()
    if not len(boxes) or not len(outcomes):
        return outcomes
    iou = box_iou(found["boxes"].double().cpu(), boxes).numpy()  # [K, G]
    iou[found["labels"].cpu().numpy()[:, None] != target["labels"].numpy()] = -1
    taken = iou.argmax(axis=1)
    hits = iou.max(axis=1) >= VOC_MIN_IOU

    order = np.argsort(-found["scores"].double().cpu().numpy(), kind="stable")
    order = order[hits[order]]
    _, first = np.unique(taken[order], return_index=True)
    outcomes[order[first]] = TRUE_POSITIVE
    outcomes[hits & target["ignore"].numpy()[taken]] = NEITHER
    return outcomes
