"""From the head's outputs to detections: softmax, top-k, decode, clip, NMS per class, top detections per image.

A candidate's fate hangs on the better ones of its class alone. So once as many detections as are wanted stand among all
candidates of an image that score above some floor, nothing below it matters, and of 80 classes times 400 candidates
most need never be looked at. Four launches, whatever the number of images and classes:

1. Rows. A program takes a block of anchors of one image: softmax, of which it leaves the largest logit, the sum, and
   the best foreground score as an integer key. Reads the logits once.
2. Gathering. Decodes and clips the boxes of anchors with any candidate. The floor of an image is a score that fewer
   than FLOOR_ROWS anchors for each detection wanted exceed; every program finds it for itself, for that is faster than
   a launch. The logits of these anchors are read once more, and their candidates appended to lists, one a class. The
   order in which programs come changes that of a list, but no result: keys are distinct, and only their order counts.
3. Classes. A program takes one class of one image: of its list the k best, sorted by counting, and NMS over them, 32 at
   a time, each compared with the kept ones before it. What stands is appended to the image's list. The image's last
   program selects the best of that, sorts them by counting and writes the output, padding included.
4. The rest. If fewer stand than are wanted, and there is something below the floor, the image is settled anew without
   one: exact, and hardly ever needed. Otherwise its programs have nothing to do.

No list can overflow: fewer anchors lie above the floor than a list has places, and without a floor a full list is
reduced to its k best.

Bytes that must move: the logits in, 45 MB at B = 32, C = 81 and bf16: 11 us at 4.3 TB/s. Scratch memory: 28 bytes an
anchor, and for each of B * (C - 1) classes 32 bytes for each of its k candidates and 8 for each place of its list.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import decode, iou_or_zero, load_box, store_box
from ssdcore.kernels.eager import MAX_LOG_SCALE, round_down
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
    tile,
)
from ssdcore.kernels.selection import compact_above, limit_of_k_largest, rank_descending
from ssdcore.kernels.triton_nms import resolve_word

FLOOR_ROWS = 8  # anchors above the floor for each detection wanted: NMS rarely leaves fewer than one in eight
GATHER_ANCHORS = 32  # anchors a step; more would cost registers, and with them occupancy
GATHER_PROGRAMS = 512  # of all images together, a wave of an H200; each finds its image's floor
LAST_ID = 0x7FFFFFFF  # minus class * A + anchor in a key's low word: equal scores go by class, then by anchor
GATHER_BLOCK = 4096  # keys of anchors in registers at once, 16 a thread at eight warps: more cost occupancy
SELECT_BLOCK = 1024  # keys of a class or an image in registers at once, 8 a thread at four warps
ROWS = 32  # candidates compared at once: with 32 others, 8 pairs a thread
REST_ANCHORS = 256  # anchors a step where an image is settled anew: 2 a thread


@triton.jit
def _row_kernel(
    logits_ptrs,  # [B, P, a, C] of each level
    logits_strides,  # of images, of each level
    cells,
    per_cells,
    top_ptr,  # fp32 [B, A]: largest logit
    total_ptr,  # fp32 [B, A]: sum of the exponentials of the differences from it
    best_ptr,  # int32 [B, A]: bits of the best foreground score, or -1
    num_listed_ptr,  # int32 [B, C - 1]: set to 0
    num_found_ptr,  # int32 [B]: set to 0
    num_done_ptr,  # int32 [B]: set to 0
    num_anchors,
    score_threshold,
    CLASSES: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if block == 0:
        tl.store(num_found_ptr + image, 0)
        tl.store(num_done_ptr + image, 0)
        for chunk in range(tl.cdiv(CLASSES - 1, CHUNK)):
            category = chunk * CHUNK + tl.arange(0, CHUNK)
            zero = tl.zeros([CHUNK], tl.int32)
            tl.store(num_listed_ptr + image * (CLASSES - 1) + category, zero, mask=category < CLASSES - 1)

    level, own_block, first_anchor, num_cells, per_cell = locate(block, cells, per_cells, BLOCK)
    own, mask = anchors_of_block(own_block, num_cells, per_cell, PLANES, BLOCK)
    logits_ptr = pick(logits_ptrs, level) + image * pick_int(logits_strides, level)
    start, stride = first_number(own, num_cells, per_cell, CLASSES, PLANES)
    top, total, powers = softmax(load_logits(logits_ptr, start, stride, mask, CLASSES, CHUNK, PLANES), PLANES)
    category, _, _ = logit_tile(start, stride, mask, 0, CLASSES, CHUNK, PLANES)
    best = tl.where(category > 0, powers[0], 0.0)
    for chunk in tl.static_range(1, len(powers)):
        best = tl.maximum(best, powers[chunk])
    # The score of the largest is the largest score: division keeps the order.
    score = tl.div_rn(tl.max(best, axis=1 - PLANES), total)
    row = image * num_anchors + first_anchor + own
    tl.store(top_ptr + row, top, mask=mask)
    tl.store(total_ptr + row, total, mask=mask)
    tl.store(best_ptr + row, tl.where(score > score_threshold, score.to(tl.int32, bitcast=True), -1), mask=mask)


@triton.jit
def _clip(x, limit):
    """`x` in 0..limit; NaN stays NaN."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _key(score, category, anchor, num_anchors, LAST_ID: tl.constexpr):
    """By score, equal ones by class, then by anchor: distinct."""
    number = category * num_anchors + anchor
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (LAST_ID - number).to(tl.int64)


