"""The MultiBox loss and its gradients in plain PyTorch, on any device."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ssdcore.kernels.boxes.eager import encode_boxes
from ssdcore.kernels.levels import empty_gradients, gather_rows, scatter_rows
from ssdcore.kernels.rules import exp, nonzero, widen

LOGITS_AT_ONCE = 2**20  # on a CPU: four megabytes, which the cache holds


class Positives(NamedTuple):
    """The positive anchors of a batch, one entry each."""

    image: Tensor  # [P]
    anchor: Tensor  # [P]
    gt_row: Tensor  # [P] row of the ground truth in the batch; 0 where not valid
    label: Tensor  # [P] class of the ground truth; 0 where not valid
    valid: Tensor  # bool [P]: the match is one of the image's ground truths, and its label is in 1..C-1


def multibox_loss(
    cls_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    matched_idxs: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    anchors: Tensor,
    weights: Sequence[float],
    neg_pos_ratio: float,
    beta: float,
    min_negatives: int,
    normalizer: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Both losses, and what the backward needs: log-sum-exp [B, A], selected anchors [B, A], scale [B].

    `cls_logits` and `box_deltas` are levels [B, P, a, C] and [B, P, a, 4].
    """
    batch, num_anchors = matched_idxs.shape
    is_positive = matched_idxs >= 0
    image, anchor = nonzero(is_positive)
    positives = _assign(
        image, anchor, matched_idxs[image, anchor], gt_labels, gt_offsets, num_classes=cls_logits[0].shape[-1]
    )

    lse, hardness = _background_loss(cls_logits, num_anchors)
    lse += hardness
    has_nan = torch.zeros(batch, dtype=torch.bool, device=lse.device)  # the image has a NaN or +inf logit
    if not lse.sum().isfinite():
        # Where the background is -inf, its logit does not give the log-sum-exp. A row with a +inf logit has no
        # cross-entropy.
        not_finite = (~lse.isfinite()).nonzero(as_tuple=True)
        row_lse = gather_rows(cls_logits, *not_finite).logsumexp(dim=-1)
        lse[not_finite] = row_lse.masked_fill(row_lse == math.inf, math.nan)
        has_nan = hardness.isnan().any(dim=1)
        # A NaN is harder than infinity.
        largest = torch.finfo(hardness.dtype).max
        hardness = torch.where(hardness.isnan(), math.inf, hardness.clamp(max=largest))
    hardness[image, anchor] = -1.0

    num_positives = is_positive.sum(dim=1)  # [B]
    num_negatives = (neg_pos_ratio * num_positives.float()).ceil().clamp(min=min_negatives, max=num_anchors)
    is_negative, classification = _mine(hardness, num_negatives.long())
    selected = is_positive | is_negative

    log_softmax = gather_rows(cls_logits, image, anchor).log_softmax(dim=-1)  # [P, C]
    positive_loss = log_softmax.gather(1, positives.label[:, None])[:, 0]
    positive_loss = torch.where(positives.valid, positive_loss.neg().clamp(min=0), math.nan)
    classification = torch.where(has_nan, math.nan, classification.index_add_(0, image, positive_loss))

    target = _target_deltas(positives, gt_boxes, anchors, weights)
    box_loss = _smooth_l1(gather_rows(box_deltas, image, anchor) - target, beta).sum(dim=-1)
    box_loss = torch.where(positives.valid, box_loss, math.nan)
    bbox_regression = torch.zeros_like(classification).index_add_(0, image, box_loss.to(classification.dtype))
    losses, scale = _normalize(classification, bbox_regression, num_positives, normalizer)
    return *losses, lse, selected, scale


def _assign(
    image: Tensor, anchor: Tensor, gt_index: Tensor, gt_labels: Tensor, gt_offsets: Tensor, num_classes: int
) -> Positives:
    """The positives at `image` [P] and `anchor` [P], which are matched with `gt_index` [P] of their image."""
    inside = gt_index < gt_offsets.diff()[image]
    gt_row = torch.where(inside, gt_offsets[image].long() + gt_index, 0)
    label = F.pad(gt_labels, (0, 1))[gt_row].long()  # padded, because row 0 must exist without any ground truth too
    valid = inside & (label >= 1) & (label < num_classes)
    return Positives(image, anchor, gt_row, torch.where(valid, label, 0), valid)


