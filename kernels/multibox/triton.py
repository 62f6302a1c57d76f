"""Kernels of the MultiBox loss: cross-entropy with hard negative mining and smooth L1, forward and backward.

Forward, three launches:

1. Row loss. A program takes a block of anchors of one image. It computes log-sum-exp and cross-entropy of each row, and
   from the cross-entropy of a negative its mining key. It adds up the losses of the block's positives. It reads the
   logits once, and the deltas of positives only. Boxes are encoded here; no tensor of targets exists.
2. Mining. A program per image finds the limit that the image's hardest negatives exceed, from keys that stay in
   registers. It marks these negatives as selected and adds up the image's losses.
3. Reduction. One program adds up the losses of the batch and computes the factor of each image's gradient.

Backward, one launch. It writes both gradients once. Of the logits it reads the selected rows only: with seven objects
per image about one in eighty. A program fills the gradients of its anchors with zeros, in rows 16 bytes per store, and
then overwrites those of the selected anchors, which it collects first.

Bytes that must move: the logits in, the gradients out. At B = 128, C = 81 and bf16 these are 181 + 190 MB, 86 us at
4.3 TB/s. Scratch memory: 9 bytes per anchor (log-sum-exp, key, selected). All sums run in a fixed order, so that every
run gives the same bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.device.boxmath import Deltas, Weights, encode, load_box
from ssdcore.kernels.device.constant import Constant
from ssdcore.kernels.device.head import (
    TILE_WARPS,
    HeadShape,
    LevelBlock,
    anchors_of_block,
    exp_difference,
    levels_of,
    load_deltas,
    load_logits,
    locate_block,
    num_blocks,
    pick,
    ptr_of_image,
    softmax,
    span_of,
    span_of_block,
    store_deltas,
    tile_anchors,
    tile_of_chunk,
)
from ssdcore.kernels.device.selection import bounds_of_k_largest, limit_between, load_keys
from ssdcore.kernels.levels import empty_like_levels
from ssdcore.kernels.rules import EXACT, registers

NAN_KEY = Constant(0x7FFFFFFF)  # mining key of a NaN, which is the hardest of all
POSITIVE_KEY = Constant(-1)  # below the key of every candidate, because positives are not mined

MINING_TILE = 1024  # keys of an image in a tile: 2 per thread at sixteen warps
MINING_REGISTERS = 128  # of a thread at most, all there are at sixteen warps
MINING_TILES = (2, 4, 9, 16)  # how many tiles may stay in registers; 9 hold SSD300's 8732 keys
BATCH_BLOCK = 128  # images reduced at once
GRADIENT_ANCHORS = 64  # anchors per program of the backward: with fewer, programs start and end faster than they write
GRADIENT_STEP = 8  # selected anchors handled at once: few blocks have more, and many have none
GRADIENT_TILE = 1024  # gradients computed at once, 8 per thread at four warps: more would spill registers
ZEROS_AT_ONCE = 1024  # zeros stored at once: 8 per thread at four warps, in rows 16 bytes of bf16


class Truth(NamedTuple):
    """Pointers to what the head's outputs should have been."""

    matched_ptr: Tensor  # int64 [B, A]: an index into the image's own ground truths, or negative
    boxes_ptr: Tensor  # [T, 4] xyxy
    labels_ptr: Tensor  # [T]
    offsets_ptr: Tensor  # [B + 1]
    anchors_ptr: Tensor  # [A, 4] xyxy


class Assignment(NamedTuple):
    """What is assigned to the anchors of a block."""

    positive: tl.tensor  # an object is assigned to the anchor
    inside: tl.tensor  # positive, and the match is one of the image's ground truths
    gt_row: tl.tensor  # row of the ground truth in the batch, if inside
    label: tl.tensor  # class of the object, 0 for the background and where it is not valid
    valid: tl.tensor  # not positive, or inside with a label in 1..C-1


class Saved(NamedTuple):
    """Pointers to what the forward leaves for the backward."""

    lse_ptr: Tensor  # fp32 [B, A]: log-sum-exp
    selected_ptr: Tensor  # bool [B, A]
    scale_ptr: Tensor  # fp32 [B]: factor of the image's gradient


