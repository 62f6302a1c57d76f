"""Score detected objects: COCO's twelve metrics, and Pascal VOC's average precision of 2007 and 2012."""

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
from ssdcore.objects import DetectedObjects, Target

__all__ = ["coco_evaluation", "evaluate_detections", "to_coco_results", "voc_average_precision"]

VOC_MIN_IOU = 0.5  # VOC devkit, VOCopts.minoverlap
COCO_METRICS = (  # in the order of COCOeval.stats
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
# What a detected object counts as. The last is one matched with an annotated object that is ignored. In COCO's metrics
# it is also one beyond the 100 best of its image and class.
TRUE_POSITIVE, FALSE_POSITIVE, NOT_COUNTED = 1, 0, -1


def evaluate_detections(
    dataset: DetectionDataset, detections: Mapping[int, DetectedObjects], *, quiet: bool = False
) -> dict[str, Any]:
    """Score detected objects against a dataset's annotations, over all images of the dataset.

    An image without detected objects counts: its annotated objects are missed. An image without annotated objects
    counts too: everything detected in it is a false positive. The annotated objects that the dataset marks `ignore`
    count neither as missed nor, when they are detected, as a false positive: COCO's metrics treat them as crowds,
    VOC's as difficult. Detected objects with equal scores are ranked by image, in the order of the dataset, and
    within an image in the given order.

    COCO's metrics are computed by pycocotools' COCOeval, which considers at most the 100 best-scored objects per
    image and class. VOC's metrics follow the devkit's VOCevaldet.m: each detected object is assigned to the
    annotated object of its class with the highest IoU. It is a true positive if that IoU is >= 0.5 and no detected
    object with a higher score is assigned to the same annotated object. (The devkit compares with `>=`, while
    Python ports of it often use `>`.) The IoU is that of plain boxes: the devkit's extra pixel is not added.

    Args:
        dataset: from `open_dataset`.
        detections: the detected objects by `image_id`: `boxes` [K, 4] xyxy in pixels of the image, `labels` [K] in
            1..n with the meaning of the dataset's labels, `scores` [K]. Images may be absent.
        quiet: print nothing. Otherwise pycocotools' summary and VOC's means are printed.

    Returns:
        A dict that can be written as JSON. A metric that is undefined because there are no objects is None.

        - `AP`, `AP50`, `AP75`, `APs`, `APm`, `APl`, `AR1`, `AR10`, `AR100`, `ARs`, `ARm`, `ARl`: COCO's metrics.
        - `AP_per_class`, `AP50_per_class`: the first two by class name.
        - `VOC07`, `VOC12`: the mean over the classes of the 11-point average precision, and of the area under the
          precision-recall curve.
        - `VOC07_per_class`, `VOC12_per_class`: the same by class name.

    Raises:
        ValueError: `detections` has an image that the dataset lacks, a tensor of the wrong shape, a label outside
            1..n, or a value that is not finite.
    """
    check_detections(dataset, detections)
    results = _coco_metrics(dataset, detections, quiet) | _voc_metrics(dataset, detections)
    if not quiet:
        means = (f"{name} {results[name]:.3f}" for name in ("VOC07", "VOC12") if results[name] is not None)
        print(" Mean average precision at IoU=0.50:", ", ".join(means) or "not defined")
    return results


def to_coco_results(
    dataset_or_category_ids: DetectionDataset | Sequence[int], detections: Mapping[int, DetectedObjects]
) -> list[dict[str, Any]]:
    """Convert detected objects to COCO's results format, ready for `json.dump`.

    Args:
        dataset_or_category_ids: a dataset, or its `category_ids`. Label k becomes `category_ids[k - 1]`.
        detections: as in `evaluate_detections`.

    Returns:
        One dict per detected object: `image_id`, `category_id`, `bbox` [x, y, width, height] and `score`.

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
        for image_id, detected in detections.items()
        for (x1, y1, x2, y2), label, score in zip(
            detected["boxes"].tolist(), detected["labels"].tolist(), detected["scores"].tolist(), strict=True
        )
    ]


def coco_evaluation(dataset: DetectionDataset, detections: Mapping[int, DetectedObjects]) -> Any:
    """Return pycocotools' COCOeval of a dataset and the objects that were detected in it, before its `evaluate`.

    The ids of the detected objects count from 1 in the order of `detections`, those of the annotated objects from 1 in
    the order of the dataset. The arguments are those of `evaluate_detections`, and are not checked.
    """
    results = to_coco_results(dataset, detections)
    for result in results:
        result |= {"area": result["bbox"][2] * result["bbox"][3], "iscrowd": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        return COCOeval(_coco(dataset, _coco_annotations(dataset)), _coco(dataset, results), "bbox")


def voc_average_precision(recall: np.ndarray, precision: np.ndarray, eleven_point: bool) -> float:
    """Compute the average precision of one class as the Pascal VOC devkit defines it.

    Args:
        recall: [N] in 0..1, not decreasing: the recall after each detected object, by descending score.
        precision: [N] in 0..1, the precision after the same objects.
        eleven_point: True for VOC 2007: the mean over the recalls r = 0, 0.1, ..., 1 of the highest precision at
            any recall >= r, or 0 where no recall reaches r. False for VOC 2010 and later: the area under the
            precision-recall curve, where the precision at each recall is first replaced by the highest precision
            at any recall >= it.

    The eleven recalls are the floating-point numbers nearest to k / 10, so that a recall of exactly 3 / 10 reaches
    r = 0.3. The devkit's own 0:0.1:1 contains 0.30000000000000004 instead, which a recall of 3 / 10 does not reach.

    Source: VOCevaldet.m and VOCap.m of the VOC devkits of 2007 and 2012.
    """
    if eleven_point:
        recall_points = np.arange(11) / 10
        return float(np.mean([precision[recall >= point].max(initial=0.0) for point in recall_points]))
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    return float(np.sum(np.diff(recall, prepend=0.0) * highest_from_here))


def check_detections(dataset: DetectionDataset, detections: Mapping[int, DetectedObjects]) -> None:
    """Raise the errors that `evaluate_detections` names."""
    unknown = set(detections) - set(dataset.image_ids.tolist())
    if unknown:
        raise ValueError(f"detections must be of the dataset's images, got image_id {min(unknown)}, which it lacks")
    for image_id, detected in detections.items():
        argument = f"detections[{image_id}]"
        count = len(detected["scores"])
        for name, shape in {"boxes": (count, 4), "labels": (count,), "scores": (count,)}.items():
            tensor = detected[name]
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{argument}[{name!r}] must have shape {list(shape)}, got {list(tensor.shape)}")
            finite = torch.isfinite(tensor)
            if not finite.all():
                raise ValueError(f"{argument}[{name!r}] must be finite, got {float(tensor[~finite][0])}")
        labels = detected["labels"]
        if count and not 1 <= int(labels.min()) <= int(labels.max()) <= len(dataset.classes):
            raise ValueError(f"{argument}['labels'] must be in 1..{len(dataset.classes)}, got {labels.tolist()}")


def _coco_metrics(dataset: DetectionDataset, detections: Mapping[int, DetectedObjects], quiet: bool) -> dict[str, Any]:
    evaluation = coco_evaluation(dataset, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
        evaluation.accumulate()
    with contextlib.redirect_stdout(io.StringIO()) if quiet else contextlib.nullcontext():
        evaluation.summarize()

    # eval["precision"] is [IoU thresholds, recalls, classes, areas, limits of objects per image]. 0 selects all
    # areas, and -1 the limit of 100 objects.
    precision = evaluation.eval["precision"][:, :, :, 0, -1]
    class_index = {category_id: k for k, category_id in enumerate(evaluation.params.catIds)}
    precision_per_class = {
        name: precision[:, :, class_index[category_id]]
        for name, category_id in zip(dataset.classes, dataset.category_ids, strict=True)
    }
    return {
        **{name: _defined(value) for name, value in zip(COCO_METRICS, evaluation.stats, strict=True)},
        "AP_per_class": {name: _defined(values.mean()) for name, values in precision_per_class.items()},
        "AP50_per_class": {name: _defined(values[0].mean()) for name, values in precision_per_class.items()},
    }


def _coco_annotations(dataset: DetectionDataset) -> list[dict[str, Any]]:
    """The dataset's annotated objects in COCO's annotation format."""
    annotations = []
    for index in range(len(dataset)):
        target = dataset.target(index)
        columns = (target["boxes"], target["labels"], target["ignore"], dataset.areas(index))
        for (x1, y1, x2, y2), label, ignore, area in zip(*(c.tolist() for c in columns), strict=True):
            annotations.append(
                {
                    "image_id": target["image_id"],
                    "category_id": dataset.category_ids[label - 1],
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": area,
                    "iscrowd": int(ignore),
                }
            )
    return annotations


def _coco(dataset: DetectionDataset, annotations: list[dict[str, Any]]) -> Any:
    """Annotated or detected objects as a pycocotools COCO object. Unlike COCO.loadRes, this accepts an empty list."""
    coco = COCO()
    # Ids start at 1, because COCOeval takes a match with the annotation of id 0 for no match.
    for annotation_id, annotation in enumerate(annotations, start=1):
        annotation["id"] = annotation_id
    coco.dataset = {
        "images": [{"id": image_id} for image_id in dataset.image_ids.tolist()],
        "categories": [{"id": category_id} for category_id in dataset.category_ids],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _defined(value: float) -> float | None:
    """COCOeval marks an undefined metric with -1."""
    return None if value == -1 else float(value)


def _voc_metrics(dataset: DetectionDataset, detections: Mapping[int, DetectedObjects]) -> dict[str, Any]:
    num_objects = np.zeros(len(dataset.classes), np.int64)  # annotated, without the ignored ones, by class
    columns = [(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))]  # scores, labels, outcomes of each image
    for index in range(len(dataset)):
        target = dataset.target(index)
        num_objects += np.bincount(target["labels"][~target["ignore"]] - 1, minlength=len(num_objects))
        detected = detections.get(target["image_id"])
        if detected is not None:
            columns.append(
                (
                    detected["scores"].double().cpu().numpy(),
                    detected["labels"].cpu().numpy(),
                    _voc_outcomes(target, detected),
                )
            )
    scores, labels, outcomes = (np.concatenate(column) for column in zip(*columns, strict=True))

    metrics: dict[str, Any] = {}
    for name, eleven_point in {"VOC07": True, "VOC12": False}.items():
        per_class: dict[str, float | None] = {}
        for label, class_name in enumerate(dataset.classes, start=1):
            counted = (labels == label) & (outcomes != NOT_COUNTED)
            order = np.argsort(-scores[counted], kind="stable")
            true_positives = np.cumsum(outcomes[counted][order] == TRUE_POSITIVE)
            per_class[class_name] = None
            if num_objects[label - 1]:
                recall = true_positives / num_objects[label - 1]
                precision = true_positives / np.arange(1, len(order) + 1)
                per_class[class_name] = voc_average_precision(recall, precision, eleven_point)
        defined = [value for value in per_class.values() if value is not None]
        metrics[name] = float(np.mean(defined)) if defined else None
        metrics[f"{name}_per_class"] = per_class
    return metrics


def _voc_outcomes(target: Target, detected: DetectedObjects) -> np.ndarray:
    """What each detected object of one image counts as, int64 [K].

    The annotated object that a detected object is assigned to does not depend on the other detected objects, because
    the devkit gives no second choice. So it is enough to find, for every annotated object, the first detected object
    by score that is assigned to it.
    """
    outcomes = np.full(len(detected["scores"]), FALSE_POSITIVE)
    gt_boxes = target["boxes"].as_subclass(Tensor).double()  # [G, 4]
    if not len(gt_boxes) or not len(outcomes):
        return outcomes
    iou = box_iou(detected["boxes"].double().cpu(), gt_boxes).numpy()  # [K, G]
    iou[detected["labels"].cpu().numpy()[:, None] != target["labels"].numpy()] = -1
    gt_index = iou.argmax(axis=1)
    overlaps = iou.max(axis=1) >= VOC_MIN_IOU

    order = np.argsort(-detected["scores"].double().cpu().numpy(), kind="stable")
    order = order[overlaps[order]]
    _, first = np.unique(gt_index[order], return_index=True)
    outcomes[order[first]] = TRUE_POSITIVE
    outcomes[overlaps & target["ignore"].numpy()[gt_index]] = NOT_COUNTED
    return outcomes
