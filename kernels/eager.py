"""Every op in plain PyTorch, on any device: what runs on the CPU, and the fair baseline of the kernels.

NMS decides in NumPy, for a few boxes at a time are nothing but overhead to PyTorch.

Arithmetic is fp32 (fp64 for fp64 input). The order of operations in IoU, encode and decode is torchvision's;
the Triton kernels follow it step by step, so that decisions taken on an IoU are the same bits everywhere.
Arguments have been checked by `functional`.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(1000.0 / 16)  # clamp of dw and dh; torchvision's BoxCoder, bbox_xform_clip
MATCH_ROWS = 32  # ground truths matched at once: with 8732 anchors a megabyte a tensor
LOSS_LOGITS = 2**20  # taken at once: four megabytes, which the cache holds
NMS_FEW = 320  # boxes solved in one step, though half of the comparisons are for nothing
NMS_BLOCK = 256  # boxes settled at once, in NumPy: faster than PyTorch by its microseconds an operation
NMS_PAIRS = 2**18  # compared at once, of several groups: a megabyte a tensor, which the cache holds
NMS_GROUPS = 1024  # solved at once: 64 MB of decisions at most
NMS_ALIKE = 8  # groups of one length are worth solving together if they are more than an eighth of it


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic on it uses: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


# --- boxes ------------------------------------------------------------------------------------------------


def _iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU [..., N, M] of every pair of `boxes1` [..., N, 4] and `boxes2` [..., M, 4]."""
    # Coordinates first, each contiguous: both axes in one operation, and pairs that vectorise.
    a, b = boxes1.movedim(-1, 0).contiguous(), boxes2.movedim(-1, 0).contiguous()
    low = torch.maximum(a[:2, ..., :, None], b[:2, ..., None, :])  # [2, ..., N, M]
    high = torch.minimum(a[2:, ..., :, None], b[2:, ..., None, :])
    intersection = torch.mul(*high.sub_(low).clamp_(min=0))
    union = torch.mul(*(a[2:] - a[:2]))[..., :, None] + torch.mul(*(b[2:] - b[:2]))[..., None, :]
    return intersection.div_(union.sub_(intersection))


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return _iou(widen(boxes1), widen(boxes2))


def _centre_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    cx, cy, width, height = _centre_size(widen(boxes))
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centre_size(widen(anchors))
    return torch.stack(
        (
            wx * (cx - anchor_cx) / anchor_width,
            wy * (cy - anchor_cy) / anchor_height,
            ww * torch.log(width / anchor_width),
            wh * torch.log(height / anchor_height),
        ),
        dim=-1,
    )


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = widen(deltas).unbind(-1)
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centre_size(widen(anchors))
    cx = dx / wx * anchor_width + anchor_cx
    cy = dy / wy * anchor_height + anchor_cy
    half_width = 0.5 * (torch.exp((dw / ww).clamp(max=MAX_LOG_SCALE)) * anchor_width)
    half_height = 0.5 * (torch.exp((dh / wh).clamp(max=MAX_LOG_SCALE)) * anchor_height)
    return torch.stack((cx - half_width, cy - half_height, cx + half_width, cy + half_height), dim=-1)