@triton.jit
def _gather_kernel(
    logits_ptrs,  # [B, P, a, C] of each level
    deltas_ptrs,  # [B, P, a, 4]
    logits_strides,  # of images, of each level
    deltas_strides,
    cells,
    per_cells,
    anchors_ptr,  # [A, 4] xyxy
    image_sizes_ptr,  # [B, 2] height, width
    top_ptr,  # fp32 [B, A]
    total_ptr,  # fp32 [B, A]
    best_ptr,  # int32 [B, A]
    boxes_ptr,  # fp32 [B, A, 4] xyxy: of the anchors with any candidate
    lists_ptr,  # int64 [B, C - 1, capacity]: keys
    num_listed_ptr,  # int32 [B, C - 1]: 0 at first
    floor_ptr,  # int32 [B]: bits of a score that all that is listed exceeds, and nothing else; -1: all is listed
    num_anchors,
    num_blocks,
    capacity,
    score_threshold,
    wx,
    wy,
    ww,
    wh,
    max_log_scale,
    CLASSES: tl.constexpr,
    LAST_ID: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    floor, _ = limit_of_k_largest(best_ptr + image * num_anchors, num_anchors, capacity, 29, SELECT_BLOCK)
    tl.store(floor_ptr + image, floor)  # every program stores the same
    height = tl.load(image_sizes_ptr + image * 2).to(tl.float32)
    width = tl.load(image_sizes_ptr + image * 2 + 1).to(tl.float32)
    axis: tl.constexpr = 1 - PLANES
    for block in range(tl.program_id(0), num_blocks, tl.num_programs(0)):
        level, own_block, first_anchor, num_cells, per_cell = locate(block, cells, per_cells, BLOCK)
        own, mask = anchors_of_block(own_block, num_cells, per_cell, PLANES, BLOCK)
        anchor = first_anchor + own
        row = image * num_anchors + anchor
        best = tl.load(best_ptr + row, mask=mask, other=-1)
        some = best >= 0
        if tl.max(best) >= 0:
            deltas_ptr = pick(deltas_ptrs, level) + image * pick_int(deltas_strides, level)
            dx, dy, dw, dh = load_deltas(deltas_ptr, own, num_cells, per_cell, some, PLANES)
            ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, some)
            x1, y1, x2, y2 = decode(dx, dy, dw, dh, ax1, ay1, ax2, ay2, wx, wy, ww, wh, max_log_scale)
            store_box(boxes_ptr, row, _clip(x1, width), _clip(y1, height), _clip(x2, width), _clip(y2, height), some)
        if tl.max(best) > floor:
            above = best > floor
            logits_ptr = pick(logits_ptrs, level) + image * pick_int(logits_strides, level)
            start, stride = first_number(own, num_cells, per_cell, CLASSES, PLANES)
            top = tl.expand_dims(tl.load(top_ptr + row, mask=above, other=0.0), axis)
            total = tl.expand_dims(tl.load(total_ptr + row, mask=above, other=1.0), axis)
            for chunk in tl.static_range((CLASSES + CHUNK - 1) // CHUNK):
                category, place, inside = logit_tile(start, stride, above, chunk, CLASSES, CHUNK, PLANES)
                logits = tl.load(logits_ptr + place, mask=inside, other=-float("inf")).to(tl.float32)
                score = tl.div_rn(power(logits, top), tl.broadcast_to(total, logits.shape))
                better = (score > score_threshold) & (score.to(tl.int32, bitcast=True) > floor)
                listed = better & inside & (category > 0)
                key = _key(score, category - 1, tl.expand_dims(anchor, axis), num_anchors, LAST_ID)
                group = tl.broadcast_to(image * (CLASSES - 1) + category - 1, logits.shape)
                # A place of its own for each; relaxed, for only the next launch reads the lists.
                slot = tl.atomic_add(num_listed_ptr + group, 1, mask=listed, sem="relaxed")
                tl.store(lists_ptr + group * capacity + slot, key, mask=listed)


@triton.jit
def _keep_largest(keys_ptr, count, k, BLOCK: tl.constexpr):
    """Reduce a list of distinct keys to its k largest; how many are left."""
    if count > k:
        limit, _ = limit_of_k_largest(keys_ptr, count, k, 61, BLOCK)  # no score exceeds 1, whose highest bit is 29
        count = compact_above(keys_ptr, count, limit, BLOCK)
    return count


@triton.jit
def _settle_class(
    list_ptr,  # int64: the class's keys, which are reordered
    count,
    category,
    boxes_ptr,  # fp32 [A, 4] xyxy of the image
    sorted_keys_ptr,  # int64 [K]
    sorted_boxes_ptr,  # fp32 [K, 4] xyxy
    kept_words_ptr,  # int32 [words]
    found_ptr,  # int64 [(C - 1) * K] of the image: where the keys of what stands are appended
    num_found_ptr,  # int32, of the image
    num_anchors,
    topk,
    iou_threshold,
    LAST_ID: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Top-k and NMS of one class of an image."""
    count = _keep_largest(list_ptr, count, topk, BLOCK)
    for start in range(0, count, ROWS):
        index = start + tl.arange(0, ROWS)
        mask = index < count
        keys = tl.load(list_ptr + index, mask=mask, other=-1)
        rank = rank_descending(list_ptr, keys, count, 32)
        anchor = LAST_ID - (keys & 0xFFFFFFFF).to(tl.int32) - category * num_anchors
        x1, y1, x2, y2 = load_box(boxes_ptr, anchor, mask)
        store_box(sorted_boxes_ptr, rank, x1, y1, x2, y2, mask)
        tl.store(sorted_keys_ptr + rank, keys, mask=mask)
    # NMS reads, from other threads, the sorted boxes and keys.
    tl.debug_barrier()

    bit = tl.arange(0, 32)
    for word in range(tl.cdiv(count, 32)):
        column = word * 32 + bit
        bx1, by1, bx2, by2 = load_box(sorted_boxes_ptr, column, column < count)
        suppressed = tl.zeros([32], tl.int32)
        for start in range(0, word * 32, ROWS):
            row = start + tl.arange(0, ROWS)
            earlier = row < word * 32
            ax1, ay1, ax2, ay2 = load_box(sorted_boxes_ptr, row, earlier)
            kept = (tl.load(kept_words_ptr + row // 32, mask=earlier, other=0) >> (row % 32)) & 1
            overlap = iou_or_zero(
                ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None],
                bx1[None, :], by1[None, :], bx2[None, :], by2[None, :],
            )  # fmt: skip
            over = (overlap > iou_threshold) & (kept != 0)[:, None]
            suppressed = tl.maximum(suppressed, tl.max(over.to(tl.int32), axis=0))
        present = tl.sum((column < count).to(tl.int32) << bit)
        alive = present & ~tl.sum(suppressed << bit)

        row = word * 32 + bit
        ax1, ay1, ax2, ay2 = load_box(sorted_boxes_ptr, row, row < count)
        overlap = iou_or_zero(
            ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None],
            bx1[None, :], by1[None, :], bx2[None, :], by2[None, :],
        )  # fmt: skip
        over = (overlap > iou_threshold) & (row[:, None] < column[None, :])
        kept_word = resolve_word(alive, tl.sum(over.to(tl.int32) << bit[None, :], axis=1))
        tl.store(kept_words_ptr + word, kept_word)
        kept = (kept_word >> bit) & 1
        # Places for all that the word keeps; relaxed, for only the next launch or a later barrier reads them.
        slot = tl.atomic_add(num_found_ptr, tl.sum(kept), sem="relaxed") + tl.cumsum(kept, 0) - kept
        tl.store(found_ptr + slot, tl.load(sorted_keys_ptr + column, mask=kept > 0, other=0), mask=kept > 0)
        # The next word reads, from other threads, which boxes were kept.
        tl.debug_barrier()


@triton.jit
def _all_have_come(num_done_ptr, num_programs):
    """Is this the last of an image's programs to come here? It sees what all others have written."""
    # What all threads have written comes before the count; acquire and release order it against the other programs.
    tl.debug_barrier()
    return tl.atomic_add(num_done_ptr, 1, sem="acq_rel") == num_programs - 1


@triton.jit
def _store_best(
    found_ptr,  # int64: keys of all that stands in the image, which are reordered
    count,
    all_boxes_ptr,  # fp32 [A, 4] xyxy of the image
    boxes_ptr,  # fp32 [D, 4] xyxy
    scores_ptr,  # fp32 [D]
    labels_ptr,  # int64 [D]
    num_detections_ptr,  # int32
    num_anchors,
    max_detections,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LAST_ID: tl.constexpr,
):
    """An image's detections: the best of what stands, sorted, and padding."""
    count = _keep_largest(found_ptr, count, max_detections, BLOCK)
    tl.store(num_detections_ptr, count)
    for start in range(0, max_detections, ROWS):
        index = start + tl.arange(0, ROWS)
        mask = index < count
        keys = tl.load(found_ptr + index, mask=mask, other=-1)
        place = tl.where(mask, rank_descending(found_ptr, keys, count, 32), index)
        number = LAST_ID - (keys & 0xFFFFFFFF).to(tl.int32)
        category = number // num_anchors
        x1, y1, x2, y2 = load_box(all_boxes_ptr, number - category * num_anchors, mask)
        inside = index < max_detections
        store_box(boxes_ptr, place, x1, y1, x2, y2, inside)
        score = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(scores_ptr + place, tl.where(mask, score, 0.0), mask=inside)
        tl.store(labels_ptr + place, tl.where(mask, category + 1, -1).to(tl.int64), mask=inside)


@triton.jit
def _class_kernel(
    lists_ptr,  # int64 [B, C - 1, capacity]
    num_listed_ptr,  # int32 [B, C - 1]
    floor_ptr,  # int32 [B]
    all_boxes_ptr,  # fp32 [B, A, 4] xyxy
    sorted_keys_ptr,  # int64 [B, C - 1, K]
    sorted_boxes_ptr,  # fp32 [B, C - 1, K, 4] xyxy
    kept_words_ptr,  # int32 [B, C - 1, words]
    found_ptr,  # int64 [B, (C - 1) * K]
    num_found_ptr,  # int32 [B]: 0 at first
    num_done_ptr,  # int32 [B]: 0 at first
    unsettled_ptr,  # int32 [B]: is the next launch to do the image anew?
    boxes_ptr,  # fp32 [B, D, 4] xyxy
    scores_ptr,  # fp32 [B, D]
    labels_ptr,  # int64 [B, D]
    num_detections_ptr,  # int32 [B]
    num_anchors,
    capacity,
    topk,
    num_words,
    max_detections,
    iou_threshold,
    LAST_ID: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    category, num_foreground, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    problem = image * num_foreground + category
    all_boxes_ptr += image * num_anchors * 4
    found_ptr += image * num_foreground * topk
    _settle_class(
        lists_ptr + problem * capacity, tl.load(num_listed_ptr + problem), category, all_boxes_ptr,
        sorted_keys_ptr + problem * topk, sorted_boxes_ptr + problem * topk * 4, kept_words_ptr + problem * num_words,
        found_ptr, num_found_ptr + image, num_anchors, topk, iou_threshold, LAST_ID, BLOCK, ROWS,
    )  # fmt: skip
    if _all_have_come(num_done_ptr + image, num_foreground):
        # By an atomic addition of nothing: a load might find an older count in the cache.
        count = tl.atomic_add(num_found_ptr + image, 0)
        least = topk
        for start in range(0, num_foreground, BLOCK):
            index = start + tl.arange(0, BLOCK)
            mask = index < num_foreground
            listed = tl.load(num_listed_ptr + image * num_foreground + index, mask=mask, other=topk)
            least = tl.minimum(least, tl.min(listed))
        # With k candidates of every class above the floor, nothing below it is wanted either.
        unsettled = (count < max_detections) & (tl.load(floor_ptr + image) >= 0) & (least < topk)
        tl.store(unsettled_ptr + image, unsettled.to(tl.int32))
        if unsettled:
            tl.store(num_found_ptr + image, 0)
            tl.store(num_done_ptr + image, 0)
        else:
            _store_best(
                found_ptr, count, all_boxes_ptr, boxes_ptr + image * max_detections * 4,
                scores_ptr + image * max_detections, labels_ptr + image * max_detections, num_detections_ptr + image,
                num_anchors, max_detections, BLOCK, ROWS, LAST_ID,
            )  # fmt: skip


@triton.jit
def _rest_kernel(
    unsettled_ptr,  # int32 [B]
    logits_ptrs,  # [B, P, a, C] of each level
    logits_strides,  # of images, of each level
    cells,
    per_cells,
    top_ptr,  # fp32 [B, A]
    total_ptr,  # fp32 [B, A]
    all_boxes_ptr,  # fp32 [B, A, 4] xyxy
    lists_ptr,  # int64 [B, C - 1, capacity]
    sorted_keys_ptr,  # int64 [B, C - 1, K]
    sorted_boxes_ptr,  # fp32 [B, C - 1, K, 4] xyxy
    kept_words_ptr,  # int32 [B, C - 1, words]
    found_ptr,  # int64 [B, (C - 1) * K]
    num_found_ptr,  # int32 [B]: 0 at first
    num_done_ptr,  # int32 [B]: 0 at first
    boxes_ptr,  # fp32 [B, D, 4] xyxy
    scores_ptr,  # fp32 [B, D]
    labels_ptr,  # int64 [B, D]
    num_detections_ptr,  # int32 [B]
    num_anchors,
    num_blocks,
    capacity,
    topk,
    num_words,
    max_detections,
    score_threshold,
    iou_threshold,
    CLASSES: tl.constexpr,
    LAST_ID: tl.constexpr,
    PLANES: tl.constexpr,
    ANCHORS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    category, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(unsettled_ptr + image) != 0:
        problem = image * (CLASSES - 1) + category
        list_ptr = lists_ptr + problem * capacity
        all_boxes_ptr += image * num_anchors * 4
        found_ptr += image * (CLASSES - 1) * topk
        listed = 0
        for block in range(num_blocks):
            level, own_block, first_anchor, num_cells, per_cell = locate(block, cells, per_cells, ANCHORS)
            own, mask = anchors_of_block(own_block, num_cells, per_cell, PLANES, ANCHORS)
            anchor = first_anchor + own
            row = image * num_anchors + anchor
            start, stride = first_number(own, num_cells, per_cell, CLASSES, PLANES)
            logits_ptr = pick(logits_ptrs, level) + image * pick_int(logits_strides, level)
            logit = tl.load(logits_ptr + start + (category + 1) * stride, mask=mask, other=-float("inf"))
            top, total = tl.load(top_ptr + row, mask=mask, other=0.0), tl.load(total_ptr + row, mask=mask, other=1.0)
            score = tl.div_rn(power(logit.to(tl.float32), top), total)
            candidate = score > score_threshold
            if listed + ANCHORS > capacity:
                # The list's last keys were written by other threads.
                tl.debug_barrier()
                listed = _keep_largest(list_ptr, listed, topk, BLOCK)
            one = candidate.to(tl.int32)
            key = _key(score, category, anchor, num_anchors, LAST_ID)
            tl.store(list_ptr + listed + tl.cumsum(one, 0) - one, key, mask=candidate)
            listed += tl.sum(one)
        # What follows reads, from other threads, the list.
        tl.debug_barrier()
        _settle_class(
            list_ptr, listed, category, all_boxes_ptr, sorted_keys_ptr + problem * topk,
            sorted_boxes_ptr + problem * topk * 4, kept_words_ptr + problem * num_words, found_ptr,
            num_found_ptr + image, num_anchors, topk, iou_threshold, LAST_ID, BLOCK, ROWS,
        )  # fmt: skip
        if _all_have_come(num_done_ptr + image, CLASSES - 1):
            # By an atomic addition of nothing: a load might find an older count in the cache.
            count = tl.atomic_add(num_found_ptr + image, 0)
            _store_best(
                found_ptr, count, all_boxes_ptr, boxes_ptr + image * max_detections * 4,
                scores_ptr + image * max_detections, labels_ptr + image * max_detections, num_detections_ptr + image,
                num_anchors, max_detections, BLOCK, ROWS, LAST_ID,
            )  # fmt: skip


def postprocess_detections_triton(
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
    head = Head.of(cls_logits, box_deltas)
    batch, num_anchors, num_classes = len(image_sizes), len(anchors), head.logits[0].shape[3]
    device = anchors.device
    topk = min(topk_candidates, num_anchors)
    num_foreground = num_classes - 1

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    boxes = empty(torch.float32, batch, max_detections, 4)
    scores = empty(torch.float32, batch, max_detections)
    labels = empty(torch.int64, batch, max_detections)
    num_detections = empty(torch.int32, batch)
    if batch * topk * num_foreground == 0:
        return boxes.zero_(), scores.zero_(), labels.fill_(-1), num_detections.zero_()
    assert num_foreground * num_anchors <= LAST_ID, "a candidate's number fits 31 bits"

    block_anchors, chunk = tile(num_classes)
    num_blocks = head.blocks(block_anchors)
    capacity = min(num_anchors, max(FLOOR_ROWS * max_detections, topk + REST_ANCHORS))
    num_words = triton.cdiv(topk, 32)
    anchors, image_sizes = anchors.contiguous(), image_sizes.contiguous()
    top, total = empty(torch.float32, batch, num_anchors), empty(torch.float32, batch, num_anchors)
    best = empty(torch.int32, batch, num_anchors)
    num_listed = empty(torch.int32, batch, num_foreground)
    num_found, num_done = empty(torch.int32, batch), empty(torch.int32, batch)
    _row_kernel[(num_blocks, batch)](
        head.logits,
        head.strides[0],
        head.cells,
        head.per_cell,
        top,
        total,
        best,
        num_listed,
        num_found,
        num_done,
        num_anchors,
        score_threshold,
        CLASSES=num_classes,
        PLANES=head.planes,
        BLOCK=block_anchors,
        CHUNK=chunk,
        num_warps=4,
        enable_fp_fusion=False,
    )
    all_boxes = empty(torch.float32, batch, num_anchors, 4)
    lists = empty(torch.int64, batch, num_foreground, capacity)
    floor = empty(torch.int32, batch)
    gather_anchors = min(block_anchors, GATHER_ANCHORS)
    gather_blocks = head.blocks(gather_anchors)
    _gather_kernel[(min(gather_blocks, max(1, GATHER_PROGRAMS // batch)), batch)](
        head.logits,
        head.deltas,
        *head.strides,
        head.cells,
        head.per_cell,
        anchors,
        image_sizes,
        top,
        total,
        best,
        all_boxes,
        lists,
        num_listed,
        floor,
        num_anchors,
        gather_blocks,
        capacity,
        score_threshold,
        *weights,
        MAX_LOG_SCALE,
        CLASSES=num_classes,
        LAST_ID=LAST_ID,
        PLANES=head.planes,
        BLOCK=gather_anchors,
        CHUNK=chunk,
        SELECT_BLOCK=GATHER_BLOCK,
        num_warps=8,
        enable_fp_fusion=False,
    )
    unsettled = empty(torch.int32, batch)
    settling = (
        empty(torch.int64, batch, num_foreground, topk),
        empty(torch.float32, batch, num_foreground, topk, 4),
        empty(torch.int32, batch, num_foreground, num_words),
        empty(torch.int64, batch, num_foreground * topk),
        num_found,
        num_done,
    )
    out = (boxes, scores, labels, num_detections)
    _class_kernel[(num_foreground, batch)](
        lists,
        num_listed,
        floor,
        all_boxes,
        *settling,
        unsettled,
        *out,
        num_anchors,
        capacity,
        topk,
        num_words,
        max_detections,
        round_down(iou_threshold),
        LAST_ID=LAST_ID,
        BLOCK=SELECT_BLOCK,
        ROWS=ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _rest_kernel[(num_foreground, batch)](
        unsettled,
        head.logits,
        head.strides[0],
        head.cells,
        head.per_cell,
        top,
        total,
        all_boxes,
        lists,
        *settling,
        *out,
        num_anchors,
        head.blocks(REST_ANCHORS),
        capacity,
        topk,
        num_words,
        max_detections,
        score_threshold,
        round_down(iou_threshold),
        CLASSES=num_classes,
        LAST_ID=LAST_ID,
        PLANES=head.planes,
        ANCHORS=REST_ANCHORS,
        BLOCK=SELECT_BLOCK,
        ROWS=ROWS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out
