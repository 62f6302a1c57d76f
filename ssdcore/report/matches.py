"""Which annotated object each detected object was matched with, and what follows: counts, curves, confusions.

The matches are those that give COCO's AP50: pycocotools makes them, within each class, at an IoU of at least 0.5.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torchvision.ops import box_iou

from ssdcore.data import DetectionDataset
from ssdcore.evaluate import FALSE_POSITIVE, NOT_COUNTED, TRUE_POSITIVE, check_detections, coco_evaluation
from ssdcore.objects import DetectedObjects

MIN_IOU = 0.5
NEVER = -1.0  # in place of a score, of an annotated object that no detected object was matched with
NO_ROW = -1
THRESHOLDS = tuple(k / 20 for k in range(1, 20))  # of the score, 0.05, 0.1, ..., 0.95
RECALLS = np.linspace(0, 1, 101)  # at which COCO's AP averages the precision


@dataclass(frozen=True)
class Matches:
    """The annotated objects G and the detected objects K of a dataset as columns, with their matches."""

    gt_images: np.ndarray  # int64 [G], index of the image in the dataset
    gt_boxes: np.ndarray  # fp64 [G, 4] xyxy in pixels of the image
    gt_labels: np.ndarray  # int64 [G]
    gt_ignore: np.ndarray  # bool [G]
    gt_scores: np.ndarray  # fp64 [G], the score of the detected object that it was matched with, or NEVER
    images: np.ndarray  # int64 [K]
    boxes: np.ndarray  # fp64 [K, 4]
    labels: np.ndarray  # int64 [K]
    scores: np.ndarray  # fp64 [K]
    ranks: np.ndarray  # int64 [K], the order in which COCOeval takes objects of equal scores
    outcomes: np.ndarray  # int64 [K]
    gt_rows: np.ndarray  # int64 [K], index among the annotated objects, or NO_ROW


@dataclass(frozen=True)
class Counts:
    """What the objects count as whose score is greater than a threshold."""

    true_positives: int
    false_positives: int
    missed: int

    @property
    def precision(self) -> float | None:
        """The share of true positives in the detected objects; None if nothing was detected."""
        return _ratio(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float | None:
        """The share of true positives in the annotated objects; None if nothing is annotated."""
        return _ratio(self.true_positives, self.true_positives + self.missed)

    @property
    def f1(self) -> float | None:
        """The harmonic mean of precision and recall; None if there are no objects at all."""
        return _ratio(2 * self.true_positives, 2 * self.true_positives + self.false_positives + self.missed)


def match_objects(dataset: DetectionDataset, detections: Mapping[int, DetectedObjects]) -> Matches:
    """Match detected with annotated objects as COCO's AP50 does.

    Args:
        dataset, detections: as in `evaluate_detections`.

    Raises:
        ValueError: as in `evaluate_detections`.
    """
    check_detections(dataset, detections)
    targets = [dataset.target(index) for index in range(len(dataset))]
    objects_per_image = [len(target["labels"]) for target in targets]
    gt_scores = np.full(sum(objects_per_image), NEVER)
    index_of = {image_id: index for index, image_id in enumerate(dataset.image_ids.tolist())}
    images = np.repeat(
        np.array([index_of[image_id] for image_id in detections], np.int64),
        [len(detected["scores"]) for detected in detections.values()],
    )
    scores = _joined((detected["scores"] for detected in detections.values()), np.float64)
    outcomes, gt_rows = np.full(len(scores), NOT_COUNTED), np.full(len(scores), NO_ROW)
    ranks = np.full(len(scores), NO_ROW)

    evaluation = coco_evaluation(dataset, detections)
    evaluation.params.iouThrs = np.array([MIN_IOU])
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.evaluate()
    first_rank = 0
    for matched in evaluation.evalImgs:
        if matched is None:  # an image and a class without objects
            continue
        rows = np.array(matched["dtIds"], np.int64) - 1
        ranks[rows] = np.arange(first_rank, first_rank + len(rows))
        first_rank += len(rows)
        gt_rows[rows] = matched["dtMatches"][0].astype(np.int64) - 1  # an id of 0 stands for no match
        is_matched = gt_rows[rows] != NO_ROW
        outcome = np.where(is_matched, TRUE_POSITIVE, FALSE_POSITIVE)
        outcomes[rows] = np.where(matched["dtIgnore"][0], NOT_COUNTED, outcome)
        gt_scores[gt_rows[rows][is_matched]] = scores[rows][is_matched]

    return Matches(
        gt_images=np.repeat(np.arange(len(targets)), objects_per_image),
        gt_boxes=_joined((target["boxes"] for target in targets), np.float64).reshape(-1, 4),
        gt_labels=_joined((target["labels"] for target in targets), np.int64),
        gt_ignore=_joined((target["ignore"] for target in targets), np.bool_),
        gt_scores=gt_scores,
        images=images,
        boxes=_joined((detected["boxes"] for detected in detections.values()), np.float64).reshape(-1, 4),
        labels=_joined((detected["labels"] for detected in detections.values()), np.int64),
        scores=scores,
        ranks=ranks,
        outcomes=outcomes,
        gt_rows=gt_rows,
    )


def counts(matches: Matches, threshold: float, label: int | None = None) -> Counts:
    """Count the objects of one class, or of all classes, at a score threshold.

    A detected object with a higher score was matched first. So the matches at a threshold are those without one.
    """
    detected = matches.scores > threshold
    annotated = ~matches.gt_ignore
    if label is not None:
        detected &= matches.labels == label
        annotated &= matches.gt_labels == label
    outcomes = matches.outcomes[detected]
    return Counts(
        int((outcomes == TRUE_POSITIVE).sum()),
        int((outcomes == FALSE_POSITIVE).sum()),
        int((matches.gt_scores[annotated] <= threshold).sum()),
    )


def best_threshold(matches: Matches, label: int | None = None) -> float:
    """The threshold of `THRESHOLDS` with the highest F1 over all classes or of one class, the lowest of equal ones."""
    return max(THRESHOLDS, key=lambda threshold: counts(matches, threshold, label).f1 or 0.0)


def precision_at_recalls(matches: Matches, label: int) -> np.ndarray | None:
    """The highest precision of one class at any recall >= each of `RECALLS`, and 0 where no recall is as high.

    Its mean is the AP50 of the class. None if nothing of the class is annotated.
    """
    annotated = int((~matches.gt_ignore & (matches.gt_labels == label)).sum())
    if not annotated:
        return None
    counted = np.flatnonzero((matches.labels == label) & (matches.outcomes != NOT_COUNTED))
    order = counted[np.lexsort((matches.ranks[counted], -matches.scores[counted]))]
    true_positives = np.cumsum(matches.outcomes[order] == TRUE_POSITIVE)
    recall = true_positives / annotated
    precision = true_positives / np.arange(1, len(order) + 1)
    highest_from_here = np.maximum.accumulate(precision[::-1])[::-1]
    first = np.searchsorted(recall, RECALLS, side="left")
    return np.append(highest_from_here, 0.0)[first]


def confusion_matrix(matches: Matches, num_classes: int, threshold: float) -> np.ndarray:
    """Count which annotated class was detected as which, among the detected objects above a score threshold.

    The diagonal holds the true positives of `counts`. Then each false positive, by descending score, takes the
    annotated object of another class that is still free and that it overlaps most, with an IoU of at least 0.5. What
    remains was detected where there is nothing, or was missed. Ignored objects do not count.

    Returns:
        int64 [num_classes + 1, num_classes + 1], rows by annotated, columns by detected class; label k is row k - 1.
        The last row is what was detected where nothing is annotated, the last column what was missed.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    above = matches.scores > threshold
    right = above & (matches.outcomes == TRUE_POSITIVE)
    np.add.at(matrix, (matches.labels[right] - 1, matches.labels[right] - 1), 1)

    free = ~matches.gt_ignore & (matches.gt_scores <= threshold)  # [G]
    wrong = np.flatnonzero(above & (matches.outcomes == FALSE_POSITIVE))
    for row in wrong[np.argsort(-matches.scores[wrong], kind="stable")]:
        annotated = np.flatnonzero(free & (matches.gt_images == matches.images[row]))
        iou = overlaps(matches, np.array([row]), annotated)[0]
        label = matches.labels[row]
        if len(iou) and iou.max() >= MIN_IOU:
            taken = annotated[iou.argmax()]
            free[taken] = False
            matrix[matches.gt_labels[taken] - 1, label - 1] += 1
        else:
            matrix[num_classes, label - 1] += 1
    matrix[:num_classes, num_classes] = np.bincount(matches.gt_labels[free] - 1, minlength=num_classes)
    return matrix


def overlaps(matches: Matches, rows: np.ndarray, gt_rows: np.ndarray) -> np.ndarray:
    """The IoU of some detected objects with some annotated objects, fp64 [len(rows), len(gt_rows)]."""
    iou: np.ndarray = box_iou(
        torch.from_numpy(matches.boxes[rows]), torch.from_numpy(matches.gt_boxes[gt_rows])
    ).numpy()
    return iou


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _joined(tensors: Iterable[torch.Tensor], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *(tensor.flatten().cpu().numpy().astype(dtype) for tensor in tensors)])