@triton.jit
def _assign(truth, matched, exists, image, HEAD: tl.constexpr):
    """What is assigned to a block of anchors, given their matches."""
    positive = (matched >= 0) & exists
    first = tl.load(truth.offsets_ptr + image).to(tl.int64)
    num_truths = tl.load(truth.offsets_ptr + image + 1).to(tl.int64) - first
    inside = positive & (matched < num_truths)
    gt_row = first + matched
    label = tl.load(truth.labels_ptr + gt_row, mask=inside, other=0).to(tl.int64)
    valid = (~positive) | (inside & (label >= 1) & (label < HEAD.classes))
    label = tl.where(positive & valid, label, 0).to(tl.int32)
    return Assignment(positive, inside, gt_row, label, valid)


@triton.jit
def _target_deltas(truth, assigned, anchor, weights):
    """The deltas that the positives of a block of anchors should have."""
    gt_box = load_box(truth.boxes_ptr, assigned.gt_row, assigned.inside)
    anchor_box = load_box(truth.anchors_ptr, anchor, assigned.positive)
    return encode(gt_box, anchor_box, weights)


@triton.jit
def _smooth_l1(difference, beta):
    distance = tl.abs(difference)
    # With beta = 0, the parabola is never taken.
    return tl.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)


@triton.jit
def _smooth_l1_slope(difference, beta):
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))  # keeps 0 and NaN
    return tl.where(tl.abs(difference) < beta, difference / beta, sign)


@triton.jit
def _row_loss_kernel(
    levels,  # Levels
    truth,  # Truth
    lse_ptr,  # fp32 [B, A]
    keys_ptr,  # int32 [B, A]
    block_positives_ptr,  # int32 [B, blocks]
    block_losses_ptr,  # fp32 [2, B, blocks]: cross-entropy and smooth L1 of the positives
    num_anchors,
    weights,  # Weights
    beta,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block_number, image = tl.program_id(0), tl.program_id(1)
    block = locate_block(block_number, levels, BLOCK)
    anchor_in_level, exists = anchors_of_block(block, HEAD, BLOCK)
    anchor = block.first_anchor + anchor_in_level
    row = image.to(tl.int64) * num_anchors + anchor
    matched = tl.load(truth.matched_ptr + row, mask=exists, other=-1)
    assigned = _assign(truth, matched, exists, image, HEAD)

    logits_ptr = ptr_of_image(levels.logits, levels.logits_strides, block, image)
    span = span_of_block(block, HEAD.classes, HEAD, BLOCK)
    top, total, _ = softmax(load_logits(logits_ptr, block, span, exists, HEAD, BLOCK), HEAD)
    log_total = tl.log(total)
    lse = top + log_total
    label_logit = tl.load(logits_ptr + span.start + assigned.label * span.stride, mask=exists, other=0.0)
    # Not lse - label_logit, because the rounding of a large lse would hide a small loss.
    cross_entropy = (top - label_logit.to(tl.float32)) + log_total
    cross_entropy = tl.where(cross_entropy <= 0, 0.0, cross_entropy)  # rounding can make it negative
    cross_entropy = tl.where(assigned.valid, cross_entropy, float("nan"))
    tl.store(lse_ptr + row, lse, mask=exists)

    key = cross_entropy.to(tl.int32, bitcast=True)
    key = tl.where(cross_entropy != cross_entropy, NAN_KEY, key)
    tl.store(keys_ptr + row, tl.where(assigned.positive, POSITIVE_KEY, key), mask=exists)

    box_loss = tl.zeros([BLOCK], tl.float32)
    # Most blocks have no positive.
    if tl.max(assigned.positive.to(tl.int32)) > 0:
        target = _target_deltas(truth, assigned, anchor, weights)
        deltas_ptr = ptr_of_image(levels.deltas, levels.deltas_strides, block, image)
        deltas = load_deltas(deltas_ptr, anchor_in_level, block, assigned.positive, HEAD)
        box_loss = _smooth_l1(deltas.x - target.x, beta) + _smooth_l1(deltas.y - target.y, beta)
        box_loss = box_loss + _smooth_l1(deltas.w - target.w, beta)
        box_loss = box_loss + _smooth_l1(deltas.h - target.h, beta)

    sum_index = image * tl.num_programs(0) + block_number
    tl.store(block_positives_ptr + sum_index, tl.sum(assigned.positive.to(tl.int32)))
    tl.store(block_losses_ptr + sum_index, tl.sum(tl.where(assigned.positive, cross_entropy, 0.0)))
    box_losses_ptr = block_losses_ptr + tl.num_programs(1) * tl.num_programs(0)
    box_loss = tl.where(assigned.valid, box_loss, float("nan"))
    tl.store(box_losses_ptr + sum_index, tl.sum(tl.where(assigned.positive, box_loss, 0.0)))


@triton.jit
def _sum_blocks(block_positives_ptr, block_losses_ptr, image, num_blocks, BLOCK: tl.constexpr):
    """The number of positives of an image; and their cross-entropy and smooth L1, as partial sums [BLOCK]."""
    batch = tl.num_programs(0)
    positives = tl.zeros([BLOCK], tl.int32)
    cross_entropy = tl.zeros([BLOCK], tl.float32)
    box_loss = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_blocks, BLOCK):
        block = start + tl.arange(0, BLOCK)
        index = image * num_blocks + block
        mask = block < num_blocks
        positives += tl.load(block_positives_ptr + index, mask=mask, other=0)
        cross_entropy += tl.load(block_losses_ptr + index, mask=mask, other=0.0)
        box_loss += tl.load(block_losses_ptr + batch * num_blocks + index, mask=mask, other=0.0)
    return tl.sum(positives), cross_entropy, box_loss


