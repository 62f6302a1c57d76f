"""The oracles: every op written to be obviously right, in NumPy float64, one box at a time.

They share nothing with the implementations that they judge. Contracts are those of the functions of the same name in
`ssdcore.kernels`; arguments are anything `numpy.asarray` takes, results are NumPy arrays.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

MAX_LOG_SCALE = math.log(1000 / 16)


def float64(values: Any) -> Array:
    return np.asarray(values, dtype=np.float64)


def iou(box1: Array, box2: Array) -> float:
    """Intersection over union of two boxes, xyxy."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = float64(box1), float64(box2)
    with np.errstate(invalid="ignore", divide="ignore"):
        width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1), 0)
        height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1), 0)
        intersection = width * height
        union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
        return float(intersection / union)


def box_iou(boxes1: Array, boxes2: Array) -> Array:
    out = np.empty((len(boxes1), len(boxes2)))
    for i, box1 in enumerate(boxes1):
        for j, box2 in enumerate(boxes2):
            out[i, j] = iou(box1, box2)
    return out


def by_score(scores: Array) -> list[int]:
    """Indices by descending score; NaN first; equal scores by index."""
    values = [float(score) for score in scores]
    return sorted(range(len(values)), key=lambda i: (not math.isnan(values[i]), -values[i], i))


def nms(boxes: Array, scores: Array, iou_threshold: float) -> Array:
    return batched_nms(boxes, scores, np.zeros(len(boxes), dtype=np.int64), iou_threshold)


def batched_nms(boxes: Array, scores: Array, idxs: Array, iou_threshold: float) -> Array:
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
    out = np.full((len(boxes), max_output), -1, dtype=np.int64)
    count = np.zeros(len(boxes), dtype=np.int32)
    for b in range(len(boxes)):
        candidates = np.array(
            [i for i, score in enumerate(scores[b]) if score_threshold is None or score > score_threshold],
            dtype=np.int64,
        )
        classes = np.zeros(len(candidates)) if idxs is None else idxs[b][candidates]
        kept = batched_nms(boxes[b][candidates], scores[b][candidates], classes, iou_threshold)[:max_output]
        out[b, : len(kept)] = candidates[kept]
        count[b] = len(kept)
    return out, count


def encode_boxes(boxes: Array, anchors: Array, weights: Sequence[float] = (10, 10, 5, 5)) -> Array:
    boxes, anchors = np.broadcast_arrays(float64(boxes), float64(anchors))
    size, anchor_size = boxes[..., 2:] - boxes[..., :2], anchors[..., 2:] - anchors[..., :2]
    centre, anchor_centre = (boxes[..., :2] + boxes[..., 2:]) / 2, (anchors[..., :2] + anchors[..., 2:]) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        offset = (centre - anchor_centre) / anchor_size
        scale = np.log(size / anchor_size)
    return np.concatenate((offset, scale), axis=-1) * float64(weights)


def decode_boxes(deltas: Array, anchors: Array, weights: Sequence[float] = (10, 10, 5, 5)) -> Array:
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
    batch = len(gt_offsets) - 1
    matched = np.full((batch, len(anchors)), -1, dtype=np.int64)
    for b in range(batch):
        own = gt_boxes[gt_offsets[b] : gt_offsets[b + 1]]
        # As fp32, as the contract has it: quotients that differ beyond its last bit are equal.
        overlaps = np.nan_to_num(box_iou(own, anchors), nan=0.0).clip(min=0).astype(np.float32)  # [G, A]
        if overlaps.size == 0:
            continue
        for a in range(len(anchors)):
            best = int(overlaps[:, a].argmax())  # the first of equals
            if overlaps[best, a] >= iou_threshold:
                matched[b, a] = best
        for g in range(len(own)):
            best = int(overlaps[g].argmax())
            if overlaps[g, best] > 0:
                matched[b, best] = g
    return matched


def _smooth_l1(difference: Array, beta: float) -> float:
    return sum(0.5 * d * d / beta if abs(d) < beta else abs(d) - 0.5 * beta for d in difference)


def cross_entropy(logits: Array, label: int) -> float:
    logits = float64(logits)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        top = logits.max()
        return float(np.log(np.exp(logits - top).sum()) + top - logits[label])


def mined_anchors(hardness: Array, positive: Array, neg_pos_ratio: float, min_negatives: int) -> list[int]:
    """The hardest non-positive anchors of an image, NaN first, equal ones by index."""
    wanted = math.ceil(np.float32(neg_pos_ratio) * np.float32(positive.sum()))
    negatives = [a for a in by_score(hardness) if not positive[a]]
    return negatives[: max(wanted, min_negatives)]


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
    batch, num_anchors, num_classes = cls_logits.shape
    classification, regression, positives = np.zeros(batch), np.zeros(batch), np.zeros(batch)
    for b in range(batch):
        own_boxes = gt_boxes[gt_offsets[b] : gt_offsets[b + 1]]
        own_labels = gt_labels[gt_offsets[b] : gt_offsets[b + 1]]
        positive = matched_idxs[b] >= 0
        losses = np.zeros(num_anchors)
        for a in range(num_anchors):
            g = matched_idxs[b, a]
            if g < 0:
                losses[a] = cross_entropy(cls_logits[b, a], 0)
            elif g < len(own_labels) and 1 <= own_labels[g] < num_classes:
                losses[a] = cross_entropy(cls_logits[b, a], own_labels[g])
                target = encode_boxes(own_boxes[g], anchors[a], weights)
                regression[b] += _smooth_l1(float64(box_deltas[b, a]) - target, beta)
            else:
                losses[a] = regression[b] = math.nan
        chosen = [*np.flatnonzero(positive), *mined_anchors(losses, positive, neg_pos_ratio, min_negatives)]
        classification[b] = math.nan if np.isnan(losses).any() else sum(losses[a] for a in chosen)
        positives[b] = positive.sum()
    if normalizer == "batch":
        total = max(1, positives.sum())
        return float(classification.sum() / total), float(regression.sum() / total)
    some = positives > 0
    images = max(1, batch)  # the mean over no image is 0
    return (
        float((classification[some] / positives[some]).sum() / images),
        float((regression[some] / positives[some]).sum() / images),
    )


def softmax(logits: Array) -> Array:
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
) -> tuple[Array, Array, Array, Array]:
    batch, num_anchors, num_classes = cls_logits.shape
    boxes = np.zeros((batch, max_detections, 4))
    scores = np.zeros((batch, max_detections))
    labels = np.full((batch, max_detections), -1, dtype=np.int64)
    count = np.zeros(batch, dtype=np.int32)
    for b in range(batch):
        probability = softmax(cls_logits[b])
        height, width = image_sizes[b]
        found = []  # (score, class, box)
        for c in range(1, num_classes):
            passing = [a for a in range(num_anchors) if probability[a, c] > score_threshold]
            best = [passing[i] for i in by_score(probability[passing, c])][:topk_candidates]
            decoded = decode_boxes(box_deltas[b, best], anchors[best], weights)
            decoded = np.clip(decoded, 0, [width, height, width, height])
            for i in nms(decoded, probability[best, c], iou_threshold):
                found.append((probability[best[i], c], c, decoded[i]))
        kept = [found[i] for i in by_score(np.array([score for score, _, _ in found]))][:max_detections]
        count[b] = len(kept)
        for d, (score, c, box) in enumerate(kept):
            boxes[b, d], scores[b, d], labels[b, d] = box, score, c
    return boxes, scores, labels, count
