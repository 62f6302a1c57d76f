"""The MultiBox loss: cross-entropy with hard negative mining and smooth L1, forward and backward.

Forward, three launches:

1. Rows. A program takes a block of anchors of one image: log-sum-exp and cross-entropy of each row, the cross-entropy
   of a negative as a mining key, and the block's sums over its positives. Reads the logits once and the deltas of
   positives only; the boxes are encoded here, no target tensor exists.
2. Mining. A program an image selects its hardest negatives by finding the k-th largest key bit by bit, and adds up
   the image's losses.
3. The sums over the batch, and the factor of each image's gradient.

Backward, one launch: writes both gradients once; of the logits it reads the selected rows only, about one in thirty.

Scratch memory: 9 bytes an anchor (log-sum-exp, key, selected). Sums run in a fixed order: the same bits every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import encode, load_box, store_box
from ssdcore.kernels.eager import empty_gradients, packed
from ssdcore.kernels.selection import among_k_largest, kth_largest

NAN_KEY = 0x7FFFFFFF  # a NaN is the hardest of all
POSITIVE_KEY = -1  # below every candidate: positives are not mined
TILE = 2048  # logits a program: 16 rows of 128 columns, 16 a thread at four warps
MINING_BLOCK = 1024  # keys a step of the mining: 4 a thread at eight warps
BATCH_BLOCK = 128  # images a step of the last sum


def row_blocks(num_classes: int) -> tuple[int, int]:
    """Rows and columns of a program's tile of logits."""
    columns = max(16, triton.next_power_of_2(num_classes))
    return max(1, TILE // columns), columns


@triton.jit
def _assign(matched, mask, gt_labels_ptr, gt_offsets_ptr, image, num_classes):
    """Of a block of anchors: positive?, matched inside the image?, row of the ground truth, class, valid?"""
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    count = tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first
    positive = (matched >= 0) & mask
    inside = positive & (matched < count)
    gt = first + matched
    label = tl.load(gt_labels_ptr + gt, mask=inside, other=0).to(tl.int64)
    valid = (~positive) | (inside & (label >= 1) & (label < num_classes))
    label = tl.where(positive & valid, label, 0).to(tl.int32)
    return positive, inside, gt, label, valid


@triton.jit
def _row_loss_kernel(
    logits_ptr,  # [B, A, C]
    deltas_ptr,  # [B, A, 4]
    matched_ptr,  # int64 [B, A]
    gt_boxes_ptr,  # [T, 4] xyxy
    gt_labels_ptr,  # [T]
    gt_offsets_ptr,  # [B + 1]
    anchors_ptr,  # [A, 4] xyxy
    lse_ptr,  # fp32 [B, A]
    keys_ptr,  # int32 [B, A]
    block_positives_ptr,  # int32 [B, blocks]
    block_losses_ptr,  # fp32 [2, B, blocks]: cross-entropy and smooth L1 of the positives
    num_anchors,
    num_classes,
    wx,
    wy,
    ww,
    wh,
    beta,
    NAN_KEY: tl.constexpr,
    POSITIVE_KEY: tl.constexpr,
    BLOCK_ANCHORS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1)
    anchor = block * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    mask = anchor < num_anchors
    row = image.to(tl.int64) * num_anchors + anchor
    matched = tl.load(matched_ptr + row, mask=mask, other=-1)
    positive, inside, gt, label, valid = _assign(matched, mask, gt_labels_ptr, gt_offsets_ptr, image, num_classes)

    column = tl.arange(0, BLOCK_CLASSES)
    cell = row[:, None] * num_classes + column[None, :]
    logits = tl.load(logits_ptr + cell, mask=mask[:, None] & (column < num_classes)[None, :], other=-float("inf")).to(
        tl.float32
    )
    top = tl.max(logits, axis=1)
    lse = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), axis=1))
    cross_entropy = lse - tl.load(logits_ptr + row * num_classes + label, mask=mask, other=0.0).to(tl.float32)
    cross_entropy = tl.where(cross_entropy <= 0, 0.0, cross_entropy)  # rounding; a loss is not negative
    cross_entropy = tl.where(valid, cross_entropy, float("nan"))
    tl.store(lse_ptr + row, lse, mask=mask)

    key = cross_entropy.to(tl.int32, bitcast=True)
    key = tl.where(cross_entropy != cross_entropy, NAN_KEY, key)
    tl.store(keys_ptr + row, tl.where(positive, POSITIVE_KEY, key), mask=mask)

    box_loss = tl.zeros([BLOCK_ANCHORS], tl.float32)
    # Nineteen blocks in twenty have no positive.
    if tl.max(positive.to(tl.int32)) > 0:
        x1, y1, x2, y2 = load_box(gt_boxes_ptr, gt, inside)
        ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, positive)
        tx, ty, tw, th = encode(x1, y1, x2, y2, ax1, ay1, ax2, ay2, wx, wy, ww, wh)
        dx, dy, dw, dh = load_box(deltas_ptr, row, positive)
        box_loss = _smooth_l1(dx - tx, beta) + _smooth_l1(dy - ty, beta)
        box_loss = box_loss + _smooth_l1(dw - tw, beta) + _smooth_l1(dh - th, beta)

    cell = image * tl.num_programs(0) + block
    tl.store(block_positives_ptr + cell, tl.sum(positive.to(tl.int32)))
    tl.store(block_losses_ptr + cell, tl.sum(tl.where(positive, cross_entropy, 0.0)))
    box_losses_ptr = block_losses_ptr + tl.num_programs(1) * tl.num_programs(0)
    box_loss = tl.where(valid, box_loss, float("nan"))
    tl.store(box_losses_ptr + cell, tl.sum(tl.where(positive, box_loss, 0.0)))


