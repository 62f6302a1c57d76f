"""Every op in plain PyTorch, on any device: what runs on the CPU, and the fair baseline of the kernels.

Arithmetic is fp32 (fp64 for fp64 input). The order of operations in IoU, encode and decode is torchvision's;
the Triton kernels follow it step by step, so that decisions taken on an IoU are the same bits everywhere.
Arguments have been checked by `functional`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_LOG_SCALE = math.log(1000.0 / 16)  # clamp of dw and dh; torchvision's BoxCoder, bbox_xform_clip
NMS_BLOCK = 256  # boxes resolved at once: large enough to amortise a step, small enough for the cache


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that arithmetic on it uses: fp64 stays, everything else becomes fp32."""
    return x if x.dtype == torch.float64 else x.float()


# --- boxes ------------------------------------------------------------------------------------------------


def _coordinates(boxes: Tensor) -> tuple[Tensor, ...]:
    """x1, y1, x2, y2 of `boxes` [..., 4], each contiguous, so that broadcasting over pairs vectorises."""
    return boxes.movedim(-1, 0).contiguous().unbind(0)


def _iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU [..., N, M] of every pair of `boxes1` [..., N, 4] and `boxes2` [..., M, 4]."""
    ax1, ay1, ax2, ay2 = (c[..., :, None] for c in _coordinates(boxes1))  # [..., N, 1]
    bx1, by1, bx2, by2 = (c[..., None, :] for c in _coordinates(boxes2))  # [..., 1, M]
    width = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    height = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    intersection = width * height
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    return intersection / union


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
    gt_boxes, anchors = widen(gt_boxes), widen(anchors)
    first, count = gt_offsets[:-1].long(), gt_offsets.diff()
    batch, num_anchors = len(count), len(anchors)
    matched = torch.full((batch, num_anchors), -1, dtype=torch.int64, device=anchors.device)
    if num_anchors == 0 or batch == 0:
        return matched
    best_iou = torch.zeros(batch, num_anchors, dtype=anchors.dtype, device=anchors.device)
    claims = []
    # One step serves the n-th ground truth of every image at once: memory stays [B, A].
    for slot in range(int(count.max())):
        boxes = gt_boxes[(first + slot).clamp(max=len(gt_boxes) - 1)]  # [B, 4]
        iou = _iou(boxes, anchors)  # [B, A]
        # A NaN or an image with fewer ground truths overlaps nothing.
        iou = torch.where((iou > 0) & (slot < count)[:, None], iou, 0.0)
        better = iou > best_iou
        best_iou = torch.where(better, iou, best_iou)
        matched = matched.masked_fill(better, slot)
        anchor = iou.argmax(dim=1, keepdim=True)  # the first of equal maxima
        claims.append((anchor, iou.gather(1, anchor) > 0))
    matched = torch.where(best_iou >= iou_threshold, matched, -1)
    for slot, (anchor, overlaps) in enumerate(claims):
        matched.scatter_(1, anchor, torch.where(overlaps, slot, matched.gather(1, anchor)))
    return matched


# --- loss -------------------------------------------------------------------------------------------------


def _smooth_l1(difference: Tensor, beta: float) -> Tensor:
    distance = difference.abs()
    if beta == 0:
        return distance
    return torch.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


def _smooth_l1_slope(difference: Tensor, beta: float) -> Tensor:
    if beta == 0:
        return torch.where(difference.isnan(), difference, difference.sign())  # sign(NaN) is 0 in torch
    return (difference / beta).clamp(-1, 1)


def _assign(
    matched_idxs: Tensor, gt_labels: Tensor, gt_offsets: Tensor, num_classes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every anchor: is it positive, its row in `gt_boxes`, its class (0 if none), is the class valid."""
    first, count = gt_offsets[:-1, None].long(), gt_offsets.diff()[:, None]
    positive = matched_idxs >= 0
    inside = positive & (matched_idxs < count)
    gt = torch.where(inside, first + matched_idxs, 0)
    label = F.pad(gt_labels, (0, 1))[gt].long()  # padded: without any ground truth, row 0 must still exist
    valid = ~positive | (inside & (label >= 1) & (label < num_classes))
    return positive, gt, torch.where(positive & valid, label, 0), valid


