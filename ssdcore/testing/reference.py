"""The oracles: every op in NumPy float64, one box at a time, written so that it is obviously correct.

An oracle has the contract of the function with the same name in `ssdcore.kernels`, and shares no code with it. The
arguments are NumPy arrays, and the results are float64 and integer NumPy arrays.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_LOG_SCALE = math.log(1000 / 16)  # limit of the decoded dw and dh, as in torchvision's BoxCoder


def float64(values: Any) -> Array:
    """Convert `values` to a float64 array."""
    return np.asarray(values, dtype=np.float64)


def iou(box1: Array, box2: Array) -> float:
    """Return the intersection over union of two boxes, xyxy. The result is NaN if it is 0/0."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = float64(box1), float64(box2)
    with np.errstate(invalid="ignore", divide="ignore"):
        width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0)
        height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0)
        intersection = width * height
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
        return float(intersection / union)


def box_iou(boxes1: Array, boxes2: Array) -> Array:
    """Return the IoU of every pair of boxes, [N, M], for boxes [N, 4] and [M, 4] xyxy."""
    out = np.empty((len(boxes1), len(boxes2)))
    for i, box1 in enumerate(boxes1):
        for j, box2 in enumerate(boxes2):
            out[i, j] = iou(box1, box2)
    return out


def by_score(scores: Array) -> list[int]:
    """Return the indices of `scores` in descending order of score. NaN comes first; ties are in order of index."""
    values = [float(score) for score in scores]
    return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))


def nms(boxes: Array, scores: Array, iou_threshold: float) -> Array:
    """Return the indices of the boxes that greedy NMS keeps, by descending score."""
    return batched_nms(boxes, scores, np.zeros(len(boxes), dtype=np.int64), iou_threshold)


def batched_nms(boxes: Array, scores: Array, idxs: Array, iou_threshold: float) -> Array:
    """Return the indices of the boxes that greedy NMS within each class keeps, by descending score over all classes."""
    kept: list[int] = []
    for i in by_score(scores):
        if not any(idxs[i] == idxs[j] and iou(boxes[i], boxes[j]) > iou_threshold for j in kept):
            kept.append(i)
    return np.array(kept, dtype=np.int64)


def batched_nms_padded(
    boxes: Array,
    scores: Array,
    idxs: Array | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None = None,
) -> tuple[Array, Array]:
    """Apply `batched_nms` to each image of a batch.

    Returns:
        The indices of the first `max_output` kept boxes of each image, int64 [B, max_output] padded with -1; and how
        many there are, int32 [B].
    """
    out = np.full((len(boxes), max_output), -1, dtype=np.int64)
    count = np.zeros(len(boxes), dtype=np.int32)
    for b in range(len(boxes)):
        passing = np.array(
            [i for i, score in enumerate(scores[b]) if score_threshold is None or score > score_threshold],
            dtype=np.int64,
        )
        classes = np.zeros(len(passing)) if idxs is None else idxs[b][passing]
        kept = batched_nms(boxes[b][passing], scores[b][passing], classes, iou_threshold)[:max_output]
        out[b, : len(kept)] = passing[kept]
        count[b] = len(kept)
    return out, count


def encode_boxes(boxes: Array, anchors: Array, weights: Sequence[float] = (10, 10, 5, 5)) -> Array:
    """Return the deltas of boxes [..., 4] relative to anchors [..., 4], both xyxy."""
    boxes, anchors = np.broadcast_arrays(float64(boxes), float64(anchors))
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = (boxes[..., :2] + boxes[..., 2:]) / 2, (anchors[..., :2] + anchors[..., 2:]) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        offset = (centre - anchor_centre) / anchor_size
        scale = np.log(size / anchor_size)
    return np.concatenate((offset, scale), axis=-1) * float64(weights)


