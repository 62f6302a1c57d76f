"""From the head's outputs to detections: softmax, top-k, decode, clip, NMS per class, top detections per image.

Three launches, whatever the number of images and classes:

1. Scores. A program takes a block of anchors of one image, and writes the softmax of each foreground class above the
   threshold as an integer key, class-major. Reads the logits once, writes and later reads 4 bytes for each.
2. Classes. A program takes one class of one image: selects its k best keys, sorts them by counting, decodes and clips
   their boxes (no other box is decoded), and runs NMS over them, 32 at a time: each is compared with the kept ones
   before it.
3. Images. A program an image selects the best of what all classes kept, sorts them by counting and writes the
   output, padding included.

Scratch memory: 4 bytes a logit, and 36 bytes for each of B * (C - 1) * k candidates.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import decode, iou, load_box, store_box
from ssdcore.kernels.eager import MAX_LOG_SCALE, packed, round_down
from ssdcore.kernels.selection import compact_k_largest, rank_descending
from ssdcore.kernels.triton_multibox import row_blocks
from ssdcore.kernels.triton_nms import resolve_word

# Keys a step of a selection, 8 and 16 a thread at four warps: the sizes at which no GPU spills.
CLASS_SELECT_BLOCK = 1024
IMAGE_SELECT_BLOCK = 2048
ROW_BLOCK = 32  # candidates compared at once: with 32 columns, 8 pairs a thread at four warps


@triton.jit
def _score_kernel(
    logits_ptr,  # [B, A, C]
    keys_ptr,  # int32 [B, C - 1, A]: bits of the score, or -1
    num_anchors,
    num_classes,
    score_threshold,
    BLOCK_ANCHORS: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    category = tl.arange(0, BLOCK_CLASSES)
    mask = (anchor < num_anchors)[:, None] & (category < num_classes)[None, :]
    cell = (image * num_anchors + anchor)[:, None] * num_classes + category[None, :]
    logits = tl.load(logits_ptr + cell, mask=mask, other=-float("inf")).to(tl.float32)
    power = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    score = tl.div_rn(power, tl.broadcast_to(tl.sum(power, axis=1)[:, None], power.shape))
    key = tl.where(score > score_threshold, score.to(tl.int32, bitcast=True), -1)
    row = image * (num_classes - 1) + category - 1
    cell = row[None, :] * num_anchors + anchor[:, None]
    tl.store(keys_ptr + cell, key, mask=mask & (category > 0)[None, :])


@triton.jit
def _class_kernel(
    keys_ptr,  # int32 [B, C - 1, A]
    deltas_ptr,  # [B, A, 4]
    anchors_ptr,  # [A, 4] xyxy
    image_sizes_ptr,  # [B, 2] height, width
    chosen_keys_ptr,  # int32 [B, C - 1, K]: the best keys, by anchor
    chosen_ptr,  # int32 [B, C - 1, K]: their anchors
    sorted_keys_ptr,  # int32 [B, C - 1, K]: out: by descending score, -1 where suppressed or absent
    sorted_boxes_ptr,  # fp32 [B, C - 1, K, 4] xyxy: out
    kept_words_ptr,  # int32 [B, C - 1, words]
    num_anchors,
    topk,
    num_words,
    iou_threshold,
    wx,
    wy,
    ww,
    wh,
    max_log_scale,
    SELECT_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    problem = image * tl.num_programs(0) + tl.program_id(0)
    chosen_keys_ptr += problem * topk
    chosen_ptr += problem * topk
    sorted_keys_ptr += problem * topk
    sorted_boxes_ptr += problem * topk * 4
    kept_words_ptr += problem * num_words
    count = compact_k_largest(
        keys_ptr + problem * num_anchors, num_anchors, topk, chosen_keys_ptr, chosen_ptr, SELECT_BLOCK
    )

    height = tl.load(image_sizes_ptr + image * 2).to(tl.float32)
    width = tl.load(image_sizes_ptr + image * 2 + 1).to(tl.float32)
    for start in range(0, count, ROW_BLOCK):
        index = start + tl.arange(0, ROW_BLOCK)
        mask = index < count
        keys = tl.load(chosen_keys_ptr + index, mask=mask, other=-1)
        anchor = tl.load(chosen_ptr + index, mask=mask, other=0)
        rank = rank_descending(chosen_keys_ptr, keys, index, count, 32)
        dx, dy, dw, dh = load_box(deltas_ptr + image * num_anchors * 4, anchor, mask)
        ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, mask)
        x1, y1, x2, y2 = decode(dx, dy, dw, dh, ax1, ay1, ax2, ay2, wx, wy, ww, wh, max_log_scale)
        store_box(
            sorted_boxes_ptr,
            rank,
            _clip(x1, width),
            _clip(y1, height),
            _clip(x2, width),
            _clip(y2, height),
            mask,
        )
        tl.store(sorted_keys_ptr + rank, keys, mask=mask)
    # NMS reads, from other threads, the sorted boxes and keys.
    tl.debug_barrier()

    bit = tl.arange(0, 32)
    for word in range(tl.cdiv(topk, 32)):
        column = word * 32 + bit
        bx1, by1, bx2, by2 = load_box(sorted_boxes_ptr, column, column < count)
        suppressed = tl.zeros([32], tl.int32)
        for start in range(0, tl.minimum(word * 32, count), ROW_BLOCK):
            row = start + tl.arange(0, ROW_BLOCK)
            earlier = row < word * 32
            ax1, ay1, ax2, ay2 = load_box(sorted_boxes_ptr, row, earlier)
            kept = (tl.load(kept_words_ptr + row // 32, mask=earlier, other=0) >> (row % 32)) & 1
            overlap = iou(
                ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None],
                bx1[None, :], by1[None, :], bx2[None, :], by2[None, :],
            )  # fmt: skip
            over = (overlap > iou_threshold) & (kept != 0)[:, None]
            suppressed = tl.maximum(suppressed, tl.max(over.to(tl.int32), axis=0))
        present = tl.sum((column < count).to(tl.int32) << bit)
        alive = present & ~tl.sum(suppressed << bit)

        row = word * 32 + bit
        ax1, ay1, ax2, ay2 = load_box(sorted_boxes_ptr, row, row < count)
        overlap = iou(
            ax1[:, None], ay1[:, None], ax2[:, None], ay2[:, None],
            bx1[None, :], by1[None, :], bx2[None, :], by2[None, :],
        )  # fmt: skip
        over = (overlap > iou_threshold) & (row[:, None] < column[None, :])
        kept_word = resolve_word(alive, tl.sum(over.to(tl.int32) << bit[None, :], axis=1))
        tl.store(kept_words_ptr + word, kept_word)
        absent = ((kept_word >> bit) & 1) == 0
        tl.store(sorted_keys_ptr + column, tl.full([32], -1, tl.int32), mask=absent & (column < topk))
        # The next word reads, from other threads, which boxes were kept.
        tl.debug_barrier()


@triton.jit
def _clip(x, limit):
    """`x` in 0..limit; NaN stays NaN."""
    x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(x, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _image_kernel(
    sorted_keys_ptr,  # int32 [B, C - 1, K]
    sorted_boxes_ptr,  # fp32 [B, C - 1, K, 4] xyxy
    best_keys_ptr,  # int32 [B, D]
    best_ptr,  # int32 [B, D]: class * K + place
    boxes_ptr,  # fp32 [B, D, 4] xyxy
    scores_ptr,  # fp32 [B, D]
    labels_ptr,  # int64 [B, D]
    count_ptr,  # int32 [B]
    num_candidates,  # (C - 1) * K
    topk,
    max_detections,
    SELECT_BLOCK: tl.constexpr,
    ROW_BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    best_keys_ptr += image * max_detections
    best_ptr += image * max_detections
    count = compact_k_largest(
        sorted_keys_ptr + image * num_candidates,
        num_candidates,
        max_detections,
        best_keys_ptr,
        best_ptr,
        SELECT_BLOCK,
    )
    tl.store(count_ptr + image, count)
    for start in range(0, max_detections, ROW_BLOCK):
        index = start + tl.arange(0, ROW_BLOCK)
        mask = index < count
        keys = tl.load(best_keys_ptr + index, mask=mask, other=-1)
        candidate = tl.load(best_ptr + index, mask=mask, other=0)
        # Candidates stand by class, then by score, then by anchor: the index settles equal scores.
        rank = rank_descending(best_keys_ptr, keys, index, count, 32)
        place = image * max_detections + tl.where(mask, rank, index)
        x1, y1, x2, y2 = load_box(sorted_boxes_ptr + image * num_candidates * 4, candidate, mask)
        inside = index < max_detections
        store_box(boxes_ptr, place, x1, y1, x2, y2, inside)
        tl.store(scores_ptr + place, tl.where(mask, keys.to(tl.float32, bitcast=True), 0.0), mask=inside)
        tl.store(labels_ptr + place, tl.where(mask, candidate // topk + 1, -1).to(tl.int64), mask=inside)


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
    cls_logits, box_deltas = packed(cls_logits), packed(box_deltas)
    batch, num_anchors, num_classes = cls_logits.shape
    device = cls_logits.device
    topk = min(topk_candidates, num_anchors)
    num_foreground = max(num_classes - 1, 0)
    boxes = torch.zeros(batch, max_detections, 4, dtype=torch.float32, device=device)
    scores = torch.zeros(batch, max_detections, dtype=torch.float32, device=device)
    labels = torch.full((batch, max_detections), -1, dtype=torch.int64, device=device)
    count = torch.zeros(batch, dtype=torch.int32, device=device)
    if batch * topk * num_foreground == 0:
        return boxes, scores, labels, count

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    keys = ints(batch, num_foreground, num_anchors)
    block_anchors, block_classes = row_blocks(num_classes)
    _score_kernel[(triton.cdiv(num_anchors, block_anchors), batch)](
        cls_logits.contiguous(),
        keys,
        num_anchors,
        num_classes,
        score_threshold,
        BLOCK_ANCHORS=block_anchors,
        BLOCK_CLASSES=block_classes,
        num_warps=4,
        enable_fp_fusion=False,
    )
    sorted_keys = ints(batch, num_foreground, topk)
    sorted_boxes = torch.empty(batch, num_foreground, topk, 4, dtype=torch.float32, device=device)
    num_words = triton.cdiv(topk, 32)
    _class_kernel[(num_foreground, batch)](
        keys,
        box_deltas.contiguous(),
        anchors.contiguous(),
        image_sizes.contiguous(),
        ints(batch, num_foreground, topk),
        ints(batch, num_foreground, topk),
        sorted_keys,
        sorted_boxes,
        ints(batch, num_foreground, num_words),
        num_anchors,
        topk,
        num_words,
        round_down(iou_threshold),
        *weights,
        MAX_LOG_SCALE,
        SELECT_BLOCK=CLASS_SELECT_BLOCK,
        ROW_BLOCK=ROW_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _image_kernel[(batch,)](
        sorted_keys,
        sorted_boxes,
        ints(batch, max_detections),
        ints(batch, max_detections),
        boxes,
        scores,
        labels,
        count,
        num_foreground * topk,
        topk,
        max_detections,
        SELECT_BLOCK=IMAGE_SELECT_BLOCK,
        ROW_BLOCK=ROW_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return boxes, scores, labels, count
