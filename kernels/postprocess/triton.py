"""Kernels from the head's outputs to detections.

The steps are softmax, top-k, decode, clip, NMS per class, and the best detections per image. Whether a candidate is
kept depends on the better candidates of its class alone. So once as many detections as wanted are kept among an image's
candidates above some cutoff score, no candidate below the cutoff matters. Most of the 80 x 400 candidates of an image
then need never be looked at. Four launches, whatever the number of images and classes:

1. Rows. A program takes a block of anchors of one image. For each anchor it stores what the softmax needs (the largest
   logit and the sum of the powers) and its best foreground score as an integer key. It reads the logits once.
2. Gathering. The cutoff of an image is a score that at most `capacity` anchors exceed: CUTOFF_ANCHORS per wanted
   detection, or K + REST_ANCHORS if that is more. Any such score will do, so the search ends at the first one that half
   to three quarters as many exceed. Every program finds it for itself, because that is faster than another launch. A
   program takes a share of the image's anchors. It decodes and clips the boxes of those that have a candidate, and
   notes those above the cutoff. Then it reads the logits of these once more, and appends their candidates to lists, one
   per class. The order in which programs run changes the order of a list, but no result, because keys are distinct and
   only their order counts.
3. Classes. A program takes one class of one image. It finds the k best of the class's list, sorts them by counting, and
   runs NMS over them, 32 at a time, each compared with the kept ones before it. These move to the front of the sorted
   boxes, so that nothing else is read. IoUs are compared without division. A list of 32 need not be sorted. It appends
   what is kept to the image's list. The last program of an image to finish selects the best of that list, sorts them by
   counting and writes the output with its padding, unless the image needs step 4.
4. The rest. If fewer detections are kept than wanted, candidates lie below the cutoff, and a class has fewer than k
   candidates above it, the image is settled again without a cutoff. That is exact, and hardly ever necessary.
   Otherwise these programs have nothing to do.

No list can overflow: at most as many anchors lie above the cutoff as a list has slots, and without a cutoff a full list
is reduced to its k best.

What waits for what, in one image:   row programs -> gather programs -> class programs -> the last of them -> the rest
                                              (launch)          (launch)    (a counter)           (launch)

Bytes that must move: the logits in, 45 MB at B = 32, C = 81 and bf16, 11 us at 4.3 TB/s. Scratch memory: 28 bytes per
anchor; for each of B * (C - 1) classes 32 bytes per candidate of its k best, and 8 bytes per slot of its list.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.device.arithmetic import LEAST_QUOTIENT, divide, divisor_of, whole_quotient
from ssdcore.kernels.device.boxmath import (
    Box,
    Deltas,
    Weights,
    areas_are_usual,
    columns,
    decode,
    iou_exceeds,
    iou_limit,
    load_box,
    rows,
    store_box,
)
from ssdcore.kernels.device.constant import Constant
from ssdcore.kernels.device.head import (
    TILE_WARPS,
    HeadShape,
    Levels,
    anchors_of_block,
    best_foreground,
    exp_difference,
    levels_of,
    load_logits,
    locate_block,
    num_blocks,
    ptr_of_image,
    softmax,
    span_of,
    span_of_block,
    tile_anchors,
    without_deltas,
)
from ssdcore.kernels.device.selection import (
    LAST_NUMBER,
    NUMBERED_SCORE_TOP_BIT,
    compact_above,
    complement,
    keep_k_largest,
    largest_key,
    limit_between,
    load_keys,
    pad_keys,
    rank_descending,
)
from ssdcore.kernels.rules import EXACT, registers, round_down

CUTOFF_ANCHORS = 8  # at most so many anchors above the cutoff per wanted detection, at least half as many
GATHER_PROGRAMS = 288  # of all images together, about two per multiprocessor of an H200
GATHER_REGISTERS = 80  # of a thread at most: three programs per multiprocessor, so that all run at once
GATHER_BLOCK = 512  # anchors decoded at once, two per thread at eight warps; more would cost registers
GATHER_SELECT_BLOCK = 9216  # keys of anchors in registers, 36 per thread at eight warps: all of SSD300
SELECT_BLOCK = 1024  # keys of a class or an image in registers, 8 per thread at four warps
FINAL_BLOCK = 128  # detections ranked at once, one per thread at four warps
CANDIDATES_AT_ONCE = 32  # candidates compared at once: with 32 others, 8 pairs per thread
REST_ANCHORS = 256  # anchors read at once where an image is settled again: two per thread
WORD_BITS = Constant(32)  # candidates that a word of bits speaks for


class AnchorScores(NamedTuple):
    """Pointers to what the row kernel stores for each anchor."""

    top_ptr: Tensor  # fp32 [B, A]: largest logit
    total_ptr: Tensor  # fp32 [B, A]: sum of exp(logit - largest)
    best_ptr: Tensor  # int32 [B, A]: bits of the best foreground score, or -1 if the anchor has no candidate


class Counters(NamedTuple):
    """Pointers to the lengths of the lists, which the row kernel sets to zero."""

    listed_ptr: Tensor  # int32 [B, C - 1]: candidates of a class
    kept_ptr: Tensor  # int32 [B]: kept candidates of an image
    done_ptr: Tensor  # int32 [B]: class programs that have finished


class Scratch(NamedTuple):
    """Pointers to the lists of candidates, and to what is made of them."""

    candidates_ptr: Tensor  # int64 [B, C - 1, capacity]: keys of each class's candidates
    sorted_keys_ptr: Tensor  # int64 [B, C - 1, K]: the best of them, sorted
    sorted_boxes_ptr: Tensor  # fp32 [B, C - 1, K, 4] xyxy: their boxes; those that are kept move to the front
    kept_keys_ptr: Tensor  # int64 [B, kept]: keys of all that is kept in an image


class Output(NamedTuple):
    """Pointers to the detections."""

    boxes_ptr: Tensor  # fp32 [B, D, 4] xyxy
    scores_ptr: Tensor  # fp32 [B, D]
    labels_ptr: Tensor  # int64 [B, D]
    num_detections_ptr: Tensor  # int32 [B]
    anchor_idxs_ptr: Tensor  # int64 [B, D]


class Sizes(NamedTuple):
    """Lengths that kernels need."""

    anchors: int  # A
    capacity: int  # slots in the list of a class
    topk: int  # K, candidates of a class that take part in NMS
    kept: int  # slots for what is kept in an image
    detections: int  # D


class ClassProblem(NamedTuple):
    """NMS of one class of one image: the parts of `Scratch` that belong to it."""

    class_index: tl.tensor  # label - 1
    candidates_ptr: tl.tensor
    sorted_keys_ptr: tl.tensor
    sorted_boxes_ptr: tl.tensor
    boxes_ptr: tl.tensor  # decoded boxes of the image's anchors
    kept_keys_ptr: tl.tensor  # of the image
    kept_count_ptr: tl.tensor  # of the image


@triton.jit
def _key_of(score, class_index, anchor, num_anchors):
    """A key that orders candidates by score, equal scores by class and then by anchor; no two are equal."""
    number = class_index * num_anchors + anchor
    # The complement is not negative. To say so spares extending its sign.
    low = complement(number).to(tl.uint32, bitcast=True).to(tl.int64)
    return (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low


@triton.jit
def _number_of(key):
    """The number of a candidate: class_index * A + anchor."""
    return complement(key.to(tl.int32))  # the cast keeps the low word


@triton.jit
def _score_of(key):
    return (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)


# --- 1. rows ----------------------------------------------------------------------------------------------


@triton.jit
def _zero_counters(counters, image, HEAD: tl.constexpr):
    tl.store(counters.kept_ptr + image, 0)
    tl.store(counters.done_ptr + image, 0)
    for chunk in range(tl.cdiv(HEAD.classes - 1, HEAD.chunk)):
        class_index = chunk * HEAD.chunk + tl.arange(0, HEAD.chunk)
        listed_ptr = counters.listed_ptr + image * (HEAD.classes - 1) + class_index
        tl.store(listed_ptr, tl.zeros_like(class_index), mask=class_index < HEAD.classes - 1)


@triton.jit
def _row_kernel(
    levels,  # Levels, without deltas
    anchor_scores,  # AnchorScores
    counters,  # Counters
    num_anchors,
    score_threshold,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block_number, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if block_number == 0:
        _zero_counters(counters, image, HEAD)

    block = locate_block(block_number, levels, BLOCK)
    anchor_in_level, exists = anchors_of_block(block, HEAD, BLOCK)
    logits_ptr = ptr_of_image(levels.logits, levels.logits_strides, block, image)
    span = span_of_block(block, HEAD.classes, HEAD, BLOCK)
    top, total, powers = softmax(load_logits(logits_ptr, block, span, exists, HEAD, BLOCK), HEAD)
    # The score of the largest power is the largest score, because division keeps the order.
    score = tl.div_rn(best_foreground(powers, HEAD, BLOCK), total)
    row = image * num_anchors + block.first_anchor + anchor_in_level
    tl.store(anchor_scores.top_ptr + row, top, mask=exists)
    tl.store(anchor_scores.total_ptr + row, total, mask=exists)
    key = tl.where(score > score_threshold, score.to(tl.int32, bitcast=True), -1)
    tl.store(anchor_scores.best_ptr + row, key, mask=exists)


# --- 2. gathering -----------------------------------------------------------------------------------------


@triton.jit
def _clip(x, side):
    """`x` clipped to 0..side; NaN stays NaN."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, side, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _rows_of_anchors(ptrs, strides, levels, image, anchor, width, HEAD: tl.constexpr):
    """Where the `width` numbers of each anchor lie: a pointer to the first, and the stride from one to the next.

    Unlike the anchors of a block, these may lie on different levels.
    """
    ptr = ptrs[0] + image * tl.cast(strides[0], tl.int64) + tl.zeros_like(anchor)
    num_cells = tl.zeros_like(anchor) + levels.cells[0]
    per_cell = tl.zeros_like(anchor) + levels.per_cell[0]
    first_anchor = tl.zeros_like(anchor)
    num_anchors = tl.cast(0, tl.int32)
    for i in tl.static_range(1, len(levels.cells)):
        num_anchors += tl.cast(levels.cells[i - 1], tl.int32) * levels.per_cell[i - 1]
        beyond = anchor >= num_anchors
        ptr = tl.where(beyond, ptrs[i] + image * tl.cast(strides[i], tl.int64), ptr)
        num_cells = tl.where(beyond, levels.cells[i], num_cells)
        per_cell = tl.where(beyond, levels.per_cell[i], per_cell)
        first_anchor = tl.where(beyond, num_anchors, first_anchor)
    anchor_in_level = anchor - first_anchor
    if HEAD.planes:
        stride = num_cells
        cell = whole_quotient(anchor_in_level, per_cell)
        ptr += ((anchor_in_level - cell * per_cell) * width).to(tl.int64) * num_cells + cell
    else:
        stride = tl.full(anchor.shape, 1, tl.int32)
        ptr += anchor_in_level.to(tl.int64) * width
    return ptr, stride


