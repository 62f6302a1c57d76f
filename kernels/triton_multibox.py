"""The MultiBox loss: cross-entropy with hard negative mining and smooth L1, forward and backward.

Forward, three launches:

1. Rows. A program takes a block of anchors of one image: log-sum-exp and cross-entropy of each row, the cross-entropy
   of a negative as a mining key, and the block's sums over its positives. Reads the logits once and the deltas of
   positives only; the boxes are encoded here, no target tensor exists.
2. Mining. A program an image finds the limit that its hardest negatives exceed, from keys that stay in registers, marks
   them and adds up the image's losses.
3. The sums over the batch, and the factor of each image's gradient.

Backward, one launch, which writes both gradients once and of the logits reads the selected rows only, about one in
sixty. In rows, a program fills its stretch of the gradient with zeros, 16 bytes a store, and then overwrites the
selected rows. In planes an anchor's numbers lie far apart, and a tile of zeros and gradients is written at once.

Bytes that must move: the logits in, the gradients out. At B = 128, C = 81 and bf16 181 + 190 MB, 86 us at 4.3 TB/s.
Scratch memory: 9 bytes an anchor (log-sum-exp, key, selected). Sums run in a fixed order: the same bits every time.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import encode, load_box
from ssdcore.kernels.eager import empty_gradients
from ssdcore.kernels.head import (
    Head,
    anchors_of_block,
    first_number,
    load_deltas,
    load_logits,
    locate,
    logit_tile,
    pick,
    pick_int,
    power,
    softmax,
    store_deltas,
    tile,
)
from ssdcore.kernels.selection import limit_of_k_largest

NAN_KEY = 0x7FFFFFFF  # a NaN is the hardest of all
POSITIVE_KEY = -1  # below every candidate: positives are not mined
MINING_STEP = 2048  # keys selected at once, 4 a thread: more would spill registers
SUM_BLOCK = 256  # sums of blocks of anchors a step: all 140 of SSD300 at once
BATCH_BLOCK = 128  # images a step of the last sum
GRADIENT_ROWS = 64  # rows a program of the backward: fewer, and programs come and go faster than they write
STEP_ROWS = 16  # rows looked at for selected ones at once: of sixteen, three times in four none is
GRADIENT_TILE = 1024  # gradients of a piece of the classes computed at once, 8 a thread: more spill registers
FILL = 1024  # zeros stored at once: 8 a thread at four warps, 16 bytes of bf16


def mining_block(num_anchors: int) -> int:
    """Keys of an image in registers at once: all 8732, 32 a thread at sixteen warps."""
    return min(16384, max(MINING_STEP, triton.next_power_of_2(num_anchors)))


@triton.jit
def _assign(matched, mask, image, gt_labels_ptr, gt_offsets_ptr, num_classes):
    """Of a block of anchors: positive?, matched inside the image?, row of the ground truth, class, valid?"""
    positive = (matched >= 0) & mask
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    count = tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first
    inside = positive & (matched < count)
    gt = first + matched
    label = tl.load(gt_labels_ptr + gt, mask=inside, other=0).to(tl.int64)
    valid = (~positive) | (inside & (label >= 1) & (label < num_classes))
    label = tl.where(positive & valid, label, 0).to(tl.int32)
    return positive, inside, gt, label, valid


@triton.jit
def _target(gt_boxes_ptr, gt, inside, anchors_ptr, anchor, positive, wx, wy, ww, wh):
    """The deltas that the positives of a block of anchors should have."""
    x1, y1, x2, y2 = load_box(gt_boxes_ptr, gt, inside)
    ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, positive)
    return encode(x1, y1, x2, y2, ax1, ay1, ax2, ay2, wx, wy, ww, wh)


@triton.jit
def _row_loss_kernel(
    logits_ptrs,  # [B, P, a, C] of each level
    deltas_ptrs,  # [B, P, a, 4]
    logits_strides,  # of images, of each level
    deltas_strides,
    cells,
    per_cells,
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
    wx,
    wy,
    ww,
    wh,
    beta,
    CLASSES: tl.constexpr,
    NAN_KEY: tl.constexpr,
    POSITIVE_KEY: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1)
    level, own_block, first_anchor, num_cells, per_cell = locate(block, cells, per_cells, BLOCK)
    own, mask = anchors_of_block(own_block, num_cells, per_cell, PLANES, BLOCK)
    anchor = first_anchor + own
    row = image.to(tl.int64) * num_anchors + anchor
    matched = tl.load(matched_ptr + row, mask=mask, other=-1)
    positive, inside, gt, label, valid = _assign(matched, mask, image, gt_labels_ptr, gt_offsets_ptr, CLASSES)

    logits_ptr = pick(logits_ptrs, level) + image * pick_int(logits_strides, level)
    start, stride = first_number(own, num_cells, per_cell, CLASSES, PLANES)
    top, total, _ = softmax(load_logits(logits_ptr, start, stride, mask, CLASSES, CHUNK, PLANES), PLANES)
    lse = top + tl.log(total)
    cross_entropy = lse - tl.load(logits_ptr + start + label * stride, mask=mask, other=0.0).to(tl.float32)
    cross_entropy = tl.where(cross_entropy <= 0, 0.0, cross_entropy)  # rounding; a loss is not negative
    cross_entropy = tl.where(valid, cross_entropy, float("nan"))
    tl.store(lse_ptr + row, lse, mask=mask)

    key = cross_entropy.to(tl.int32, bitcast=True)
    key = tl.where(cross_entropy != cross_entropy, NAN_KEY, key)
    tl.store(keys_ptr + row, tl.where(positive, POSITIVE_KEY, key), mask=mask)

    box_loss = tl.zeros([BLOCK], tl.float32)
    # Most blocks have no positive.
    if tl.max(positive.to(tl.int32)) > 0:
        tx, ty, tw, th = _target(gt_boxes_ptr, gt, inside, anchors_ptr, anchor, positive, wx, wy, ww, wh)
        deltas_ptr = pick(deltas_ptrs, level) + image * pick_int(deltas_strides, level)
        dx, dy, dw, dh = load_deltas(deltas_ptr, own, num_cells, per_cell, positive, PLANES)
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
    STEP: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    image, batch = tl.program_id(0), tl.num_programs(0)
    positives = tl.zeros([SUM_BLOCK], tl.int32)
    positive_loss = tl.zeros([SUM_BLOCK], tl.float32)
    box_loss = tl.zeros([SUM_BLOCK], tl.float32)
    for start in range(0, num_blocks, SUM_BLOCK):
        block = start + tl.arange(0, SUM_BLOCK)
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
    limit, above = limit_of_k_largest(keys_ptr + row, num_anchors, wanted, 30, BLOCK)
    negative_loss = tl.zeros([STEP], tl.float32)
    hardest = tl.full([STEP], -1, tl.int32)
    ties_seen = 0
    for start in range(0, num_anchors, STEP):
        anchor = start + tl.arange(0, STEP)
        mask = anchor < num_anchors
        keys = tl.load(keys_ptr + row + anchor, mask=mask, other=-1)
        tie = ((keys == limit) & (keys >= 0)).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, 0) - tie
        mined = (keys > limit) | ((tie > 0) & (tie_rank < wanted - above))  # of equal keys the lowest anchors
        ties_seen += tl.sum(tie)
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
def _fill_zeros(grads_ptr, first, last, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros from `first` to `last`, less than WIDTH apart, 8 numbers a store but for the odd ones at the ends."""
    whole, odd = tl.cdiv(first, 8) * 8, last // 8 * 8
    for start in tl.static_range(0, WIDTH, BLOCK):
        place = whole + start + tl.arange(0, BLOCK)
        tl.store(grads_ptr + place, tl.zeros([BLOCK], tl.float32), mask=place < odd)
    place = tl.arange(0, 8)
    zero = tl.zeros([8], tl.float32)
    tl.store(grads_ptr + first + place, zero, mask=first + place < tl.minimum(whole, last))
    tl.store(grads_ptr + odd + place, zero, mask=(odd + place >= whole) & (odd + place < last))


