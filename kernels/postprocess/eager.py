"""From the head's outputs to detections, in PyTorch and NumPy, on any device."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssdcore.kernels.boxes.eager import decode_boxes
from ssdcore.kernels.levels import gather_rows, packed
from ssdcore.kernels.nms.eager import greedy_keep
from ssdcore.kernels.rules import widen

FIRST_CUTOFF_ANCHORS = 2  # anchors above the first cutoff per wanted detection; mostly enough
CUTOFF_GROWTH = 4  # times as many anchors, if they were not enough


class Candidates(NamedTuple):
    """Candidates of all images, one entry each, sorted by image, class and descending score."""

    image: Tensor
    class_index: Tensor  # label - 1
    anchor: Tensor
    score: Tensor


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logits = packed(cls_logits)
    batch, num_anchors, num_classes = logits.shape
    device = logits.device
    topk = min(topk_candidates, num_anchors)
    if batch == 0 or topk == 0 or num_classes < 2:
        return *_empty_output(batch, max_detections, device), torch.zeros(batch, dtype=torch.int32, device=device)

    scores = widen(logits).softmax(dim=-1).float()[..., 1:]  # [B, A, C - 1]
    best_score = scores.amax(dim=-1).nan_to_num_(0.0)  # [B, A]
    # Whether a candidate is kept depends on the better candidates of its class alone. So once `max_detections` of those
    # above some cutoff are kept, no candidate below it matters.
    cutoff_anchors = FIRST_CUTOFF_ANCHORS * max_detections
    while True:
        takes_all_anchors = cutoff_anchors >= num_anchors
        if takes_all_anchors:
            cutoff = scores.nan_to_num_(0.0).topk(topk, dim=1).values[:, -1]  # [B, C - 1]: k-th best of each class
        else:
            cutoff = best_score.topk(cutoff_anchors, dim=1).values[:, -1:]  # [B, 1]
        candidates = _candidates_above(cutoff, scores, best_score, score_threshold, topk)
        boxes = _decode_and_clip(candidates, box_deltas, anchors, image_sizes, weights)
        group = candidates.image * (num_classes - 1) + candidates.class_index
        keep = greedy_keep(boxes, group, iou_threshold)
        num_kept = candidates.image[keep].bincount(minlength=batch)
        if takes_all_anchors or ((num_kept >= max_detections) | (cutoff[:, 0] <= score_threshold)).all():
            break
        cutoff_anchors *= CUTOFF_GROWTH
    kept = Candidates(*(x[keep] for x in candidates))
    return _best_per_image(kept, boxes[keep], num_kept, max_detections)


def _empty_output(batch: int, max_detections: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and labels that hold nothing but padding."""
    return (
        torch.zeros(batch, max_detections, 4, dtype=torch.float32, device=device),
        torch.zeros(batch, max_detections, dtype=torch.float32, device=device),
        torch.full((batch, max_detections), -1, dtype=torch.int64, device=device),
    )


def _candidates_above(
    cutoff: Tensor, scores: Tensor, best_score: Tensor, score_threshold: float, topk: int
) -> Candidates:
    """The `topk` best candidates of each image and class that reach the cutoff, [B, 1] or [B, C - 1]."""
    reaches = (best_score >= cutoff.amin(dim=1, keepdim=True)) & (best_score > score_threshold)
    image, anchor = reaches.nonzero(as_tuple=True)
    row_scores = scores[image, anchor]  # [S, C - 1]
    row, class_index = ((row_scores >= cutoff[image]) & (row_scores > score_threshold)).nonzero(as_tuple=True)
    image, anchor, score = image[row], anchor[row], row_scores[row, class_index]
    group = image * scores.shape[-1] + class_index
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # by image, class, score, anchor
    group = group[order]
    rank = torch.arange(len(group), device=scores.device) - torch.searchsorted(group, group)  # within the group
    order = order[rank < topk]
    return Candidates(image[order], class_index[order], anchor[order], score[order])


def _decode_and_clip(
    candidates: Candidates, box_deltas: Sequence[Tensor], anchors: Tensor, image_sizes: Tensor, weights: Sequence[float]
) -> Tensor:
    """The candidates' boxes [S, 4], clipped to their images."""
    deltas = gather_rows(box_deltas, candidates.image, candidates.anchor)
    boxes = decode_boxes(deltas, anchors[candidates.anchor], weights)
    height, width = widen(image_sizes).to(boxes.dtype)[candidates.image].unbind(-1)
    x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
    return torch.stack((x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height)), dim=-1)


def _best_per_image(
    kept: Candidates, boxes: Tensor, num_kept: Tensor, max_detections: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The `max_detections` best of each image by score, equal scores by class and then by anchor; padded."""
    order = kept.score.argsort(descending=True, stable=True)
    order = order[kept.image[order].argsort(stable=True)]
    image = kept.image[order]
    slot = torch.arange(len(image), device=boxes.device) - (num_kept.cumsum(0) - num_kept)[image]
    returned = slot < max_detections
    order, image, slot = order[returned], image[returned], slot[returned]
    out_boxes, out_scores, out_labels = _empty_output(len(num_kept), max_detections, boxes.device)
    out_boxes[image, slot] = boxes[order].float()
    out_scores[image, slot] = kept.score[order]
    out_labels[image, slot] = kept.class_index[order] + 1
    return out_boxes, out_scores, out_labels, num_kept.clamp(max=max_detections).int()