@triton.jit
def _decode_boxes(
    levels, anchors_ptr, weights, boxes_ptr, image, num_anchors, anchor, mask, height, width, HEAD: tl.constexpr
):
    """Decode, clip and store the boxes of the anchors where `mask` is true."""
    ptr, stride = _rows_of_anchors(levels.deltas, levels.deltas_strides, levels, image, anchor, 4, HEAD)
    deltas = Deltas(
        tl.load(ptr, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + stride, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + stride * 2, mask=mask, other=0.0).to(tl.float32),
        tl.load(ptr + stride * 3, mask=mask, other=0.0).to(tl.float32),
    )
    box = decode(deltas, load_box(anchors_ptr, anchor, mask), weights)
    clipped = Box(_clip(box.x1, width), _clip(box.y1, height), _clip(box.x2, width), _clip(box.y2, height))
    store_box(boxes_ptr, image * num_anchors + anchor, clipped, mask)


@triton.jit
def _classes_of_chunk(chunk, HEAD: tl.constexpr):
    """The foreground classes of a tile: a row if levels lie in rows, a column if they lie in planes."""
    return tl.expand_dims(1 + chunk * HEAD.chunk + tl.arange(0, HEAD.chunk), HEAD.planes)


@triton.jit
def _scores_of(logits, top, total, bound):
    """The softmax of a tuple of tiles of logits; scores that do not exceed `bound` need not be exact."""
    scores = ()
    for chunk in tl.static_range(len(logits)):
        scores += (exp_difference(logits[chunk], top),)
    if bound >= LEAST_QUOTIENT:
        scores = _divide_tiles(scores, divisor_of(total))
    else:
        scores = _divide_tiles_exactly(scores, total)
    return scores