@triton.jit
def _smooth_l1(difference, beta):
    distance = tl.abs(difference)
    # With beta = 0 the parabola is never taken.
    return tl.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


@triton.jit
def _smooth_l1_slope(difference, beta):
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))  # 0 and NaN stay
    return tl.where(tl.abs(difference) < beta, difference / beta, sign)


@triton.jit
def _mine_kernel(
    keys_ptr,  # int32 [B, A]
    block_positives_ptr,  # int32 [B, num_blocks]
    block_losses_ptr,  # fp32 [2, B, num_blocks]
    selected_ptr,  # bool [B, A]
    positives_ptr,  # int32 [B]
    losses_ptr,  # fp32 [2, B]
    num_anchors,
    num_blocks,
    neg_pos_ratio,
    min_negatives,
    NAN_KEY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image, batch = tl.program_id(0), tl.num_programs(0)
    positives = tl.zeros([BLOCK], tl.int32)
    positive_loss = tl.zeros([BLOCK], tl.float32)
    box_loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        cell = image * num_blocks + block
        mask = block < num_blocks
        positives += tl.load(block_positives_ptr + cell, mask=mask, other=0)
        positive_loss += tl.load(block_losses_ptr + cell, mask=mask, other=0.0)
        box_loss += tl.load(block_losses_ptr + batch * num_blocks + cell, mask=mask, other=0.0)
    num_positives = tl.sum(positives)

    wanted = tl.ceil(neg_pos_ratio * num_positives.to(tl.float32))
    wanted = tl.minimum(tl.maximum(wanted, tl.cast(min_negatives, tl.float32)), tl.cast(num_anchors, tl.float32)).to(
        tl.int32
    )
    row = image.to(tl.int64) * num_anchors
    kth, larger = kth_largest(keys_ptr + row, num_anchors, wanted, BLOCK)
    negative_loss = tl.zeros([BLOCK], tl.float32)
    hardest = tl.full([BLOCK], -1, tl.int32)
    ties_seen = 0
    for start in range(0, num_anchors, BLOCK):
        anchor = start + tl.arange(0, BLOCK)
        mask = anchor < num_anchors
        keys = tl.load(keys_ptr + row + anchor, mask=mask, other=-1)
        mined, ties_seen = among_k_largest(keys, kth, wanted - larger, ties_seen)
        negative_loss += tl.where(mined, keys.to(tl.float32, bitcast=True), 0.0)
        hardest = tl.maximum(hardest, keys)
        tl.store(selected_ptr + row + anchor, mined | (keys < 0), mask=mask)
    classification = tl.sum(positive_loss) + tl.sum(negative_loss)
    classification = tl.where(tl.max(hardest) == NAN_KEY, float("nan"), classification)
    tl.store(positives_ptr + image, num_positives)
    tl.store(losses_ptr + image, classification)
    tl.store(losses_ptr + batch + image, tl.sum(box_loss))


@triton.jit
def _reduce_kernel(
    positives_ptr,  # int32 [B]
    losses_ptr,  # fp32 [2, B]
    classification_ptr,  # fp32 scalar
    bbox_regression_ptr,  # fp32 scalar
    scale_ptr,  # fp32 [B]: what an image's gradient is multiplied by
    batch,
    PER_IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.int32)
    classification = tl.zeros([BLOCK], tl.float32)
    bbox_regression = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        image = start + tl.arange(0, BLOCK)
        mask = image < batch
        positives = tl.load(positives_ptr + image, mask=mask, other=0)
        cls_loss = tl.load(losses_ptr + image, mask=mask, other=0.0)
        box_loss = tl.load(losses_ptr + batch + image, mask=mask, other=0.0)
        if PER_IMAGE:
            some = positives > 0
            scale = tl.where(some, tl.div_rn(1.0, positives.to(tl.float32) * batch), 0.0)
            tl.store(scale_ptr + image, scale, mask=mask)
            # `where`, not a product with 0: an image without positives may have an infinite loss.
            cls_loss = tl.where(some, cls_loss * scale, 0.0)
            box_loss = tl.where(some, box_loss * scale, 0.0)
        total += positives
        classification += cls_loss
        bbox_regression += box_loss
    if PER_IMAGE:
        tl.store(classification_ptr, tl.sum(classification))
        tl.store(bbox_regression_ptr, tl.sum(bbox_regression))
    else:
        positives = tl.maximum(tl.sum(total), 1).to(tl.float32)
        tl.store(classification_ptr, tl.div_rn(tl.sum(classification), positives))
        tl.store(bbox_regression_ptr, tl.div_rn(tl.sum(bbox_regression), positives))
        for start in range(0, batch, BLOCK):
            image = start + tl.arange(0, BLOCK)
            scale = tl.zeros([BLOCK], tl.float32) + tl.div_rn(1.0, positives)
            tl.store(scale_ptr + image, scale, mask=image < batch)


@triton.jit
def _backward_kernel(
    grad_classification_ptr,  # scalar
    grad_bbox_regression_ptr,  # scalar
    logits_ptr,  # [B, A, C]
    deltas_ptr,  # [B, A, 4]
    matched_ptr,  # int64 [B, A]
    gt_boxes_ptr,  # [T, 4] xyxy
    gt_labels_ptr,  # [T]
    gt_offsets_ptr,  # [B + 1]
    anchors_ptr,  # [A, 4] xyxy
    lse_ptr,  # fp32 [B, A]
    selected_ptr,  # bool [B, A]
    scale_ptr,  # fp32 [B]
    grad_logits_ptr,  # [B, A, C]
    grad_deltas_ptr,  # [B, A, 4]
    num_anchors,
    num_classes,
    wx,
    wy,
    ww,
    wh,
    beta,
    BLOCK_ANCHORS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1)
    anchor = block * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    mask = anchor < num_anchors
    row = image.to(tl.int64) * num_anchors + anchor
    matched = tl.load(matched_ptr + row, mask=mask, other=-1)
    positive, inside, gt, label, valid = _assign(matched, mask, gt_labels_ptr, gt_offsets_ptr, image, num_classes)
    scale = tl.load(scale_ptr + image)

    selected = tl.load(selected_ptr + row, mask=mask, other=0) != 0
    column = tl.arange(0, BLOCK_CLASSES)
    cell = row[:, None] * num_classes + column[None, :]
    inside_row = mask[:, None] & (column < num_classes)[None, :]
    if tl.max(selected.to(tl.int32)) == 0:
        # Three blocks in four: nothing is read of the logits, and nothing computed.
        tl.store(grad_logits_ptr + cell, tl.zeros([BLOCK_ANCHORS, BLOCK_CLASSES], tl.float32), mask=inside_row)
        zero = tl.zeros([BLOCK_ANCHORS], tl.float32)
        store_box(grad_deltas_ptr, row, zero, zero, zero, zero, mask)
    else:
        lse = tl.load(lse_ptr + row, mask=selected, other=0.0)
        logits = tl.load(logits_ptr + cell, mask=selected[:, None] & inside_row, other=0.0).to(tl.float32)
        target = tl.where(column[None, :] == label[:, None], 1.0, 0.0)
        grad = (tl.exp(logits - lse[:, None]) - target) * (tl.load(grad_classification_ptr) * scale)
        grad = tl.where(valid[:, None], grad, float("nan"))
        tl.store(grad_logits_ptr + cell, tl.where(selected[:, None], grad, 0.0), mask=inside_row)

        x1, y1, x2, y2 = load_box(gt_boxes_ptr, gt, inside)
        ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, positive)
        tx, ty, tw, th = encode(x1, y1, x2, y2, ax1, ay1, ax2, ay2, wx, wy, ww, wh)
        dx, dy, dw, dh = load_box(deltas_ptr, row, positive)
        factor = tl.where(valid, tl.load(grad_bbox_regression_ptr) * scale, float("nan"))
        store_box(
            grad_deltas_ptr,
            row,
            tl.where(positive, _smooth_l1_slope(dx - tx, beta) * factor, 0.0),
            tl.where(positive, _smooth_l1_slope(dy - ty, beta) * factor, 0.0),
            tl.where(positive, _smooth_l1_slope(dw - tw, beta) * factor, 0.0),
            tl.where(positive, _smooth_l1_slope(dh - th, beta) * factor, 0.0),
            mask,
        )