def _target_deltas(positives: Positives, gt_boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    """The deltas [P, 4] that the positives should have."""
    padded = F.pad(widen(gt_boxes), (0, 0, 0, 1))  # row 0 must exist without any ground truth too
    return encode_boxes(padded[positives.gt_row], anchors[positives.anchor], weights)


def _background_loss(levels: Sequence[Tensor], num_anchors: int) -> tuple[Tensor, Tensor]:
    """The logit and the cross-entropy of the background, each [B, A]."""
    logit, cross_entropy = widen(levels[0].new_empty(2, len(levels[0]), num_anchors))
    first_anchor = 0
    for level in levels:
        on_level = slice(first_anchor, first_anchor + level[0, ..., 0].numel() if len(level) else 0)
        # On a CPU, a few images at a time: the log-softmax of the other classes is not needed and stays in the cache.
        images_at_once = max(1, LOGITS_AT_ONCE // max(1, level[:1].numel()) if level.is_cpu else len(level))
        for start in range(0, len(level), images_at_once):
            images = slice(start, start + images_at_once)
            rows = widen(level[images]).flatten(1, 2)
            cross_entropy[images, on_level] = rows.log_softmax(dim=-1)[..., 0]
            logit[images, on_level] = rows[..., 0]
        first_anchor = on_level.stop
    # Rounding can leave a log-softmax slightly above 0, but a loss is not negative.
    return logit, cross_entropy.neg_().clamp_(min=0)


def _mine(hardness: Tensor, num_wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Mark the `num_wanted` [B] largest of `hardness` [B, A] in each image, and add them up: bool [B, A], sums [B].

    Of equal values the first are marked. A negative value is no candidate. There is no NaN.
    """
    most_wanted = max(num_wanted.tolist(), default=0)
    if most_wanted == 0:
        return torch.zeros_like(hardness, dtype=torch.bool), hardness.new_zeros(len(hardness))
    # One more than wanted, to see whether it equals the last wanted value.
    values, index = hardness.topk(min(most_wanted + 1, hardness.shape[1]), dim=1)
    num_wanted = num_wanted[:, None]
    wanted = (torch.arange(values.shape[1], device=values.device) < num_wanted) & (values >= 0)
    sums = torch.where(wanted, values, 0.0).sum(dim=1)
    kth = torch.where(num_wanted > 0, values.gather(1, (num_wanted - 1).clamp(min=0)), math.inf)
    if ((values == kth) & ~wanted & (values >= 0)).any():
        larger, tie = hardness > kth, hardness == kth
        return larger | (tie & (tie.cumsum(dim=1) <= num_wanted - larger.sum(dim=1, keepdim=True))), sums
    return torch.zeros_like(hardness, dtype=torch.bool).scatter_(1, index, wanted), sums


def _smooth_l1(difference: Tensor, beta: float) -> Tensor:
    distance = difference.abs()
    if beta == 0:
        return distance
    return torch.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


def _smooth_l1_slope(difference: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return torch.where(difference.isnan(), difference, difference.sign())  # sign(NaN) is 0 in torch
    return (difference / beta).clamp(-1, 1)


def _normalize(
    classification: Tensor, bbox_regression: Tensor, num_positives: Tensor, normalizer: str
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """The losses of the batch, given those of its images [B], and the factor [B] of each image's gradient."""
    if normalizer == "batch":
        total = num_positives.sum().clamp(min=1)
        scale = (1 / total.to(classification.dtype)).expand(len(num_positives)).clone()
        # One division at the end, as in torchvision, not one for each image.
        return (classification.sum() / total, bbox_regression.sum() / total), scale
    has_positives = num_positives > 0
    scale = torch.where(has_positives, 1 / (num_positives.to(classification.dtype) * len(num_positives)), 0.0)
    # `where` and not a product with 0, because an image without positives may have an infinite loss.
    weighted = [torch.where(has_positives, loss * scale, 0.0) for loss in (classification, bbox_regression)]
    return (weighted[0].sum(), weighted[1].sum()), scale


def multibox_loss_backward(
    grad_classification: Tensor,
    grad_bbox_regression: Tensor,
    cls_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    matched_idxs: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    anchors: Tensor,
    lse: Tensor,
    selected: Tensor,
    scale: Tensor,
    weights: Sequence[float],
    beta: float,
) -> list[Tensor]:
    """The gradients of each level of the logits, then of each level of the deltas."""
    grads = [grad.zero_() for grad in empty_gradients(cls_logits, box_deltas)]
    grad_logits, grad_deltas = grads[: len(cls_logits)], grads[len(cls_logits) :]
    # With seven objects per image, about one row in eighty is selected. Other rows cost their zeros and are never read.
    image, anchor = nonzero(selected)
    gt_index = matched_idxs[image, anchor]
    is_positive = (gt_index >= 0).nonzero()[:, 0]
    positives = _assign(
        image[is_positive],
        anchor[is_positive],
        gt_index[is_positive],
        gt_labels,
        gt_offsets,
        num_classes=cls_logits[0].shape[-1],
    )

    gradient = exp(gather_rows(cls_logits, image, anchor) - lse[image, anchor, None])  # [S, C] softmax
    label = torch.zeros_like(gt_index).index_copy_(0, is_positive, positives.label)  # [S]
    gradient.scatter_add_(1, label[:, None], gradient.new_full((len(label), 1), -1.0))
    gradient[is_positive[~positives.valid]] = math.nan
    scatter_rows(grad_logits, image, anchor, gradient * (grad_classification * scale[image])[:, None])

    target = _target_deltas(positives, gt_boxes, anchors, weights)
    slope = _smooth_l1_slope(gather_rows(box_deltas, positives.image, positives.anchor) - target, beta)
    slope = torch.where(positives.valid[:, None], slope, math.nan)
    factor = grad_bbox_regression * scale[positives.image]
    scatter_rows(grad_deltas, positives.image, positives.anchor, slope * factor[:, None])
    return grads