def decode_boxes_backward(grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    gx1, gy1, gx2, gy2 = widen(grad).unbind(-1)
    _, _, dw, dh = widen(deltas).unbind(-1)
    _, _, anchor_width, anchor_height = _centre_size(widen(anchors))
    log_width, log_height = dw / ww, dh / wh
    width_slope = torch.where(log_width <= MAX_LOG_SCALE, torch.exp(log_width) * anchor_width, 0.0)
    height_slope = torch.where(log_height <= MAX_LOG_SCALE, torch.exp(log_height) * anchor_height, 0.0)
    grad_deltas = torch.stack(
        (
            (gx1 + gx2) * anchor_width / wx,
            (gy1 + gy2) * anchor_height / wy,
            0.5 * (gx2 - gx1) * width_slope / ww,
            0.5 * (gy2 - gy1) * height_slope / wh,
        ),
        dim=-1,
    )
    return grad_deltas.to(deltas.dtype)


# --- matching ---------------------------------------------------------------------------------------------


def match_anchors(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    rows = gt_offsets.tolist()
    gt_boxes, anchors = widen(gt_boxes[rows[0] :]), widen(anchors)
    device, num_anchors = anchors.device, len(anchors)
    offsets = [row - rows[0] for row in rows]  # an image's first among those that any image owns
    total = offsets[-1]
    best_iou = torch.zeros(len(offsets) - 1, num_anchors, dtype=anchors.dtype, device=device)
    matched = torch.full(best_iou.shape, -1, dtype=torch.int64, device=device)
    if matched.numel() == 0 or total == 0:
        return matched
    claimed, overlap = torch.zeros(total, dtype=torch.int64, device=device), anchors.new_zeros(total)
    # Some ground truths at a time, of whichever images: [rows, A] stays in the cache.
    for start in range(0, total, MATCH_ROWS):
        some = slice(start, min(start + MATCH_ROWS, total))
        iou = _iou(gt_boxes[some], anchors).nan_to_num_(0.0)  # a NaN overlaps nothing
        overlap[some], claimed[some] = iou.max(dim=1)  # the first of equal maxima
        for image, (first, end) in enumerate(pairwise(offsets)):
            part = iou[max(first - start, 0) : max(end - start, 0)]
            if len(part) and first >= start:  # the image's first: nothing to compare with
                torch.max(part, dim=0, out=(best_iou[image], matched[image]))
            elif len(part):
                top, slot = part.max(dim=0)
                better = top > best_iou[image]
                best_iou[image] = torch.where(better, top, best_iou[image])
                matched[image] = torch.where(better, slot + (start - first), matched[image])
    # A threshold may round to 0, which no overlap reaches.
    matched = torch.where((best_iou > 0) & (best_iou >= iou_threshold), matched, -1)
    owner = torch.arange(len(offsets) - 1, device=device).repeat_interleave(gt_offsets.diff())  # [T] image
    slots = torch.arange(total, device=device) - (gt_offsets - rows[0])[owner]
    cell = (owner * num_anchors + claimed)[overlap > 0]
    # Of several claims on an anchor the last one stands.
    matched.view(-1).scatter_reduce_(0, cell, slots[overlap > 0], "amax", include_self=False)
    return matched


# --- loss -------------------------------------------------------------------------------------------------


def packed(levels: Sequence[Tensor]) -> Tensor:
    """[B, A, C] of levels [B, P, a, C]; a copy only if there are several, or one whose cells lie in planes."""
    rows = [level.flatten(1, 2) for level in levels]
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def in_planes(levels: Sequence[Tensor]) -> bool:
    """Do the maps under `levels` [B, P, a, C] lie as [B, a, C, P] in memory, not as [B, P, a, C]?"""
    return all(level.permute(0, 2, 3, 1).is_contiguous() for level in levels) and not all(
        level.is_contiguous() for level in levels
    )


def empty_gradients(cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor]) -> list[Tensor]:
    """Of each level of logits, then of deltas: a tensor of its shape, dense, laid out as all of them are."""
    levels = [*cls_logits, *box_deltas]
    if in_planes(levels):
        return [x.permute(0, 2, 3, 1).new_empty(x.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2) for x in levels]
    return [x.new_empty(x.shape) for x in levels]


def _smooth_l1(difference: Tensor, beta: float) -> Tensor:
    distance = difference.abs()
    if beta == 0:
        return distance
    return torch.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


def _smooth_l1_slope(difference: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return torch.where(difference.isnan(), difference, difference.sign())  # sign(NaN) is 0 in torch
    return (difference / beta).clamp(-1, 1)


def _assigned(
    image: Tensor, slot: Tensor, gt_labels: Tensor, gt_offsets: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each positive anchor, given its image and match: row in `gt_boxes`, class, and is that valid; each [P].

    Where it is not, row and class are 0.
    """
    inside = slot < gt_offsets.diff()[image]
    gt = torch.where(inside, gt_offsets[image].long() + slot, 0)
    label = F.pad(gt_labels, (0, 1))[gt].long()  # padded: without any ground truth, row 0 must still exist
    valid = inside & (label >= 1) & (label < num_classes)
    return gt, torch.where(valid, label, 0), valid


def _background(levels: Sequence[Tensor], num_anchors: int) -> tuple[Tensor, Tensor]:
    """The logit and the cross-entropy of the background, each [B, A]."""
    logit, cross_entropy = widen(levels[0].new_empty(2, len(levels[0]), num_anchors))
    first = 0
    for level in levels:
        own = slice(first, first + level[0, ..., 0].numel() if len(level) else 0)
        # On a CPU some images at a time: the scores of the other classes, which nobody wants, stay in the cache.
        images = max(1, LOSS_LOGITS // max(1, level[:1].numel()) if level.is_cpu else len(level))
        for start in range(0, len(level), images):
            some = slice(start, start + images)
            rows = widen(level[some]).flatten(1, 2)
            cross_entropy[some, own] = rows.log_softmax(dim=-1)[..., 0]
            logit[some, own] = rows[..., 0]
        first = own.stop
    # Rounding can leave a score a hair above 1, but a loss is not negative.
    return logit, cross_entropy.neg_().clamp_(min=0)


def _hardest(hardness: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Which of `hardness` [B, A] are the `wanted` [B] largest, bool, of equal ones the first; and their sums [B].

    What is negative is no candidate, and none is NaN.
    """
    most = max(wanted.tolist(), default=0)
    if most == 0:
        return torch.zeros_like(hardness, dtype=torch.bool), hardness.new_zeros(len(hardness))
    # One more than wanted: does it equal the last that is?
    values, index = hardness.topk(min(most + 1, hardness.shape[1]), dim=1)
    wanted = wanted[:, None]
    chosen = (torch.arange(values.shape[1], device=values.device) < wanted) & (values >= 0)
    sums = torch.where(chosen, values, 0.0).sum(dim=1)
    kth = torch.where(wanted > 0, values.gather(1, (wanted - 1).clamp(min=0)), math.inf)
    if ((values == kth) & ~chosen & (values >= 0)).any():
        larger, tie = hardness > kth, hardness == kth
        return larger | (tie & (tie.cumsum(dim=1) <= wanted - larger.sum(dim=1, keepdim=True))), sums
    return torch.zeros_like(hardness, dtype=torch.bool).scatter_(1, index, chosen), sums


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
    positive = matched_idxs >= 0
    image, anchor = positive.nonzero(as_tuple=True)
    gt, label, valid = _assigned(
        image, matched_idxs[image, anchor], gt_labels, gt_offsets, num_classes=cls_logits[0].shape[-1]
    )

    lse, hardness = _background(cls_logits, num_anchors)
    lse += hardness
    bad = torch.zeros(batch, dtype=torch.bool, device=lse.device)  # a logit is NaN or infinite
    if not lse.sum().isfinite():
        # A background of -inf says nothing of the others; an infinite logit has no cross-entropy.
        odd = (~lse.isfinite()).nonzero(as_tuple=True)
        own = _rows(cls_logits, *odd).logsumexp(dim=-1)
        lse[odd] = own.masked_fill(own == math.inf, math.nan)
        bad = hardness.isnan().any(dim=1)
        # NaN before infinity.
        largest = torch.finfo(hardness.dtype).max
        hardness = torch.where(hardness.isnan(), math.inf, hardness.clamp(max=largest))
    hardness[image, anchor] = -1.0

    num_positives = positive.sum(dim=1)  # [B]
    num_negatives = (neg_pos_ratio * num_positives.float()).ceil().clamp(min=min_negatives, max=num_anchors)
    negative, classification = _hardest(hardness, num_negatives.long())
    selected = positive | negative

    positive_loss = _rows(cls_logits, image, anchor).log_softmax(dim=-1).gather(1, label[:, None])[:, 0]
    positive_loss = torch.where(valid, positive_loss.neg().clamp(min=0), math.nan)
    classification = torch.where(bad, math.nan, classification.index_add_(0, image, positive_loss))

    target = encode_boxes(F.pad(widen(gt_boxes), (0, 0, 0, 1))[gt], anchors[anchor], weights)  # [P, 4]
    box_loss = _smooth_l1(_rows(box_deltas, image, anchor) - target, beta).sum(dim=-1)
    box_loss = torch.where(valid, box_loss, math.nan)
    bbox_regression = torch.zeros_like(classification).index_add_(0, image, box_loss.to(classification.dtype))
    if normalizer == "batch":
        scale = (1 / num_positives.sum().clamp(min=1).to(lse.dtype)).expand(batch).clone()
        # One division at the end, as torchvision's, not one for each image.
        total = num_positives.sum().clamp(min=1)
        losses = classification.sum() / total, bbox_regression.sum() / total
    else:
        share = 1 / (num_positives.to(lse.dtype) * batch)
        scale = torch.where(num_positives > 0, share, 0.0)
        # `where`, not a product with 0: an image without positives may have an infinite loss.
        weighted = [torch.where(num_positives > 0, x * scale, 0.0) for x in (classification, bbox_regression)]
        losses = weighted[0].sum(), weighted[1].sum()
    return *losses, lse, selected, scale


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
    """The gradients of each level of the logits, then of the deltas."""
    grads = [grad.zero_() for grad in empty_gradients(cls_logits, box_deltas)]
    grad_logits, grad_deltas = grads[: len(cls_logits)], grads[len(cls_logits) :]
    # About one row in thirty is selected: the others cost a zero each and are never read.
    image, anchor = selected.nonzero(as_tuple=True)
    slot = matched_idxs[image, anchor]
    positive = (slot >= 0).nonzero()[:, 0]
    own, place = image[positive], anchor[positive]
    gt, label, valid = _assigned(own, slot[positive], gt_labels, gt_offsets, cls_logits[0].shape[-1])

    gradient = torch.exp(_rows(cls_logits, image, anchor) - lse[image, anchor, None])  # [S, C] softmax
    column = torch.zeros_like(slot).index_copy_(0, positive, label)
    gradient.scatter_add_(1, column[:, None], gradient.new_full((len(column), 1), -1.0))
    gradient[positive[~valid]] = math.nan
    _set_rows(grad_logits, image, anchor, gradient * (grad_classification * scale[image])[:, None])

    target = encode_boxes(F.pad(widen(gt_boxes), (0, 0, 0, 1))[gt], anchors[place], weights)
    slope = _smooth_l1_slope(_rows(box_deltas, own, place) - target, beta)
    slope = torch.where(valid[:, None], slope, math.nan)
    _set_rows(grad_deltas, own, place, slope * (grad_bbox_regression * scale[own])[:, None])
    return grads


def _places(
    levels: Sequence[Tensor], image: Tensor, anchor: Tensor
) -> Iterator[tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]]:
    """Each level, which of the anchors lie on it, and their image, cell and place in the cell."""
    first = 0
    for level in levels:
        cells, per_cell = level.shape[1:3]
        row = anchor - first
        own = ((row >= 0) & (row < cells * per_cell)).nonzero()[:, 0]
        row = row[own]
        yield level, own, (image[own], row // per_cell, row % per_cell)
        first += cells * per_cell


def _rows(levels: Sequence[Tensor], image: Tensor, anchor: Tensor) -> Tensor:
    """The rows [S, C] of some anchors, widened."""
    if len(levels) == 1 and levels[0].shape[2] == 1:
        return widen(levels[0][image, anchor, 0])
    rows = widen(levels[0].new_empty(len(anchor), levels[0].shape[3]))
    for level, own, place in _places(levels, image, anchor):
        rows[own] = widen(level[place])
    return rows


def _set_rows(levels: Sequence[Tensor], image: Tensor, anchor: Tensor, rows: Tensor) -> None:
    if len(levels) == 1 and levels[0].shape[2] == 1:
        levels[0][image, anchor, 0] = rows.to(levels[0].dtype)
        return
    for level, own, place in _places(levels, image, anchor):
        level[place] = rows[own].to(level.dtype)


# --- NMS --------------------------------------------------------------------------------------------------


@functools.cache
def round_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`: an fp32 IoU exceeds one iff it exceeds the other."""
    # Named: under another default device, `item` would wait for the GPU.
    nearest = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    if nearest.item() > threshold:
        nearest = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    return nearest.item()


def sort_key(scores: Tensor) -> Tensor:
    return widen(scores) + 0.0  # -0.0 becomes 0.0: a radix sort would part them


def _greedy_keep(boxes: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """Which of `boxes` [M, 4], sorted by `groups` [M] and then from best to worst, survive NMS: bool [M]."""
    if boxes.dtype == torch.float32:
        iou_threshold = round_down(iou_threshold)
    if len(boxes) <= NMS_FEW:
        return _greedy_keep_of_few(boxes, groups, iou_threshold)
    if groups is None:
        return _greedy_keep_of_one(boxes, iou_threshold)
    by_length: dict[int, list[tuple[int, int]]] = {}  # powers of two: first box and number of each group
    first = 0
    for size in groups.unique_consecutive(return_counts=True)[1].tolist():
        by_length.setdefault(1 << (size - 1).bit_length(), []).append((first, size))
        first += size
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for length, alike in by_length.items():
        if length <= NMS_BLOCK and NMS_ALIKE * len(alike) >= length:
            _greedy_keep_of_many(boxes, torch.tensor(alike, device=boxes.device), length, iou_threshold, keep)
        else:
            for first, size in alike:
                keep[first : first + size] = _greedy_keep_of_one(boxes[first : first + size], iou_threshold)
    return keep


def _greedy_keep_of_many(boxes: Tensor, groups: Tensor, length: int, iou_threshold: float, keep: Tensor) -> None:
    """The same for groups of at most `length` boxes, `groups` [P, 2] first and number: writes their part of `keep`."""
    place = torch.arange(length, device=boxes.device)
    for some in groups.split(NMS_GROUPS):
        inside = place < some[:, 1:]  # [P, L]
        index = torch.where(inside, some[:, :1] + place, 0)
        parts = boxes[index].split(max(1, NMS_PAIRS // length**2))
        spares = torch.cat([~(_iou(part, part) > iou_threshold) for part in parts])  # [P, L, L]
        kept = inside.clone()
        for better in range(length - 1):  # settled, for those before it are
            worse = slice(better + 1, length)
            kept[:, worse] &= spares[:, better, worse] | ~kept[:, better, None]
        keep[index[inside]] = kept[inside]


def _greedy_keep_of_one(boxes: Tensor, iou_threshold: float) -> Tensor:
    """The same for a single group: the best `NMS_BLOCK` are settled, then rid the rest of what they suppress."""
    head, rest = boxes[:NMS_BLOCK], boxes[NMS_BLOCK:]
    kept = _greedy_keep_of_few(head, None, iou_threshold)
    if len(rest) == 0:
        return kept
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[:NMS_BLOCK] = kept
    left = torch.arange(NMS_BLOCK, len(boxes), device=boxes.device)  # neither kept nor suppressed so far
    while len(rest):
        best = head[kept]
        parts = rest.split(NMS_PAIRS // NMS_BLOCK)
        left = left[torch.cat([~(_iou(best, part) > iou_threshold).any(dim=0) for part in parts])]
        head, rest = boxes[left[:NMS_BLOCK]], boxes[left[NMS_BLOCK:]]
        kept = _greedy_keep_of_few(head, None, iou_threshold)
        keep[left[:NMS_BLOCK]] = kept
        left = left[NMS_BLOCK:]
    return keep


def _greedy_keep_of_few(boxes: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """The same for at most `NMS_FEW` boxes, on the host."""
    kept = _greedy_keep_in_numpy(boxes.cpu().numpy(), None if groups is None else groups.cpu().numpy(), iou_threshold)
    return torch.from_numpy(kept).to(boxes.device)


@np.errstate(all="ignore")  # of odd boxes
def _greedy_keep_in_numpy(boxes: np.ndarray, groups: np.ndarray | None, iou_threshold: float) -> np.ndarray:
    """The same: the arithmetic is that of `_iou`, so the decisions are."""
    corners = np.ascontiguousarray(boxes.T)
    a, b = corners[:, :, None], corners[:, None, :]
    sides = np.minimum(a[2:], b[2:])  # [2, M, M]
    sides -= np.maximum(a[:2], b[:2])
    intersection = sides[0] * sides[1]
    area = np.multiply(*(corners[2:] - corners[:2]))
    union = area[:, None] + area
    union -= intersection
    intersection /= union
    suppresses = intersection > iou_threshold
    # Not clamped, as in `_iou`, which takes longer: instead, where a side is not positive nothing is suppressed.
    suppresses &= sides[0] > 0
    suppresses &= sides[1] > 0
    if groups is not None:
        suppresses &= groups[:, None] == groups
    size = len(boxes)
    suppresses.ravel()[:: size + 1] = False
    # One decision after the other is what arrays are worst at: rows as Python's integers, a byte a box. What a row says
    # of better boxes does no harm, for it is symmetric: they have been removed, or this one would have been.
    rows = suppresses.tobytes()
    removed = 0
    for box in suppresses.any(axis=1).nonzero()[0].tolist():
        if not removed >> (8 * box) & 1:
            removed |= int.from_bytes(rows[box * size : (box + 1) * size], "little")
    return np.frombuffer(removed.to_bytes(size, "little"), dtype=bool) ^ True


def _keep_mask(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, score_threshold: float | None
) -> Tensor:
    """Which of `boxes` [B, N, 4] survive NMS within their image and class: bool [B, N]."""
    candidate = torch.ones_like(scores, dtype=torch.bool)
    if score_threshold is not None:
        candidate = widen(scores) > score_threshold
    image, box = candidate.nonzero(as_tuple=True)
    order = sort_key(scores[image, box]).argsort(descending=True, stable=True)
    if idxs is not None:
        order = order[idxs[image, box][order].argsort(stable=True)]
    if len(boxes) > 1:
        order = order[image[order].argsort(stable=True)]
    image, box = image[order], box[order]
    group = image
    if idxs is not None:
        own = idxs[image, box]
        begins = (image[1:] != image[:-1]) | (own[1:] != own[:-1])
        group = F.pad(begins, (1, 0)).cumsum(dim=0)
    keep = torch.zeros_like(candidate)
    keep[image, box] = _greedy_keep(widen(boxes[image, box]), group, iou_threshold)
    return keep


def _nms_of_few(
    boxes: np.ndarray,
    scores: np.ndarray,
    idxs: np.ndarray | None,
    iou_threshold: float,
    candidate: np.ndarray | None = None,
) -> np.ndarray:
    """`nms` in NumPy, of at most `NMS_FEW` boxes; of those that are a `candidate`, bool [N], where that is given."""
    if boxes.dtype == np.float32:
        iou_threshold = round_down(iou_threshold)
    # NumPy sorts upwards, equal ones by index and NaN last: read from behind, as wanted.
    order = len(scores) - 1 - scores[::-1].argsort(kind="stable")[::-1]
    if candidate is not None:
        order = order.compress(candidate.take(order))
    groups = None if idxs is None else idxs.take(order)
    return order.compress(_greedy_keep_in_numpy(boxes.take(order, axis=0), groups, iou_threshold))


def nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    if len(boxes) <= NMS_FEW and boxes.is_cpu:
        classes = None if idxs is None else idxs.numpy()
        return torch.from_numpy(_nms_of_few(widen(boxes).numpy(), widen(scores).numpy(), classes, iou_threshold))
    order = sort_key(scores).argsort(descending=True, stable=True)
    if idxs is None:
        return order[_greedy_keep(widen(boxes[order]), None, iou_threshold)]
    by_class = idxs[order].argsort(stable=True)
    own = order[by_class]
    keep = torch.zeros_like(by_class, dtype=torch.bool)
    keep[by_class] = _greedy_keep(widen(boxes[own]), idxs[own], iou_threshold)
    return order[keep]


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    if boxes.shape[1] <= NMS_FEW and boxes.is_cpu:
        boxes, scores = widen(boxes), widen(scores)
        candidate = None if score_threshold is None else scores > score_threshold
        rows, count = np.full((len(boxes), max_output), -1), np.zeros(len(boxes), dtype=np.int32)
        for image in range(len(boxes)):
            classes, own = (None if x is None else x[image].numpy() for x in (idxs, candidate))
            kept = _nms_of_few(boxes[image].numpy(), scores[image].numpy(), classes, iou_threshold, own)[:max_output]
            rows[image, : len(kept)], count[image] = kept, len(kept)
        return torch.from_numpy(rows), torch.from_numpy(count)
    keep = _keep_mask(boxes, scores, idxs, iou_threshold, score_threshold)
    order = sort_key(scores).argsort(dim=1, descending=True, stable=True)  # [B, N]
    keep = keep.gather(1, order)
    slot = torch.where(keep, keep.cumsum(dim=1) - 1, max_output).clamp(max=max_output)
    out = torch.full((len(boxes), max_output + 1), -1, dtype=torch.int64, device=boxes.device)
    out.scatter_(1, slot, order)  # the last column takes what is not returned
    return out[:, :max_output].contiguous(), keep.sum(dim=1).clamp(max=max_output).int()


# --- postprocess ------------------------------------------------------------------------------------------


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
    boxes_out = torch.zeros(batch, max_detections, 4, dtype=torch.float32, device=device)
    scores_out = torch.zeros(batch, max_detections, dtype=torch.float32, device=device)
    labels_out = torch.full((batch, max_detections), -1, dtype=torch.int64, device=device)
    topk = min(topk_candidates, num_anchors)
    if batch == 0 or topk == 0 or num_classes < 2 or max_detections == 0:
        return boxes_out, scores_out, labels_out, torch.zeros(batch, dtype=torch.int32, device=device)

    scores = widen(logits).softmax(dim=-1).float()[..., 1:]  # [B, A, C - 1]
    best = scores.amax(dim=-1).nan_to_num_(0.0)  # [B, A]
    # A candidate's fate hangs on the better ones of its class alone: once `max_detections` of all that reach some
    # floor stand, nothing below it matters. The best of twice as many anchors will mostly do, else four times as many.
    wanted = 2 * max_detections
    while True:
        everything = wanted >= num_anchors
        if everything:
            floor = scores.nan_to_num_(0.0).topk(topk, dim=1).values[:, -1]  # [B, C - 1]
        else:
            floor = best.topk(wanted, dim=1).values[:, -1:]  # [B, 1]
        image, anchor = ((best >= floor.amin(dim=1, keepdim=True)) & (best > score_threshold)).nonzero(as_tuple=True)
        own = scores[image, anchor]  # [S, C - 1]
        row, category = ((own >= floor[image]) & (own > score_threshold)).nonzero(as_tuple=True)
        image, anchor, score = image[row], anchor[row], own[row, category]
        group = image * (num_classes - 1) + category
        order = score.argsort(descending=True, stable=True)
        order = order[group[order].argsort(stable=True)]  # by image, class, score, anchor
        group = group[order]
        rank = torch.arange(len(group), device=device) - torch.searchsorted(group, group)
        order, group = order[rank < topk], group[rank < topk]
        image, category, anchor, score = image[order], category[order], anchor[order], score[order]

        boxes = decode_boxes(_rows(box_deltas, image, anchor), anchors[anchor], weights)
        height, width = widen(image_sizes).to(boxes.dtype)[image].unbind(-1)
        x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
        boxes = torch.stack((x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height)), dim=-1)
        keep = _greedy_keep(boxes, group, iou_threshold)
        image, category, boxes, score = image[keep], category[keep], boxes[keep], score[keep]
        count = image.bincount(minlength=batch)
        if everything or ((count >= max_detections) | (floor[:, 0] <= score_threshold)).all():
            break
        wanted *= 4

    order = score.argsort(descending=True, stable=True)  # equal scores: by class, then by anchor
    order = order[image[order].argsort(stable=True)]
    image, category, boxes, score = image[order], category[order], boxes[order], score[order]
    slot = torch.arange(len(image), device=device) - (count.cumsum(0) - count)[image]
    returned = slot < max_detections
    image, slot = image[returned], slot[returned]
    boxes_out[image, slot] = boxes[returned].float()
    scores_out[image, slot] = score[returned]
    labels_out[image, slot] = category[returned] + 1
    return boxes_out, scores_out, labels_out, count.clamp(max=max_detections).int()
