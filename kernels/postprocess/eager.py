"""From the head's outputs to detections, in PyTorch and NumPy, on any device."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ssdcore.kernels.boxes.eager import decode_boxes
from ssdcore.kernels.levels import gather_rows
from ssdcore.kernels.nms.eager import greedy_keep
from ssdcore.kernels.rules import widen
from ssdcore.kernels.sorting import descending_keys, numbered, rank_in_group, stable_order

FIRST_CUTOFF_ANCHORS = 2  # anchors above the first cutoff per wanted detection; mostly enough
CUTOFF_GROWTH = 4  # times as many anchors, if they were not enough
BEST_SCORE_ERROR = 1e-4  # exceeds the relative error of `_best_scores`, a few times 2**-24 times |log(score)|, by far


class Candidates(NamedTuple):
    """Candidates of one image, sorted by class, then by descending score, then by anchor."""

    boxes: np.ndarray  # [S, 4]
    score: np.ndarray  # fp32 [S]
    class_index: np.ndarray  # [S] label - 1
    anchor: np.ndarray  # int64 [S]
    complete: bool  # none of the image's candidates is left out


def postprocess_detections(
    cls_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    anchors: Tensor,
    image_sizes: Tensor,
    weights: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, _, num_classes = cls_logits[0].shape
    boxes = np.zeros((batch, max_detections, 4), dtype=np.float32)
    scores = np.zeros((batch, max_detections), dtype=np.float32)
    labels = np.full((batch, max_detections), -1, dtype=np.int64)
    num_detections = np.zeros(batch, dtype=np.int32)
    anchor_idxs = np.full((batch, max_detections), -1, dtype=np.int64)

    # Whether a candidate is kept depends on the better candidates of its class alone. So once `max_detections` of those
    # above some cutoff are kept, no candidate below it matters.
    cutoff_anchors = FIRST_CUTOFF_ANCHORS * max_detections
    unsettled = list(range(batch)) if len(anchors) and num_classes > 1 else []
    best_scores = _best_scores(cls_logits) if unsettled else np.empty((0, 0))
    while unsettled:
        found = []
        for image in unsettled:
            found.append(
                _candidates(
                    [x[image : image + 1] for x in cls_logits],
                    [x[image : image + 1] for x in box_deltas],
                    anchors,
                    image_sizes[image],
                    best_scores[image],
                    weights,
                    score_threshold,
                    topk_candidates,
                    cutoff_anchors,
                )
            )
        kept_of_images = _nms(found, iou_threshold)
        for image, candidates, kept in zip(tuple(unsettled), found, kept_of_images, strict=True):
            if candidates.complete or len(kept) >= max_detections:
                # Equal scores stay in the order of the candidates: by class, then by anchor.
                best = kept.take(stable_order(descending_keys(candidates.score.take(kept)))[:max_detections])
                boxes[image, : len(best)] = candidates.boxes.take(best, axis=0)
                scores[image, : len(best)] = candidates.score.take(best)
                labels[image, : len(best)] = candidates.class_index.take(best) + 1
                num_detections[image] = len(best)
                anchor_idxs[image, : len(best)] = candidates.anchor.take(best)
                unsettled.remove(image)
        cutoff_anchors *= CUTOFF_GROWTH
    device = cls_logits[0].device
    outputs = (torch.from_numpy(x).to(device) for x in (boxes, scores, labels, num_detections, anchor_idxs))
    return tuple(outputs)  # type: ignore[return-value]  # five of them


def _best_scores(cls_logits: Sequence[Tensor]) -> np.ndarray:
    """The best foreground score of each anchor, [B, A], with a relative error below `BEST_SCORE_ERROR`; 0 for NaN."""
    # Two large operations per level: they are worth several threads.
    best = [widen(level).log_softmax(dim=-1)[..., 1:].amax(dim=-1).flatten(1).cpu().numpy() for level in cls_logits]
    scores = np.exp(np.concatenate(best, axis=1))
    return np.where(np.isnan(scores), 0, scores)


@np.errstate(all="ignore")  # logits may be NaN or infinite
def _candidates(
    cls_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    anchors: Tensor,
    image_size: Tensor,
    best_scores: np.ndarray,
    weights: Sequence[float],
    score_threshold: float,
    topk: int,
    cutoff_anchors: int,
) -> Candidates:
    """The candidates of one image: of each class the `topk` best among the scores of the `cutoff_anchors` best anchors.

    Args:
        cls_logits: the image's levels [1, P, a, C].
        box_deltas: the image's levels [1, P, a, 4].
        anchors: [A, 4] xyxy.
        image_size: [2], height and width.
        best_scores: [A].
        weights, score_threshold: those of `postprocess_detections`.
        topk: the most candidates of a class.
        cutoff_anchors: how many anchors to look at; all if there are no more.
    """
    cutoff = -1.0
    if cutoff_anchors < len(anchors):
        cutoff = np.partition(best_scores, -cutoff_anchors)[-cutoff_anchors] * (1 - BEST_SCORE_ERROR)
    # All scores above the cutoff and the threshold are those of these anchors, although `best_scores` are not exact.
    above = (best_scores > max(cutoff, score_threshold) * (1 - BEST_SCORE_ERROR)).nonzero()[0]
    anchor = torch.from_numpy(above).to(anchors.device)
    image = torch.zeros_like(anchor)
    scores = _softmax(gather_rows(cls_logits, image, anchor).cpu().numpy())[:, 1:].astype(np.float32, copy=False)
    row, class_index = ((scores > cutoff) & (scores > score_threshold)).nonzero()
    score = scores[row, class_index]

    order = stable_order((class_index << 32) + descending_keys(score))
    order = order.compress(rank_in_group(numbered(class_index.take(order))) < topk)
    boxes = decode_boxes(gather_rows(box_deltas, image, anchor), anchors[anchor], weights)
    height, width = widen(image_size).to(boxes.dtype)
    x1, y1, x2, y2 = boxes.clamp_(min=0).unbind(-1)
    boxes = torch.stack((x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height)), dim=-1)
    return Candidates(
        boxes.cpu().numpy().take(row.take(order), axis=0),
        score.take(order),
        class_index.take(order),
        above.take(row.take(order)),
        complete=cutoff <= score_threshold,
    )


def _softmax(rows: np.ndarray) -> np.ndarray:
    """The softmax of each of `rows` [R, C]."""
    powers = np.exp(rows - rows.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _nms(found: Sequence[Candidates], iou_threshold: float) -> list[np.ndarray]:
    """The candidates that NMS within each class keeps: of each image, their indices."""
    sizes = [len(candidates.score) for candidates in found]
    image = np.repeat(np.arange(len(found)), sizes)
    group = numbered(image, np.concatenate([candidates.class_index for candidates in found]))
    keep = greedy_keep(np.concatenate([candidates.boxes for candidates in found]), group, iou_threshold)
    return [kept.nonzero()[0] for kept in np.split(keep, np.cumsum(sizes)[:-1])]