def decode_boxes(deltas: Array, anchors: Array, weights: Sequence[float] = (10, 10, 5, 5)) -> Array:
    """Return the boxes [..., 4] xyxy for deltas [..., 4] relative to anchors [..., 4] xyxy."""
    deltas = float64(deltas) / float64(weights)
    deltas, anchors = np.broadcast_arrays(deltas, float64(anchors))
    anchor_size, anchor_centre = (
        anchors[..., 2:] - anchors[..., :2],
        (anchors[..., :2] + anchors[..., 2:]) / 2,
    )
    centre = anchor_centre + deltas[..., :2] * anchor_size
    size = np.exp(np.minimum(deltas[..., 2:], MAX_LOG_SCALE)) * anchor_size
    return np.concatenate((centre - size / 2, centre + size / 2), axis=-1)


def match_anchors(gt_boxes: Array, gt_offsets: Array, anchors: Array, iou_threshold: float = 0.5) -> Array:
    """Return the index of each anchor's ground truth within its image, or -1, int64 [B, A]."""
    batch = len(gt_offsets) - 1
    matched = np.full((batch, len(anchors)), -1, dtype=np.int64)
    for b in range(batch):
        image_gt_boxes = gt_boxes[gt_offsets[b] : gt_offsets[b + 1]]
        # Rounded to fp32 as the contract requires: IoUs that differ only in float64 are equal.
        overlaps = np.nan_to_num(box_iou(image_gt_boxes, anchors), nan=0.0).clip(min=0).astype(np.float32)  # [G, A]
        if overlaps.size == 0:
            continue
        for a in range(len(anchors)):
            best_gt = int(overlaps[:, a].argmax())  # argmax returns the first of equal values
            if overlaps[best_gt, a] >= iou_threshold:
                matched[b, a] = best_gt
        for gt_index in range(len(image_gt_boxes)):
            best_anchor = int(overlaps[gt_index].argmax())
            if overlaps[gt_index, best_anchor] > 0:
                matched[b, best_anchor] = gt_index
    return matched


def _smooth_l1(difference: Array, beta: float) -> float:
    return sum(0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta for d in difference)


def cross_entropy(logits: Array, label: int) -> float:
    """Return the softmax cross-entropy of one anchor's logits [C] with `label`."""
    logits = float64(logits)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        highest = logits.max()
        return float(np.log(np.exp(logits - highest).sum()) + highest - logits[label])


def mined_anchors(hardness: Array, positive: Array, neg_pos_ratio: float, min_negatives: int) -> list[int]:
    """Return the negative anchors that one image adds to the classification loss.

    Args:
        hardness: [A], the cross-entropy of each negative with the background. The values of positives are ignored.
        positive: bool [A].
        neg_pos_ratio: negatives per positive.
        min_negatives: at least this many, if there are as many.

    Returns:
        The hardest negatives, NaN first; ties are in order of index.
    """
    count = math.ceil(np.float32(neg_pos_ratio) * np.float32(positive.sum()))
    negatives = [a for a in by_score(hardness) if not positive[a]]
    return negatives[: max(count, min_negatives)]