def multibox_loss_triton(
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
    cls_logits, box_deltas = packed(cls_logits), packed(box_deltas)
    batch, num_anchors, num_classes = cls_logits.shape
    device = cls_logits.device
    block_anchors, block_classes = row_blocks(num_classes)
    num_blocks = triton.cdiv(num_anchors, block_anchors)

    lse = torch.empty(batch, num_anchors, dtype=torch.float32, device=device)
    selected = torch.empty(batch, num_anchors, dtype=torch.bool, device=device)
    scale = torch.empty(batch, dtype=torch.float32, device=device)
    classification = torch.empty((), dtype=torch.float32, device=device)
    bbox_regression = torch.empty((), dtype=torch.float32, device=device)
    keys = torch.empty(batch, num_anchors, dtype=torch.int32, device=device)
    block_positives = torch.empty(batch, num_blocks, dtype=torch.int32, device=device)
    block_losses = torch.empty(2, batch, num_blocks, dtype=torch.float32, device=device)
    image_positives = torch.empty(batch, dtype=torch.int32, device=device)
    image_losses = torch.empty(2, batch, dtype=torch.float32, device=device)

    if lse.numel():
        _row_loss_kernel[(num_blocks, batch)](
            cls_logits.contiguous(),
            box_deltas.contiguous(),
            matched_idxs.contiguous(),
            gt_boxes.contiguous(),
            gt_labels.contiguous(),
            gt_offsets.contiguous(),
            anchors.contiguous(),
            lse,
            keys,
            block_positives,
            block_losses,
            num_anchors,
            num_classes,
            *weights,
            beta,
            NAN_KEY=NAN_KEY,
            POSITIVE_KEY=POSITIVE_KEY,
            BLOCK_ANCHORS=block_anchors,
            BLOCK_CLASSES=block_classes,
            num_warps=4,
            enable_fp_fusion=False,
        )
    if batch:
        _mine_kernel[(batch,)](
            keys,
            block_positives,
            block_losses,
            selected,
            image_positives,
            image_losses,
            num_anchors,
            num_blocks,
            neg_pos_ratio,
            min_negatives,
            NAN_KEY=NAN_KEY,
            BLOCK=MINING_BLOCK,
            num_warps=8,
            enable_fp_fusion=False,
        )
    _reduce_kernel[(1,)](
        image_positives,
        image_losses,
        classification,
        bbox_regression,
        scale,
        batch,
        PER_IMAGE=normalizer == "image",
        BLOCK=BATCH_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return classification, bbox_regression, lse, selected, scale


def multibox_loss_backward_triton(
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
    gradients = empty_gradients(cls_logits, box_deltas)
    levels = cls_logits
    cls_logits, box_deltas = packed(cls_logits), packed(box_deltas)
    batch, num_anchors, num_classes = cls_logits.shape
    block_anchors, block_classes = row_blocks(num_classes)
    grad_logits = torch.empty(cls_logits.shape, dtype=cls_logits.dtype, device=cls_logits.device)
    grad_deltas = torch.empty(box_deltas.shape, dtype=box_deltas.dtype, device=box_deltas.device)
    if batch * num_anchors == 0:
        return gradients
    _backward_kernel[(triton.cdiv(num_anchors, block_anchors), batch)](
        grad_classification,
        grad_bbox_regression,
        cls_logits.contiguous(),
        box_deltas.contiguous(),
        matched_idxs.contiguous(),
        gt_boxes.contiguous(),
        gt_labels.contiguous(),
        gt_offsets.contiguous(),
        anchors.contiguous(),
        lse.contiguous(),
        selected.contiguous(),
        scale.contiguous(),
        grad_logits,
        grad_deltas,
        num_anchors,
        num_classes,
        *weights,
        beta,
        BLOCK_ANCHORS=block_anchors,
        BLOCK_CLASSES=block_classes,
        num_warps=4,
        enable_fp_fusion=False,
    )
    sizes = [level.shape[1] * level.shape[2] for level in levels]
    pieces = [*grad_logits.split(sizes, dim=1), *grad_deltas.split(sizes, dim=1)]
    return [out.copy_(piece.view(out.shape)) for out, piece in zip(gradients, pieces, strict=True)]