@triton.jit
def _backward_kernel(
    grad_classification_ptr,  # scalar
    grad_bbox_regression_ptr,  # scalar
    logits_ptrs,  # [B, P, a, C] of each level
    deltas_ptrs,  # [B, P, a, 4]
    grad_logits_ptrs,  # as logits, but dense
    grad_deltas_ptrs,
    logits_strides,  # of images, of each level
    deltas_strides,
    cells,
    per_cells,
    matched_ptr,  # int64 [B, A]
    gt_boxes_ptr,  # [T, 4] xyxy
    gt_labels_ptr,  # [T]
    gt_offsets_ptr,  # [B + 1]
    anchors_ptr,  # [A, 4] xyxy
    lse_ptr,  # fp32 [B, A]
    selected_ptr,  # bool [B, A]
    scale_ptr,  # fp32 [B]
    num_anchors,
    wx,
    wy,
    ww,
    wh,
    beta,
    CLASSES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    CHUNK: tl.constexpr,
    FILL: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    level, own_block, first_anchor, num_cells, per_cell = locate(block, cells, per_cells, BLOCK)
    num_own = (num_cells * per_cell).to(tl.int64)
    logits_ptr = pick(logits_ptrs, level) + image * pick_int(logits_strides, level)
    deltas_ptr = pick(deltas_ptrs, level) + image * pick_int(deltas_strides, level)
    grad_logits_ptr, grad_deltas_ptr = pick(grad_logits_ptrs, level), pick(grad_deltas_ptrs, level)
    if not PLANES:
        first = image * num_own + own_block * BLOCK
        last = image * num_own + tl.minimum(num_own, own_block * BLOCK + BLOCK)
        _fill_zeros(grad_logits_ptr, first * CLASSES, last * CLASSES, BLOCK * CLASSES, FILL)
        _fill_zeros(grad_deltas_ptr, first * 4, last * 4, BLOCK * 4, BLOCK * 4)
        # Other threads overwrite some of the zeros.
        tl.debug_barrier()
    grad_logits_ptr += image * num_own * CLASSES
    grad_deltas_ptr += image * num_own * 4
    axis: tl.constexpr = 1 - PLANES  # of the classes in a tile

    for step in range(BLOCK // STEP):
        own, mask = anchors_of_block(own_block * (BLOCK // STEP) + step, num_cells, per_cell, PLANES, STEP)
        anchor = first_anchor + own
        row = image * num_anchors + anchor
        selected = tl.load(selected_ptr + row, mask=mask, other=0) != 0
        start, stride = first_number(own, num_cells, per_cell, CLASSES, PLANES)
        if tl.max(selected.to(tl.int32)) > 0:
            matched = tl.load(matched_ptr + row, mask=selected, other=-1)
            positive, inside, gt, label, valid = _assign(
                matched, selected, image, gt_labels_ptr, gt_offsets_ptr, CLASSES
            )
            scale = tl.load(scale_ptr + image)
            factor = tl.where(valid, tl.load(grad_classification_ptr) * scale, float("nan"))
            lse = tl.load(lse_ptr + row, mask=selected, other=0.0)
            for chunk in tl.static_range((CLASSES + CHUNK - 1) // CHUNK):
                category, place, read = logit_tile(start, stride, selected, chunk, CLASSES, CHUNK, PLANES)
                logits = tl.load(logits_ptr + place, mask=read, other=0.0).to(tl.float32)
                target = tl.where(category == tl.expand_dims(label, axis), 1.0, 0.0)
                grad = (power(logits, tl.expand_dims(lse, axis)) - target) * tl.expand_dims(factor, axis)
                if PLANES:
                    _, place, written = logit_tile(start, stride, mask, chunk, CLASSES, CHUNK, PLANES)
                    tl.store(grad_logits_ptr + place, tl.where(read, grad, 0.0), mask=written)
                else:
                    tl.store(grad_logits_ptr + place, grad, mask=read)

            tx, ty, tw, th = _target(gt_boxes_ptr, gt, inside, anchors_ptr, anchor, positive, wx, wy, ww, wh)
            dx, dy, dw, dh = load_deltas(deltas_ptr, own, num_cells, per_cell, positive, PLANES)
            factor = tl.where(valid, tl.load(grad_bbox_regression_ptr) * scale, float("nan"))
            store_deltas(
                grad_deltas_ptr,
                own,
                num_cells,
                per_cell,
                tl.where(positive, _smooth_l1_slope(dx - tx, beta) * factor, 0.0),
                tl.where(positive, _smooth_l1_slope(dy - ty, beta) * factor, 0.0),
                tl.where(positive, _smooth_l1_slope(dw - tw, beta) * factor, 0.0),
                tl.where(positive, _smooth_l1_slope(dh - th, beta) * factor, 0.0),
                mask,
                PLANES,
            )
        elif PLANES:
            for chunk in tl.static_range((CLASSES + CHUNK - 1) // CHUNK):
                _, place, written = logit_tile(start, stride, mask, chunk, CLASSES, CHUNK, PLANES)
                tl.store(grad_logits_ptr + place, tl.zeros(place.shape, tl.float32), mask=written)
            zero = tl.zeros([STEP], tl.float32)
            store_deltas(grad_deltas_ptr, own, num_cells, per_cell, zero, zero, zero, zero, mask, PLANES)


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
    head = Head.of(cls_logits, box_deltas)
    batch, num_anchors = matched_idxs.shape
    num_classes, device = head.logits[0].shape[3], matched_idxs.device
    block_anchors, chunk = tile(num_classes)
    num_blocks = head.blocks(block_anchors)

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
            head.logits,
            head.deltas,
            *head.strides,
            head.cells,
            head.per_cell,
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
            *weights,
            beta,
            CLASSES=num_classes,
            NAN_KEY=NAN_KEY,
            POSITIVE_KEY=POSITIVE_KEY,
            PLANES=head.planes,
            BLOCK=block_anchors,
            CHUNK=chunk,
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
            BLOCK=mining_block(num_anchors),
            STEP=MINING_STEP,
            SUM_BLOCK=SUM_BLOCK,
            num_warps=16,
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
    head = Head.of(cls_logits, box_deltas)
    batch, num_anchors = matched_idxs.shape
    num_classes = head.logits[0].shape[3]
    _, chunk = tile(num_classes)
    gradients = empty_gradients(cls_logits, box_deltas)
    if batch * num_anchors == 0:
        return gradients
    _backward_kernel[(head.blocks(GRADIENT_ROWS), batch)](
        grad_classification,
        grad_bbox_regression,
        head.logits,
        head.deltas,
        tuple(gradients[: len(head.logits)]),
        tuple(gradients[len(head.logits) :]),
        *head.strides,
        head.cells,
        head.per_cell,
        matched_idxs.contiguous(),
        gt_boxes.contiguous(),
        gt_labels.contiguous(),
        gt_offsets.contiguous(),
        anchors.contiguous(),
        lse.contiguous(),
        selected.contiguous(),
        scale.contiguous(),
        num_anchors,
        *weights,
        beta,
        CLASSES=num_classes,
        PLANES=head.planes,
        BLOCK=GRADIENT_ROWS,
        STEP=max(1, min(GRADIENT_ROWS if head.planes else STEP_ROWS, GRADIENT_TILE // chunk)),
        CHUNK=chunk,
        FILL=FILL,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return gradients