def multibox_loss(
    cls_logits: Tensor,
    box_deltas: Tensor,
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
    """Both losses, and what the backward needs: log-sum-exp [B, A], selected anchors [B, A], scale [B]."""
    logits = widen(cls_logits)
    batch, num_anchors, num_classes = logits.shape
    positive, gt, label, valid = _assign(matched_idxs, gt_labels, gt_offsets, num_classes)

    lse = logits.logsumexp(dim=-1)  # [B, A]
    lse = torch.where(lse == math.inf, math.nan, lse)  # an infinite logit has no cross-entropy
    # Rounding can leave lse a hair under the logit it is the maximum of; a loss is not negative.
    cross_entropy = (lse - logits.gather(-1, label[..., None])[..., 0]).clamp(min=0)
    cross_entropy = torch.where(valid, cross_entropy, math.nan)

    num_positives = positive.sum(dim=1)  # [B]
    num_negatives = (neg_pos_ratio * num_positives.float()).ceil().clamp(min=min_negatives)
    hardness = torch.where(positive, -1.0, cross_entropy)
    order = hardness.argsort(dim=1, descending=True, stable=True)  # NaN first, equal values by anchor
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(num_anchors, device=order.device).expand(batch, -1))
    selected = positive | (rank < num_negatives[:, None])

    gt_boxes = F.pad(widen(gt_boxes), (0, 0, 0, 1))
    target = encode_boxes(gt_boxes[gt], anchors, weights)  # [B, A, 4]
    box_loss = _smooth_l1(widen(box_deltas) - target, beta).sum(dim=-1)
    box_loss = torch.where(valid, box_loss, math.nan)

    classification = torch.where(selected, cross_entropy, 0.0).sum(dim=1)  # [B]
    classification = torch.where(cross_entropy.isnan().any(dim=1), math.nan, classification)
    bbox_regression = torch.where(positive, box_loss, 0.0).sum(dim=1)
    if normalizer == "batch":
        scale = (1 / num_positives.sum().clamp(min=1).to(logits.dtype)).expand(batch).clone()
        # One division at the end, as torchvision's, not one for each image.
        total = num_positives.sum().clamp(min=1)
        losses = classification.sum() / total, bbox_regression.sum() / total
    else:
        share = 1 / (num_positives.to(logits.dtype) * batch)
        scale = torch.where(num_positives > 0, share, 0.0)
        # `where`, not a product with 0: an image without positives may have an infinite loss.
        weighted = [torch.where(num_positives > 0, x * scale, 0.0) for x in (classification, bbox_regression)]
        losses = weighted[0].sum(), weighted[1].sum()
    return *losses, lse, selected, scale


def multibox_loss_backward(
    grad_classification: Tensor,
    grad_bbox_regression: Tensor,
    cls_logits: Tensor,
    box_deltas: Tensor,
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
) -> tuple[Tensor, Tensor]:
    # Contiguous whatever the input is, as a compiled graph has been told.
    grad_logits = torch.zeros_like(cls_logits, memory_format=torch.contiguous_format)
    grad_deltas = torch.zeros_like(box_deltas, memory_format=torch.contiguous_format)
    positive, gt, label, valid = _assign(matched_idxs, gt_labels, gt_offsets, cls_logits.shape[-1])

    # About one row in thirty is selected: the others cost a zero each and are never read.
    image, anchor = selected.nonzero(as_tuple=True)
    rows = torch.exp(widen(cls_logits[image, anchor]) - lse[image, anchor, None])  # [S, C] softmax
    rows.scatter_add_(1, label[image, anchor, None], rows.new_full((len(rows), 1), -1.0))
    rows = torch.where(valid[image, anchor, None], rows, math.nan)
    grad_logits[image, anchor] = (rows * (grad_classification * scale[image])[:, None]).to(grad_logits.dtype)

    image, anchor = positive.nonzero(as_tuple=True)
    target = encode_boxes(F.pad(widen(gt_boxes), (0, 0, 0, 1))[gt[image, anchor]], anchors[anchor], weights)
    slope = _smooth_l1_slope(widen(box_deltas[image, anchor]) - target, beta)
    slope = torch.where(valid[image, anchor, None], slope, math.nan)
    grad_deltas[image, anchor] = (slope * (grad_bbox_regression * scale[image])[:, None]).to(grad_deltas.dtype)
    return grad_logits, grad_deltas


# --- NMS --------------------------------------------------------------------------------------------------


def round_down(threshold: float) -> float:
    """The largest fp32 number that is not above `threshold`: an fp32 IoU exceeds one iff it exceeds the other."""
    # Named: under another default device, `item` would wait for the GPU.
    nearest = torch.tensor(threshold, dtype=torch.float32, device="cpu")
    if nearest.item() > threshold:
        nearest = torch.nextafter(nearest, torch.full_like(nearest, -math.inf))
    return nearest.item()


def sort_key(scores: Tensor) -> Tensor:
    return widen(scores) + 0.0  # -0.0 becomes 0.0: a radix sort would part them