@triton.jit
def _last_mined_tie(keys_ptr, num_anchors, limit, wanted, STEP: tl.constexpr):
    """The last of the first `wanted` anchors whose keys equal `limit`."""
    last = tl.full([STEP], -1, tl.int32)
    ties_before = 0
    for start in range(0, num_anchors, STEP):
        anchor = start + tl.arange(0, STEP)
        tie = (tl.load(keys_ptr + anchor, mask=anchor < num_anchors, other=-1) == limit).to(tl.int32)
        number = ties_before + tl.cumsum(tie, 0)
        last = tl.where((tie > 0) & (number <= wanted), anchor, last)
        ties_before += tl.sum(tie)
    return tl.max(last)


@triton.jit
def _select(keys, anchor, limit, last_tie, selected_ptr, num_anchors):
    """Mark the anchors with a positive or a mined negative; returns the losses of the mined negatives, 0 elsewhere."""
    mined = keys > tl.where(anchor <= last_tie, limit - 1, limit)
    tl.store(selected_ptr + anchor, mined | (keys < 0), mask=anchor < num_anchors)
    return tl.where(mined, keys.to(tl.float32, bitcast=True), 0.0)


@triton.jit
def _mine_kernel(
    keys_ptr,  # int32 [B, A]
    block_positives_ptr,  # int32 [B, num_blocks]
    block_losses_ptr,  # fp32 [2, B, num_blocks]
    selected_ptr,  # bool [B, A]
    image_positives_ptr,  # int32 [B]
    image_losses_ptr,  # fp32 [2, B]: cross-entropy of all selected anchors, smooth L1 of positives
    num_anchors,
    num_blocks,
    neg_pos_ratio,
    min_negatives,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    image, batch = tl.program_id(0), tl.num_programs(0)
    keys_ptr += image.to(tl.int64) * num_anchors
    selected_ptr += image.to(tl.int64) * num_anchors
    # The keys are loaded first, so that they arrive while the sums of the blocks are added up.
    first_keys = load_keys(keys_ptr, 0, num_anchors, TILES, TILE)
    num_positives, loss, box_loss = _sum_blocks(block_positives_ptr, block_losses_ptr, image, num_blocks, TILE)

    wanted = tl.ceil(neg_pos_ratio * num_positives.to(tl.float32))
    wanted = tl.maximum(wanted, tl.cast(min_negatives, tl.float32))
    wanted = tl.minimum(wanted, tl.cast(num_anchors, tl.float32)).to(tl.int32)
    low, hardest = bounds_of_k_largest(first_keys, keys_ptr, num_anchors, wanted)
    limit, num_above = limit_between(first_keys, keys_ptr, num_anchors, wanted, wanted, low, hardest)
    last_tie = -1
    # Equal keys straddle the border: the lowest anchors are mined.
    if (num_above < wanted) & (limit >= 0):
        last_tie = _last_mined_tie(keys_ptr, num_anchors, limit, wanted - num_above, TILE)

    index = tl.arange(0, TILE)
    for i in tl.static_range(TILES):
        loss += _select(first_keys[i], i * TILE + index, limit, last_tie, selected_ptr, num_anchors)
    for start in range(TILES * TILE, num_anchors, TILE):
        anchor = start + index
        keys = tl.load(keys_ptr + anchor, mask=anchor < num_anchors, other=-1)
        loss += _select(keys, anchor, limit, last_tie, selected_ptr, num_anchors)
    classification = tl.where(hardest == NAN_KEY, float("nan"), tl.sum(loss))
    tl.store(image_positives_ptr + image, num_positives)
    tl.store(image_losses_ptr + image, classification)
    tl.store(image_losses_ptr + batch + image, tl.sum(box_loss))


@triton.jit
def _reduce_kernel(
    image_positives_ptr,  # int32 [B]
    image_losses_ptr,  # fp32 [2, B]
    classification_ptr,  # fp32 scalar
    bbox_regression_ptr,  # fp32 scalar
    scale_ptr,  # fp32 [B]: factor of the image's gradient
    batch,
    PER_IMAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    positives_of_batch = tl.zeros([BLOCK], tl.int32)
    classification = tl.zeros([BLOCK], tl.float32)
    bbox_regression = tl.zeros([BLOCK], tl.float32)
    for start in range(0, batch, BLOCK):
        image = start + tl.arange(0, BLOCK)
        exists = image < batch
        positives = tl.load(image_positives_ptr + image, mask=exists, other=0)
        cls_loss = tl.load(image_losses_ptr + image, mask=exists, other=0.0)
        box_loss = tl.load(image_losses_ptr + batch + image, mask=exists, other=0.0)
        if PER_IMAGE:
            has_positives = positives > 0
            scale = tl.where(has_positives, tl.div_rn(1.0, positives.to(tl.float32) * batch), 0.0)
            tl.store(scale_ptr + image, scale, mask=exists)
            # `where` and not a product with 0, because an image without positives may have an infinite loss.
            cls_loss = tl.where(has_positives, cls_loss * scale, 0.0)
            box_loss = tl.where(has_positives, box_loss * scale, 0.0)
        positives_of_batch += positives
        classification += cls_loss
        bbox_regression += box_loss
    if PER_IMAGE:
        tl.store(classification_ptr, tl.sum(classification))
        tl.store(bbox_regression_ptr, tl.sum(bbox_regression))
    else:
        normalizer = tl.maximum(tl.sum(positives_of_batch), 1).to(tl.float32)
        tl.store(classification_ptr, tl.div_rn(tl.sum(classification), normalizer))
        tl.store(bbox_regression_ptr, tl.div_rn(tl.sum(bbox_regression), normalizer))
        for start in range(0, batch, BLOCK):
            image = start + tl.arange(0, BLOCK)
            scale = tl.zeros([BLOCK], tl.float32) + tl.div_rn(1.0, normalizer)
            tl.store(scale_ptr + image, scale, mask=image < batch)


@triton.jit
def _fill_zeros(ptr, first, count, MAX_COUNT: tl.constexpr, AT_ONCE: tl.constexpr):
    """Store `count` zeros from `first` on, at most MAX_COUNT of them, 8 numbers per store except at the ends."""
    aligned_first = tl.cdiv(first, 8) * 8
    num_before = tl.minimum((aligned_first - first).to(tl.int32), count)
    num_aligned = (count - num_before) // 8 * 8
    for start in tl.static_range(0, MAX_COUNT, AT_ONCE):
        offset = start + tl.arange(0, AT_ONCE)
        tl.store(ptr + aligned_first + offset, tl.zeros([AT_ONCE], tl.float32), mask=offset < num_aligned)
    offset = tl.arange(0, 8)
    zeros = tl.zeros([8], tl.float32)
    tl.store(ptr + first + offset, zeros, mask=offset < num_before)
    num_done = num_before + num_aligned
    tl.store(ptr + first + num_done + offset, zeros, mask=offset < count - num_done)


@triton.jit
def _fill_rows_with_zeros(
    grad_logits_ptr, grad_deltas_ptr, block, image, HEAD: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Fill the gradients of a block of anchors, which is one stretch of memory where levels lie in rows."""
    anchors_of_level = block.num_cells * block.per_cell
    first = image * anchors_of_level + block.index * BLOCK
    count = tl.minimum(anchors_of_level - block.index * BLOCK, BLOCK)
    _fill_zeros(grad_logits_ptr, first * HEAD.classes, count * HEAD.classes, BLOCK * HEAD.classes, AT_ONCE)
    _fill_zeros(grad_deltas_ptr, first * 4, count * 4, BLOCK * 4, BLOCK * 4)


@triton.jit
def _fill_planes_with_zeros(
    grad_logits_ptr, grad_deltas_ptr, block, image, HEAD: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Fill the gradients of a block of anchors, STEP anchors at once, where levels lie in planes.

    ALIGNED promises that the number of a plane's cells is a multiple of 4. Then one store writes 4 numbers.
    """
    if ALIGNED:  # the compiler knows what is a multiple of 4 if it sees the multiplication
        num_cells = block.num_cells // 4 * 4
        block = LevelBlock(block.level, block.index, block.first_anchor, num_cells, block.per_cell)
    anchors_before = image * (block.num_cells * block.per_cell)
    for step in tl.static_range(BLOCK // STEP):
        exists = block.index * BLOCK + step * STEP + tl.arange(0, STEP) < block.num_cells * block.per_cell
        span = span_of_block(block, HEAD.classes, HEAD, BLOCK, step, BLOCK // STEP)
        class_id = tl.arange(0, HEAD.chunk)[:, None]
        offset = span.start[None, :] + class_id * span.stride
        if ALIGNED:  # said of this very sum: of the result of a function, it would be taken to hold for all its results
            offset = tl.max_contiguous(tl.multiple_of(offset, [1, 4]), [1, 4])
        first_ptr = grad_logits_ptr + anchors_before * HEAD.classes + offset
        for chunk in tl.static_range((HEAD.classes + HEAD.chunk - 1) // HEAD.chunk):
            inside = exists[None, :] & (chunk * HEAD.chunk + class_id < HEAD.classes)
            zeros = tl.zeros(offset.shape, tl.float32)
            tl.store(first_ptr + chunk * HEAD.chunk * span.stride, zeros, mask=inside)
        span = span_of_block(block, 4, HEAD, BLOCK, step, BLOCK // STEP)
        for number in tl.static_range(4):
            offset = span.start + number * span.stride
            tl.store(grad_deltas_ptr + anchors_before * 4 + offset, tl.zeros([STEP], tl.float32), mask=exists)


@triton.jit
def _marked_numbers(numbers, marked, first, STEP: tl.constexpr):
    """Those of `numbers` that have the marks number `first` to `first + STEP - 1`; 0 beyond the last mark."""
    rank = tl.cumsum(marked.to(tl.int32), 0) - 1
    has_rank = marked[:, None] & (rank[:, None] == first + tl.arange(0, STEP)[None, :])
    return tl.sum(tl.where(has_rank, numbers[:, None], 0), axis=0)


@triton.jit
def _store_logit_gradients(grad_logits_ptr, logits_ptr, span, exists, label, lse, factor, HEAD: tl.constexpr):
    """Store the gradients of the logits of selected anchors."""
    axis: tl.constexpr = 1 - HEAD.planes  # of the classes in a tile
    for chunk in tl.static_range((HEAD.classes + HEAD.chunk - 1) // HEAD.chunk):
        class_id, offset, inside = tile_of_chunk(span, exists, chunk, HEAD)
        logits = tl.load(logits_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        one_hot = tl.where(class_id == tl.expand_dims(label, axis), 1.0, 0.0)
        grad = (exp_difference(logits, tl.expand_dims(lse, axis)) - one_hot) * tl.expand_dims(factor, axis)
        tl.store(grad_logits_ptr + offset, grad, mask=inside)


@triton.jit
def _store_delta_gradients(grad_deltas_ptr, deltas, target, anchor, block, factor, beta, mask, HEAD: tl.constexpr):
    """Store the gradients of the deltas of positive anchors."""
    grad_deltas = Deltas(
        _smooth_l1_slope(deltas.x - target.x, beta) * factor,
        _smooth_l1_slope(deltas.y - target.y, beta) * factor,
        _smooth_l1_slope(deltas.w - target.w, beta) * factor,
        _smooth_l1_slope(deltas.h - target.h, beta) * factor,
    )
    store_deltas(grad_deltas_ptr, anchor, span_of(anchor, block, 4, HEAD), grad_deltas, mask, HEAD)


# The gradients. Let p = exp(logit - lse) be the softmax of a selected anchor's row, y its label (0 for a mined
# negative), s the scale of its image, and d the difference of a positive's delta from its target:
#
#     dL / dlogit_c = g_classification  * s * (p_c - [c = y])                            0 for unselected anchors
#     dL / ddelta   = g_bbox_regression * s * (d / beta if |d| < beta, else sign(d))     0 for anchors not positive
@triton.jit
def _backward_kernel(
    grad_classification_ptr,  # scalar
    grad_bbox_regression_ptr,  # scalar
    levels,  # Levels
    grad_logits_ptrs,  # [B, P, a, C] of each level, dense, in the layout of the logits
    grad_deltas_ptrs,  # [B, P, a, 4] of each level, dense, in the layout of the deltas
    truth,  # Truth
    saved,  # Saved
    num_anchors,
    weights,  # Weights
    beta,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    ZEROS_AT_ONCE: tl.constexpr,
):
    block_number, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    block = locate_block(block_number, levels, BLOCK)
    grad_logits_ptr, grad_deltas_ptr = pick(grad_logits_ptrs, block.level), pick(grad_deltas_ptrs, block.level)
    anchors_before = image * block.num_cells * block.per_cell
    image_logits_ptr = grad_logits_ptr + anchors_before * HEAD.classes
    image_deltas_ptr = grad_deltas_ptr + anchors_before * 4
    if HEAD.planes:
        ANCHORS_AT_ONCE: tl.constexpr = ZEROS_AT_ONCE // HEAD.chunk
        if (block.num_cells % 4 == 0) & (ANCHORS_AT_ONCE >= 4):
            _fill_planes_with_zeros(
                grad_logits_ptr, grad_deltas_ptr, block, image, HEAD, BLOCK, ANCHORS_AT_ONCE, ALIGNED=True
            )
        else:
            _fill_planes_with_zeros(
                grad_logits_ptr, grad_deltas_ptr, block, image, HEAD, BLOCK, ANCHORS_AT_ONCE, ALIGNED=False
            )
    else:
        _fill_rows_with_zeros(grad_logits_ptr, grad_deltas_ptr, block, image, HEAD, BLOCK, ZEROS_AT_ONCE)

    anchor_of_block, exists = anchors_of_block(block, HEAD, BLOCK)
    first_row = image * num_anchors + block.first_anchor
    selected = tl.load((saved.selected_ptr + first_row) + anchor_of_block, mask=exists, other=0) != 0
    num_selected = tl.sum(selected.to(tl.int32))
    # Other threads overwrite some of the zeros.
    tl.debug_barrier()
    for first in range(0, num_selected, STEP):
        anchor_in_level = _marked_numbers(anchor_of_block, selected, first, STEP)
        is_selected = first + tl.arange(0, STEP) < num_selected
        row = first_row + anchor_in_level
        matched = tl.load(truth.matched_ptr + row, mask=is_selected, other=-1)
        assigned = _assign(truth, matched, is_selected, image, HEAD)
        scale = tl.where(assigned.valid, tl.load(saved.scale_ptr + image), float("nan"))

        lse = tl.load(saved.lse_ptr + row, mask=is_selected, other=0.0)
        factor = tl.load(grad_classification_ptr) * scale
        logits_ptr = ptr_of_image(levels.logits, levels.logits_strides, block, image)
        span = span_of(anchor_in_level, block, HEAD.classes, HEAD)
        _store_logit_gradients(image_logits_ptr, logits_ptr, span, is_selected, assigned.label, lse, factor, HEAD)

        factor = tl.load(grad_bbox_regression_ptr) * scale
        target = _target_deltas(truth, assigned, block.first_anchor + anchor_in_level, weights)
        deltas_ptr = ptr_of_image(levels.deltas, levels.deltas_strides, block, image)
        deltas = load_deltas(deltas_ptr, anchor_in_level, block, assigned.positive, HEAD)
        _store_delta_gradients(
            image_deltas_ptr, deltas, target, anchor_in_level, block, factor, beta, assigned.positive, HEAD
        )


def mining_tiles(num_anchors: int) -> int:
    """How many tiles of an image's keys a program of the mining keeps in registers."""
    return next((tiles for tiles in MINING_TILES if tiles * MINING_TILE >= num_anchors), MINING_TILES[-1])


def gradient_step(head: HeadShape) -> int:
    """How many selected anchors a program of the backward handles at once."""
    return max(1, min(GRADIENT_STEP, GRADIENT_TILE // head.chunk))


def launch_multibox_loss(
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
    levels, head = levels_of(cls_logits, box_deltas)
    batch, num_anchors = matched_idxs.shape
    device = matched_idxs.device
    block_anchors = tile_anchors(head.classes)
    blocks = num_blocks(levels, block_anchors)

    lse = torch.empty(batch, num_anchors, dtype=torch.float32, device=device)
    selected = torch.empty(batch, num_anchors, dtype=torch.bool, device=device)
    scale = torch.empty(batch, dtype=torch.float32, device=device)
    classification = torch.empty((), dtype=torch.float32, device=device)
    bbox_regression = torch.empty((), dtype=torch.float32, device=device)
    keys = torch.empty(batch, num_anchors, dtype=torch.int32, device=device)
    block_positives = torch.empty(batch, blocks, dtype=torch.int32, device=device)
    block_losses = torch.empty(2, batch, blocks, dtype=torch.float32, device=device)
    image_positives = torch.empty(batch, dtype=torch.int32, device=device)
    image_losses = torch.empty(2, batch, dtype=torch.float32, device=device)
    if lse.numel():
        _row_loss_kernel[(blocks, batch)](
            levels=levels,
            truth=_truth_of(matched_idxs, gt_boxes, gt_labels, gt_offsets, anchors),
            lse_ptr=lse,
            keys_ptr=keys,
            block_positives_ptr=block_positives,
            block_losses_ptr=block_losses,
            num_anchors=num_anchors,
            weights=Weights(*weights),
            beta=beta,
            HEAD=head,
            BLOCK=block_anchors,
            num_warps=TILE_WARPS,
            **EXACT,
        )
    if batch:
        _mine_kernel[(batch,)](
            keys_ptr=keys,
            block_positives_ptr=block_positives,
            block_losses_ptr=block_losses,
            selected_ptr=selected,
            image_positives_ptr=image_positives,
            image_losses_ptr=image_losses,
            num_anchors=num_anchors,
            num_blocks=blocks,
            neg_pos_ratio=neg_pos_ratio,
            min_negatives=min_negatives,
            TILES=mining_tiles(num_anchors),
            TILE=MINING_TILE,
            num_warps=16,
            **registers(MINING_REGISTERS),
            **EXACT,
        )
    _reduce_kernel[(1,)](
        image_positives_ptr=image_positives,
        image_losses_ptr=image_losses,
        classification_ptr=classification,
        bbox_regression_ptr=bbox_regression,
        scale_ptr=scale,
        batch=batch,
        PER_IMAGE=normalizer == "image",
        BLOCK=BATCH_BLOCK,
        num_warps=4,
        **EXACT,
    )
    return classification, bbox_regression, lse, selected, scale


def launch_multibox_loss_backward(
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
    batch, num_anchors = matched_idxs.shape
    levels, head = levels_of(cls_logits, box_deltas)
    gradients = empty_like_levels([*cls_logits, *box_deltas], head.planes)
    if batch * num_anchors == 0:
        return gradients
    num_levels = len(cls_logits)
    _backward_kernel[(num_blocks(levels, GRADIENT_ANCHORS), batch)](
        grad_classification_ptr=grad_classification,
        grad_bbox_regression_ptr=grad_bbox_regression,
        levels=levels,
        grad_logits_ptrs=tuple(gradients[:num_levels]),
        grad_deltas_ptrs=tuple(gradients[num_levels:]),
        truth=_truth_of(matched_idxs, gt_boxes, gt_labels, gt_offsets, anchors),
        saved=Saved(lse.contiguous(), selected.contiguous(), scale.contiguous()),
        num_anchors=num_anchors,
        weights=Weights(*weights),
        beta=beta,
        HEAD=head,
        BLOCK=GRADIENT_ANCHORS,
        STEP=gradient_step(head),
        ZEROS_AT_ONCE=max(ZEROS_AT_ONCE, head.chunk),
        num_warps=4,
        **EXACT,
    )
    return gradients


def _truth_of(matched_idxs: Tensor, gt_boxes: Tensor, gt_labels: Tensor, gt_offsets: Tensor, anchors: Tensor) -> Truth:
    return Truth(
        matched_idxs.contiguous(),
        gt_boxes.contiguous(),
        gt_labels.contiguous(),
        gt_offsets.contiguous(),
        anchors.contiguous(),
    )