@triton.jit
def _divide_tiles(tiles, divisor):
    quotients = ()
    for i in tl.static_range(len(tiles)):
        quotients += (divide(tiles[i], divisor),)
    return quotients


@triton.jit
def _divide_tiles_exactly(tiles, number):
    quotients = ()
    for i in tl.static_range(len(tiles)):
        quotients += (tl.div_rn(tiles[i], tl.broadcast_to(number, tiles[i].shape)),)
    return quotients


@triton.jit
def _list_candidates(
    levels, anchor_scores, candidates_ptr, listed_ptr, image, num_anchors, capacity, anchor, mask, bound,
    HEAD: tl.constexpr,
):  # fmt: skip
    """Append the candidates of the anchors where `mask` is true, those above `bound`, to the lists of their classes."""
    axis: tl.constexpr = 1 - HEAD.planes  # of the classes
    first_list = image * (HEAD.classes - 1) - 1  # that of class 0, if it had one
    listed_ptr += first_list
    candidates_ptr += first_list * capacity
    row = image * num_anchors + anchor
    top = tl.expand_dims(tl.load(anchor_scores.top_ptr + row, mask=mask, other=0.0), axis)
    total = tl.expand_dims(tl.load(anchor_scores.total_ptr + row, mask=mask, other=1.0), axis)
    row_ptr, stride = _rows_of_anchors(levels.logits, levels.logits_strides, levels, image, anchor, HEAD.classes, HEAD)
    row_ptr, stride = tl.expand_dims(row_ptr, axis), tl.expand_dims(stride, axis)
    # All loads come before the first atomic, and all atomics before the first store, so that they wait together.
    logits = ()
    for chunk in tl.static_range((HEAD.classes - 1 + HEAD.chunk - 1) // HEAD.chunk):
        class_id = _classes_of_chunk(chunk, HEAD)
        inside = tl.expand_dims(mask, axis) & (class_id < HEAD.classes)
        logits += (tl.load(row_ptr + class_id * stride, mask=inside, other=-float("inf")).to(tl.float32),)
    scores = _scores_of(logits, top, total, bound)
    slots = ()
    for chunk in tl.static_range(len(scores)):
        list_ptr = tl.broadcast_to(listed_ptr + _classes_of_chunk(chunk, HEAD), scores[chunk].shape)
        # Each candidate reserves a slot of its own. Relaxed: only the next launch reads the lists. The score is 0 where
        # there is no logit.
        slots += (tl.atomic_add(list_ptr, 1, mask=scores[chunk] > bound, sem="relaxed"),)
    for chunk in tl.static_range(len(scores)):
        class_id, score = _classes_of_chunk(chunk, HEAD), scores[chunk]
        key = _key_of(score, class_id - 1, tl.expand_dims(anchor, axis), num_anchors)
        tl.store(candidates_ptr + (class_id * capacity + slots[chunk]), key, mask=score > bound)


@triton.jit
def _gather_kernel(
    levels,  # Levels
    anchors_ptr,  # [A, 4] xyxy
    image_sizes_ptr,  # [B, 2] height, width
    weights,  # Weights
    anchor_scores,  # AnchorScores
    boxes_ptr,  # fp32 [B, A, 4] xyxy: decoded boxes of the anchors that have a candidate
    found_ptr,  # int32 [B, at least A]: of each program, its anchors above the cutoff
    found_stride,
    candidates_ptr,  # int64 [B, C - 1, capacity]
    listed_ptr,  # int32 [B, C - 1]: zero at first
    cutoff_ptr,  # int32 [B]: bits of the score that all listed candidates exceed; -1 if all candidates are listed
    num_anchors,
    capacity,
    score_threshold,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    best_ptr = anchor_scores.best_ptr + image * num_anchors
    floor = tl.maximum(tl.cast(score_threshold, tl.float32).to(tl.int32, bitcast=True), -1)  # -0.0 has no key
    most = tl.where(num_anchors <= capacity, capacity, capacity - capacity // 4)
    first_keys = load_keys(best_ptr, 0, num_anchors, SELECT_BLOCK // BLOCK, BLOCK)
    highest = largest_key(first_keys, best_ptr, num_anchors)
    cutoff, _ = limit_between(first_keys, best_ptr, num_anchors, capacity // 2, most, floor, highest)
    cutoff = tl.where(cutoff == floor, -1, cutoff)  # all candidates are listed
    tl.store(cutoff_ptr + image, cutoff)  # every program stores the same value

    height = tl.load(image_sizes_ptr + image * 2).to(tl.float32)
    width = tl.load(image_sizes_ptr + image * 2 + 1).to(tl.float32)
    anchors_of_program = tl.cdiv(num_anchors, tl.num_programs(0))
    first_anchor = tl.program_id(0) * anchors_of_program
    end = tl.minimum(first_anchor + anchors_of_program, num_anchors)
    found_ptr += image * found_stride + first_anchor
    num_found = 0
    for start in range(first_anchor, end, BLOCK):
        anchor = start + tl.arange(0, BLOCK)
        best = tl.load(best_ptr + anchor, mask=anchor < end, other=-1)
        _decode_boxes(
            levels, anchors_ptr, weights, boxes_ptr, image, num_anchors, anchor, best >= 0, height, width, HEAD
        )
        above = (best > cutoff).to(tl.int32)
        tl.store(found_ptr + num_found + tl.cumsum(above, 0) - above, anchor, mask=above > 0)
        num_found += tl.sum(above)
    # Other threads of the program read what this thread found.
    tl.debug_barrier()

    bound = tl.where(cutoff >= 0, cutoff.to(tl.float32, bitcast=True), score_threshold)
    for start in range(0, num_found, TILE):
        index = start + tl.arange(0, TILE)
        mask = index < num_found
        anchor = tl.load(found_ptr + index, mask=mask, other=0)
        _list_candidates(
            levels, anchor_scores, candidates_ptr, listed_ptr, image, num_anchors, capacity, anchor, mask, bound, HEAD
        )


# --- 3. classes -------------------------------------------------------------------------------------------


@triton.jit
def _class_problem(class_index, image, num_foreground, scratch, counters, boxes_ptr, sizes):
    """The problem of one class of one image."""
    # In 32 bits, so that the offsets are products of 32 bits each, which a GPU multiplies at once.
    problem_index = (image.to(tl.int32) * num_foreground + class_index).to(tl.int64)
    return ClassProblem(
        class_index,
        scratch.candidates_ptr + problem_index * sizes.capacity,
        scratch.sorted_keys_ptr + problem_index * sizes.topk,
        scratch.sorted_boxes_ptr + problem_index * sizes.topk * 4,
        boxes_ptr + image * sizes.anchors * 4,
        scratch.kept_keys_ptr + image * sizes.kept,
        counters.kept_ptr + image,
    )


@triton.jit
def _sort_candidates(problem, count, num_anchors, AT_ONCE: tl.constexpr):
    """Sort the `count` keys of the list, best first, and fetch the boxes of their anchors."""
    pad_keys(problem.candidates_ptr, count, AT_ONCE // 2)
    for start in range(0, count, 2 * AT_ONCE):
        index = start + tl.arange(0, 2 * AT_ONCE)
        mask = index < count
        keys = tl.load(problem.candidates_ptr + index, mask=mask, other=-1)
        rank = rank_descending(problem.candidates_ptr, keys, count, AT_ONCE // 2)
        anchor = _number_of(keys) - problem.class_index * num_anchors
        store_box(problem.sorted_boxes_ptr, rank, load_box(problem.boxes_ptr, anchor, mask), mask)
        tl.store(problem.sorted_keys_ptr + rank, keys, mask=mask)
    # NMS reads boxes and keys that other threads sorted.
    tl.debug_barrier()


@triton.jit
def _resolve_word(alive, suppressors):
    """Greedy NMS among 32 boxes: the word of those kept of `alive`, if those of `suppressors[i]` suppress box i."""
    bit = tl.arange(0, WORD_BITS)
    flag = alive.to(tl.int32) << bit
    kept = tl.sum(flag)
    before = kept ^ 1
    # Box i is settled after i + 1 rounds at the latest. Real boxes need a few.
    while kept != before:
        before = kept
        kept = tl.sum(tl.where((suppressors & kept) == 0, flag, 0))
    return kept


@triton.jit
def _suppressed_by_kept(problem, num_kept, column_box, limit, column_is_usual, AT_ONCE: tl.constexpr):
    """Which of 32 candidates one of the first `num_kept` sorted boxes suppresses, int32 [32]."""
    suppressed = tl.zeros([WORD_BITS], tl.int32)
    for start in range(0, num_kept, AT_ONCE):
        row = start + tl.arange(0, AT_ONCE)
        row_box = load_box(problem.sorted_boxes_ptr, row, row < num_kept)
        overlaps = iou_exceeds(rows(row_box), columns(column_box), limit, column_is_usual)
        suppressed = tl.maximum(suppressed, tl.max(overlaps.to(tl.int32), axis=0))
    return suppressed


@triton.jit
def _kept_of_word(alive, row_box, box, precedes, limit, box_is_usual):
    """Greedy NMS among the candidates of a word: the bits of those of `alive` that are kept.

    Args:
        alive: bool [32], false where there is no candidate or a candidate of an earlier word suppresses it.
        row_box, box: the candidates' boxes twice, because `rows` and `columns` want different layouts.
        precedes: bool [32, 32], whether the row's candidate is better than the column's.
        limit: boxes suppress each other above this IoU.
        box_is_usual: whether the areas of the boxes are.
    """
    suppresses = iou_exceeds(rows(row_box), columns(box), limit, box_is_usual) & precedes
    suppressors = tl.sum(suppresses.to(tl.int32) << tl.arange(0, WORD_BITS)[:, None], axis=0)
    return _resolve_word(alive, suppressors)


@triton.jit
def _append_kept(problem, kept_word, keys_ptr):
    """Append the kept ones of the 32 keys at `keys_ptr` to the image's list.

    Returns their number, and for each of the 32: whether it is kept, and how many before it are.
    """
    bit = tl.arange(0, WORD_BITS)
    kept = (kept_word >> bit) & 1
    num_kept = tl.sum(kept)
    keys = tl.load(keys_ptr + bit, mask=kept > 0, other=0)
    # Reserves slots for all that the word keeps. Relaxed: they are read after a launch or a barrier.
    first_slot = tl.atomic_add(problem.kept_count_ptr, num_kept, sem="relaxed")
    before = tl.cumsum(kept, 0) - kept
    tl.store(problem.kept_keys_ptr + first_slot + before, keys, mask=kept > 0)
    return num_kept, kept > 0, before


@triton.jit
def _load_candidates(problem, num_anchors, count):
    """Of the first 32 candidates of a list that is not sorted: which exist, the keys and the boxes."""
    index = tl.arange(0, WORD_BITS)
    exists = index < count
    keys = tl.load(problem.candidates_ptr + index, mask=exists, other=-1)
    anchor = _number_of(keys) - problem.class_index * num_anchors
    return exists, keys, load_box(problem.boxes_ptr, anchor, exists)


@triton.jit
def _settle_class(
    problem, count, sizes, iou_threshold, FINALISTS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Top-k and NMS of one class; appends the keys of what is kept to the image's list."""
    count = keep_k_largest(problem.candidates_ptr, count, sizes.topk, NUMBERED_SCORE_TOP_BIT, FINALISTS // BLOCK, BLOCK)
    limit = iou_limit(iou_threshold)
    if count <= WORD_BITS:
        # The candidates of a single word are compared by their keys, which need not be sorted.
        exists, keys, box = _load_candidates(problem, sizes.anchors, count)
        _, row_keys, row_box = _load_candidates(problem, sizes.anchors, count)
        precedes = row_keys[:, None] > keys[None, :]
        kept_word = _kept_of_word(exists, row_box, box, precedes, limit, areas_are_usual(columns(box), limit))
        _append_kept(problem, kept_word, problem.candidates_ptr)
    else:
        _sort_candidates(problem, count, sizes.anchors, AT_ONCE)
        num_kept = 0
        for start in range(0, count, WORD_BITS):
            candidate = start + tl.arange(0, WORD_BITS)
            exists = candidate < count
            box = load_box(problem.sorted_boxes_ptr, candidate, exists)
            is_usual = areas_are_usual(columns(box), limit)
            suppressed = _suppressed_by_kept(problem, num_kept, box, limit, is_usual, AT_ONCE)
            row_box = load_box(problem.sorted_boxes_ptr, candidate, exists)
            precedes = candidate[:, None] < candidate[None, :]
            kept_word = _kept_of_word(exists & (suppressed == 0), row_box, box, precedes, limit, is_usual)
            num_new, is_kept, before = _append_kept(problem, kept_word, problem.sorted_keys_ptr + start)
            # The boxes that are kept move to the front. Another thread may still have to read where they move to.
            tl.debug_barrier()
            store_box(problem.sorted_boxes_ptr, num_kept + before, box, is_kept)
            num_kept += num_new
            # The next candidates are compared with boxes that another thread moved.
            tl.debug_barrier()


@triton.jit
def _is_last_program(done_ptr, num_programs):
    """Whether this is the last of an image's programs to arrive; the last one sees all that the others have stored."""
    # All threads have stored before one counts. Acquire and release order the count against other programs' stores.
    tl.debug_barrier()
    return tl.atomic_add(done_ptr, 1, sem="acq_rel") == num_programs - 1


@triton.jit
def _store_detections(
    kept_keys_ptr, count, cutoff, boxes_ptr, output, image, sizes,
    FINALISTS: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Write an image's detections: the best of the `count` kept candidates, sorted, and padding."""
    out_boxes_ptr = output.boxes_ptr + image * sizes.detections * 4
    out_scores_ptr = output.scores_ptr + image * sizes.detections
    out_labels_ptr = output.labels_ptr + image * sizes.detections
    out_anchors_ptr = output.anchor_idxs_ptr + image * sizes.detections
    # A few more than wanted are sorted: finding exactly the best would take more steps.
    most = sizes.detections + sizes.detections // 4
    if count > most:
        # The score of every candidate exceeds the cutoff.
        floor = tl.maximum(cutoff.to(tl.int64) << 32, -1)
        first_keys = load_keys(kept_keys_ptr, 0, count, FINALISTS // BLOCK, BLOCK)
        best = largest_key(first_keys, kept_keys_ptr, count)
        limit, _ = limit_between(first_keys, kept_keys_ptr, count, sizes.detections, most, floor, best)
        count = compact_above(kept_keys_ptr, count, limit, FINALISTS // BLOCK, BLOCK)
    tl.store(output.num_detections_ptr + image, tl.minimum(count, sizes.detections))
    pad_keys(kept_keys_ptr, count, AT_ONCE)
    for start in range(0, tl.maximum(count, sizes.detections), BLOCK):
        index = start + tl.arange(0, BLOCK)
        exists = index < count
        keys = tl.load(kept_keys_ptr + index, mask=exists, other=-1)
        rank = tl.where(exists, rank_descending(kept_keys_ptr, keys, count, AT_ONCE), index)
        number = _number_of(keys)
        class_index = whole_quotient(number, sizes.anchors)
        anchor = number - class_index * sizes.anchors
        inside = rank < sizes.detections
        box = load_box(boxes_ptr, anchor, exists & inside)
        store_box(out_boxes_ptr, rank, box, inside)
        tl.store(out_scores_ptr + rank, tl.where(exists, _score_of(keys), 0.0), mask=inside)
        tl.store(out_labels_ptr + rank, tl.where(exists, class_index + 1, -1).to(tl.int64), mask=inside)
        tl.store(out_anchors_ptr + rank, tl.where(exists, anchor, -1).to(tl.int64), mask=inside)


@triton.jit
def _fewest_listed(listed_ptr, num_foreground, topk, BLOCK: tl.constexpr):
    """The length of an image's shortest list, at most `topk`."""
    fewest = topk
    for start in range(0, num_foreground, BLOCK):
        class_index = start + tl.arange(0, BLOCK)
        listed = tl.load(listed_ptr + class_index, mask=class_index < num_foreground, other=topk)
        fewest = tl.minimum(fewest, tl.min(listed))
    return fewest


@triton.jit
def _class_kernel(
    boxes_ptr,  # fp32 [B, A, 4] xyxy: decoded boxes
    cutoff_ptr,  # int32 [B]
    scratch,  # Scratch
    counters,  # Counters
    unsettled_ptr,  # int32 [B]: whether the next launch has to settle the image again
    output,  # Output
    sizes,  # Sizes
    iou_threshold,
    FINALISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    class_index, num_foreground, image = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    problem = _class_problem(class_index, image, num_foreground, scratch, counters, boxes_ptr, sizes)
    listed_ptr = counters.listed_ptr + image * num_foreground
    _settle_class(problem, tl.load(listed_ptr + class_index), sizes, iou_threshold, FINALISTS, BLOCK, AT_ONCE)
    if _is_last_program(counters.done_ptr + image, num_foreground):
        # An atomic that adds nothing: a load might find an older count in the cache.
        count = tl.atomic_add(counters.kept_ptr + image, 0)
        cutoff = tl.load(cutoff_ptr + image)
        fewest = _fewest_listed(listed_ptr, num_foreground, sizes.topk, BLOCK)
        # If every class has k candidates above the cutoff, no candidate below it is wanted either.
        unsettled = (count < sizes.detections) & (cutoff >= 0) & (fewest < sizes.topk)
        tl.store(unsettled_ptr + image, unsettled.to(tl.int32))
        if unsettled:
            tl.store(counters.kept_ptr + image, 0)
            tl.store(counters.done_ptr + image, 0)
        else:
            _store_detections(
                problem.kept_keys_ptr, count, cutoff, problem.boxes_ptr, output, image, sizes, FINALISTS, BLOCK, AT_ONCE
            )


# --- 4. the rest ------------------------------------------------------------------------------------------


@triton.jit
def _list_all_candidates(
    problem, levels, anchor_scores, image, num_blocks, sizes, score_threshold,
    HEAD: tl.constexpr, ANCHORS: tl.constexpr, FINALISTS: tl.constexpr,
):  # fmt: skip
    """List the candidates of one class without a cutoff, the k best of them at least; returns their number."""
    listed = 0
    for block_number in range(num_blocks):
        block = locate_block(block_number, levels, ANCHORS)
        anchor_in_level, exists = anchors_of_block(block, HEAD, ANCHORS)
        anchor = block.first_anchor + anchor_in_level
        row = image * sizes.anchors + anchor
        span = span_of(anchor_in_level, block, HEAD.classes, HEAD)
        logits_ptr = ptr_of_image(levels.logits, levels.logits_strides, block, image)
        logits_ptr += span.start + (problem.class_index + 1) * span.stride
        logit = tl.load(logits_ptr, mask=exists, other=-float("inf")).to(tl.float32)
        top = tl.load(anchor_scores.top_ptr + row, mask=exists, other=0.0)
        total = tl.load(anchor_scores.total_ptr + row, mask=exists, other=1.0)
        score = tl.div_rn(exp_difference(logit, top), total)
        is_candidate = score > score_threshold
        if listed + ANCHORS > sizes.capacity:
            # Other threads stored the last keys of the list.
            tl.debug_barrier()
            listed = keep_k_largest(problem.candidates_ptr, listed, sizes.topk, NUMBERED_SCORE_TOP_BIT, 1, FINALISTS)
        candidate = is_candidate.to(tl.int32)
        slot = listed + tl.cumsum(candidate, 0) - candidate
        key = _key_of(score, problem.class_index, anchor, sizes.anchors)
        tl.store(problem.candidates_ptr + slot, key, mask=is_candidate)
        listed += tl.sum(candidate)
    # The list is read by other threads than stored it.
    tl.debug_barrier()
    return listed


@triton.jit
def _rest_kernel(
    unsettled_ptr,  # int32 [B]
    levels,  # Levels, without deltas
    anchor_scores,  # AnchorScores
    boxes_ptr,  # fp32 [B, A, 4] xyxy: decoded boxes
    scratch,  # Scratch
    counters,  # Counters: `kept_ptr` and `done_ptr` hold 0 for unsettled images
    output,  # Output
    num_blocks,
    sizes,  # Sizes
    score_threshold,
    iou_threshold,
    HEAD: tl.constexpr,
    ANCHORS: tl.constexpr,
    FINALISTS: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    class_index, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(unsettled_ptr + image) != 0:
        problem = _class_problem(class_index, image, HEAD.classes - 1, scratch, counters, boxes_ptr, sizes)
        count = _list_all_candidates(
            problem, levels, anchor_scores, image, num_blocks, sizes, score_threshold, HEAD, ANCHORS, FINALISTS
        )
        # All finalists as one tile: several tiles would cost more registers than there are.
        _settle_class(problem, count, sizes, iou_threshold, FINALISTS, FINALISTS, AT_ONCE)
        if _is_last_program(counters.done_ptr + image, HEAD.classes - 1):
            # An atomic that adds nothing: a load might find an older count in the cache.
            kept_count = tl.atomic_add(counters.kept_ptr + image, 0)
            _store_detections(
                problem.kept_keys_ptr, kept_count, tl.cast(-1, tl.int32), problem.boxes_ptr, output, image, sizes,
                FINALISTS, BLOCK, AT_ONCE,
            )  # fmt: skip


# --- the launches -----------------------------------------------------------------------------------------


def _padded(slots: int) -> int:
    """The slots of a list that kernels may pad with keys that are no candidates."""
    return triton.cdiv(slots, CANDIDATES_AT_ONCE) * CANDIDATES_AT_ONCE


def sizes_of(num_anchors: int, num_foreground: int, topk_candidates: int, max_detections: int) -> Sizes:
    """The lengths of the lists."""
    topk = min(topk_candidates, num_anchors)
    capacity = _padded(min(num_anchors, max(CUTOFF_ANCHORS * max_detections, topk + REST_ANCHORS)))
    # Before anything is kept, the slots hold the anchors that the gathering programs note, two in each.
    kept = _padded(max(num_foreground * topk, triton.cdiv(num_anchors, 2)))
    return Sizes(num_anchors, capacity, topk, kept, max_detections)


def launch_postprocess_detections(
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
    levels, head = levels_of(cls_logits, box_deltas)
    batch, num_foreground, device = len(image_sizes), head.classes - 1, anchors.device
    sizes = sizes_of(len(anchors), num_foreground, topk_candidates, max_detections)

    def empty(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    output = Output(
        empty(torch.float32, batch, max_detections, 4),
        empty(torch.float32, batch, max_detections),
        empty(torch.int64, batch, max_detections),
        empty(torch.int32, batch),
        empty(torch.int64, batch, max_detections),
    )
    if batch * sizes.topk * num_foreground == 0:
        boxes, scores, labels, num_detections, anchor_idxs = output
        return boxes.zero_(), scores.zero_(), labels.fill_(-1), num_detections.zero_(), anchor_idxs.fill_(-1)
    assert num_foreground * sizes.anchors <= LAST_NUMBER.value, "a candidate's number fits 31 bits"
    assert head.classes * sizes.capacity <= LAST_NUMBER.value, "so does its place among the lists of an image"
    assert batch * num_foreground <= LAST_NUMBER.value, "so does a class among those of all images"

    anchor_scores = AnchorScores(
        empty(torch.float32, batch, sizes.anchors),
        empty(torch.float32, batch, sizes.anchors),
        empty(torch.int32, batch, sizes.anchors),
    )
    counters = Counters(empty(torch.int32, batch, num_foreground), empty(torch.int32, batch), empty(torch.int32, batch))
    scratch = Scratch(
        empty(torch.int64, batch, num_foreground, sizes.capacity),
        empty(torch.int64, batch, num_foreground, sizes.topk),
        empty(torch.float32, batch, num_foreground, sizes.topk, 4),
        empty(torch.int64, batch, sizes.kept),
    )
    decoded = empty(torch.float32, batch, sizes.anchors, 4)
    cutoff, unsettled = empty(torch.int32, batch), empty(torch.int32, batch)
    iou_threshold = round_down(iou_threshold)

    _launch_rows(levels, head, anchor_scores, counters, batch, score_threshold)
    _launch_gathering(
        levels, head, anchors, image_sizes, weights, anchor_scores, decoded, scratch, counters, cutoff, sizes,
        score_threshold,
    )  # fmt: skip
    _class_kernel[(num_foreground, batch)](
        boxes_ptr=decoded,
        cutoff_ptr=cutoff,
        scratch=scratch,
        counters=counters,
        unsettled_ptr=unsettled,
        output=output,
        sizes=sizes,
        iou_threshold=iou_threshold,
        FINALISTS=SELECT_BLOCK,
        BLOCK=FINAL_BLOCK,
        AT_ONCE=CANDIDATES_AT_ONCE,
        num_warps=4,
        **EXACT,
    )
    _rest_kernel[(num_foreground, batch)](
        unsettled_ptr=unsettled,
        levels=without_deltas(levels),
        anchor_scores=anchor_scores,
        boxes_ptr=decoded,
        scratch=scratch,
        counters=counters,
        output=output,
        num_blocks=num_blocks(levels, REST_ANCHORS),
        sizes=sizes,
        score_threshold=score_threshold,
        iou_threshold=iou_threshold,
        HEAD=head,
        ANCHORS=REST_ANCHORS,
        FINALISTS=SELECT_BLOCK,
        BLOCK=FINAL_BLOCK,
        AT_ONCE=CANDIDATES_AT_ONCE,
        num_warps=4,
        **EXACT,
    )
    return output


def _launch_rows(
    levels: Levels,
    head: HeadShape,
    anchor_scores: AnchorScores,
    counters: Counters,
    batch: int,
    score_threshold: float,
) -> None:
    block_anchors = tile_anchors(head.classes)
    _row_kernel[(num_blocks(levels, block_anchors), batch)](
        levels=without_deltas(levels),
        anchor_scores=anchor_scores,
        counters=counters,
        num_anchors=anchor_scores.top_ptr.shape[1],
        score_threshold=score_threshold,
        HEAD=head,
        BLOCK=block_anchors,
        num_warps=TILE_WARPS,
        **EXACT,
    )


def _launch_gathering(
    levels: Levels,
    head: HeadShape,
    anchors: Tensor,
    image_sizes: Tensor,
    weights: Sequence[float],
    anchor_scores: AnchorScores,
    decoded: Tensor,
    scratch: Scratch,
    counters: Counters,
    cutoff: Tensor,
    sizes: Sizes,
    score_threshold: float,
) -> None:
    batch = len(image_sizes)
    programs = max(1, min(triton.cdiv(sizes.anchors, GATHER_BLOCK // 2), GATHER_PROGRAMS // batch))
    _gather_kernel[(programs, batch)](
        levels=levels,
        anchors_ptr=anchors.contiguous(),
        image_sizes_ptr=image_sizes.contiguous(),
        weights=Weights(*weights),
        anchor_scores=anchor_scores,
        boxes_ptr=decoded,
        found_ptr=scratch.kept_keys_ptr.view(torch.int32),
        found_stride=2 * sizes.kept,
        candidates_ptr=scratch.candidates_ptr,
        listed_ptr=counters.listed_ptr,
        cutoff_ptr=cutoff,
        num_anchors=sizes.anchors,
        capacity=sizes.capacity,
        score_threshold=score_threshold,
        HEAD=head,
        BLOCK=GATHER_BLOCK,
        SELECT_BLOCK=GATHER_SELECT_BLOCK,
        TILE=max(1, tile_anchors(head.classes) // 2),
        num_warps=8,
        **registers(GATHER_REGISTERS),
        **EXACT,
    )