def _greedy_keep(boxes: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """Which of `boxes` [M, 4], sorted by `groups` [M] and then from best to worst, survive NMS: bool [M]."""
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    if boxes.dtype == torch.float32:
        iou_threshold = round_down(iou_threshold)
    alive = torch.arange(len(boxes), device=boxes.device)  # not yet kept, suppressed by none so far
    while len(alive):
        head = alive[:NMS_BLOCK]
        # Nothing past the last group of the head can be suppressed by it.
        reach = int(torch.searchsorted(groups[alive], groups[head[-1]], right=True))
        near = alive[:reach]
        suppresses = (_iou(boxes[head], boxes[near]) > iou_threshold) & (groups[head, None] == groups[near])
        suppresses = suppresses.triu(diagonal=1)  # only the better suppresses the worse
        # Greedy NMS is the one fixpoint of: a box is kept iff no kept better box suppresses it.
        kept = torch.ones(len(head), dtype=torch.bool, device=boxes.device)
        while True:
            now = ~(suppresses[:, : len(head)] & kept[:, None]).any(dim=0)
            if torch.equal(now, kept):
                break
            kept = now
        keep[head[kept]] = True
        survives = ~(suppresses[kept, len(head) :]).any(dim=0)
        alive = torch.cat((near[len(head) :][survives], alive[reach:]))
    return keep


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
    order = order[image[order].argsort(stable=True)]
    image, box = image[order], box[order]
    group = image
    if idxs is not None:
        group = torch.stack((image, idxs[image, box].long()), dim=1).unique_consecutive(dim=0, return_inverse=True)[1]
    keep = torch.zeros_like(candidate)
    keep[image, box] = _greedy_keep(widen(boxes[image, box]), group, iou_threshold)
    return keep


def nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    keep = _keep_mask(boxes[None], scores[None], None if idxs is None else idxs[None], iou_threshold, None)[0]
    order = sort_key(scores).argsort(descending=True, stable=True)
    return order[keep[order]]


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    keep = _keep_mask(boxes, scores, idxs, iou_threshold, score_threshold)
    order = sort_key(scores).argsort(dim=1, descending=True, stable=True)  # [B, N]
    keep = keep.gather(1, order)
    slot = torch.where(keep, keep.cumsum(dim=1) - 1, max_output).clamp(max=max_output)
    out = torch.full((len(boxes), max_output + 1), -1, dtype=torch.int64, device=boxes.device)
    out.scatter_(1, slot, order)  # the last column takes what is not returned
    return out[:, :max_output].contiguous(), keep.sum(dim=1).clamp(max=max_output).int()


# --- postprocess ------------------------------------------------------------------------------------------


def postprocess_detections(
    cls_logits: Tensor,
    box_deltas: Tensor,
    anchors: Tensor,
    image_sizes: Tensor,
    weights: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, num_anchors, num_classes = cls_logits.shape
    device = cls_logits.device
    boxes_out = torch.zeros(batch, max_detections, 4, dtype=torch.float32, device=device)
    scores_out = torch.zeros(batch, max_detections, dtype=torch.float32, device=device)
    labels_out = torch.full((batch, max_detections), -1, dtype=torch.int64, device=device)
    topk = min(topk_candidates, num_anchors)
    if batch == 0 or topk == 0 or num_classes < 2:
        return boxes_out, scores_out, labels_out, torch.zeros(batch, dtype=torch.int32, device=device)

    scores = widen(cls_logits).softmax(dim=-1).float()[..., 1:].transpose(1, 2)  # [B, C-1, A]
    # The bits of a non-negative float order as integers do; the anchor makes every key unique.
    bits = torch.where(scores > score_threshold, scores, 0.0).contiguous().view(torch.int32).long()
    keys = (bits << 32) | torch.arange(num_anchors - 1, -1, -1, device=device)
    keys = keys.topk(topk, dim=-1).values  # [B, C-1, K]
    scores = (keys >> 32).int().view(torch.float32)
    anchor = num_anchors - 1 - (keys & 0xFFFFFFFF)

    image, category, rank = (scores > score_threshold).nonzero(as_tuple=True)  # by image, class, score
    anchor = anchor[image, category, rank]
    boxes = decode_boxes(box_deltas[image, anchor], anchors[anchor], weights)
    height, width = widen(image_sizes).to(boxes.dtype)[image].unbind(-1)
    x1, y1, x2, y2 = boxes.clamp(min=0).unbind(-1)
    boxes = torch.stack((x1.minimum(width), y1.minimum(height), x2.minimum(width), y2.minimum(height)), dim=-1)
    keep = _greedy_keep(boxes, image * (num_classes - 1) + category, iou_threshold)

    image, category, rank, boxes = image[keep], category[keep], rank[keep], boxes[keep]
    kept_scores = scores[image, category, rank]
    order = kept_scores.argsort(descending=True, stable=True)  # equal scores: by class, then by anchor
    order = order[image[order].argsort(stable=True)]
    image, category, boxes, kept_scores = image[order], category[order], boxes[order], kept_scores[order]
    count = image.bincount(minlength=batch)
    slot = torch.arange(len(image), device=device) - (count.cumsum(0) - count)[image]
    returned = slot < max_detections
    image, slot = image[returned], slot[returned]
    boxes_out[image, slot] = boxes[returned].float()
    scores_out[image, slot] = kept_scores[returned]
    labels_out[image, slot] = category[returned] + 1
    return boxes_out, scores_out, labels_out, count.clamp(max=max_detections).int()