def multibox_loss(
    cls_logits: Array,
    box_deltas: Array,
    matched_idxs: Array,
    gt_boxes: Array,
    gt_labels: Array,
    gt_offsets: Array,
    anchors: Array,
    *,
    weights: Sequence[float] = (10, 10, 5, 5),
    neg_pos_ratio: float = 3.0,
    beta: float = 1.0,
    min_negatives: int = 0,
    normalizer: str = "batch",
) -> tuple[float, float]:
    """Return the classification loss and the box regression loss, for logits [B, A, C] and deltas [B, A, 4]."""
    batch, num_anchors, num_classes = cls_logits.shape
    classification, regression, positives = np.zeros(batch), np.zeros(batch), np.zeros(batch)
    for b in range(batch):
        image_gt_boxes = gt_boxes[gt_offsets[b] : gt_offsets[b + 1]]
        image_gt_labels = gt_labels[gt_offsets[b] : gt_offsets[b + 1]]
        positive = matched_idxs[b] >= 0
        losses = np.zeros(num_anchors)
        for a in range(num_anchors):
            gt_index = matched_idxs[b, a]
            if gt_index < 0:
                losses[a] = cross_entropy(cls_logits[b, a], 0)
            elif gt_index < len(image_gt_labels) and 1 <= image_gt_labels[gt_index] < num_classes:
                losses[a] = cross_entropy(cls_logits[b, a], image_gt_labels[gt_index])
                gt_deltas = encode_boxes(image_gt_boxes[gt_index], anchors[a], weights)
                regression[b] += _smooth_l1(float64(box_deltas[b, a]) - gt_deltas, beta)
            else:
                losses[a] = regression[b] = math.nan
        selected = [*np.flatnonzero(positive), *mined_anchors(losses, positive, neg_pos_ratio, min_negatives)]
        classification[b] = math.nan if np.isnan(losses).any() else sum(losses[a] for a in selected)
        positives[b] = positive.sum()
    if normalizer == "batch":
        total = max(1, positives.sum())
        return float(classification.sum() / total), float(regression.sum() / total)
    has_positives = positives > 0
    num_images = max(1, batch)  # at least 1, so that the mean over an empty batch is 0
    return (
        float((classification[has_positives] / positives[has_positives]).sum() / num_images),
        float((regression[has_positives] / positives[has_positives]).sum() / num_images),
    )


def softmax(logits: Array) -> Array:
    """Return the softmax over the last dimension."""
    logits = float64(logits)
    with np.errstate(invalid="ignore"):
        power = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return power / power.sum(axis=-1, keepdims=True)


def postprocess_detections(
    cls_logits: Array,
    box_deltas: Array,
    anchors: Array,
    image_sizes: Array,
    *,
    weights: Sequence[float] = (10, 10, 5, 5),
    score_threshold: float = 0.01,
    iou_threshold: float = 0.45,
    topk_candidates: int = 400,
    max_detections: int = 200,
) -> tuple[Array, Array, Array, Array, Array]:
    """Detect objects from logits [B, A, C] and deltas [B, A, 4].

    Returns:
        Boxes [B, D, 4] xyxy, scores [B, D], labels [B, D], the number of detections [B] and the anchors they came from
        [B, D], with D = `max_detections`. Within an image, detections are sorted by descending score, and padded with
        zeros, label -1 and anchor -1.
    """
    batch, num_anchors, num_classes = cls_logits.shape
    boxes = np.zeros((batch, max_detections, 4))
    scores = np.zeros((batch, max_detections))
    labels = np.full((batch, max_detections), -1, dtype=np.int64)
    count = np.zeros(batch, dtype=np.int32)
    anchor_idxs = np.full((batch, max_detections), -1, dtype=np.int64)
    for b in range(batch):
        probability = softmax(cls_logits[b])
        height, width = image_sizes[b]
        kept = []  # (score, class, box, anchor)
        for c in range(1, num_classes):
            candidates = [a for a in range(num_anchors) if probability[a, c] > score_threshold]
            best = [candidates[i] for i in by_score(probability[candidates, c])][:topk_candidates]
            decoded = decode_boxes(box_deltas[b, best], anchors[best], weights)
            decoded = np.clip(decoded, 0, [width, height, width, height])
            for i in nms(decoded, probability[best, c], iou_threshold):
                kept.append((probability[best[i], c], c, decoded[i], best[i]))
        top = [kept[i] for i in by_score(np.array([score for score, *_ in kept]))][:max_detections]
        count[b] = len(top)
        for d, (score, c, box, anchor) in enumerate(top):
            boxes[b, d], scores[b, d], labels[b, d], anchor_idxs[b, d] = box, score, c, anchor
    return boxes, scores, labels, count, anchor_idxs
