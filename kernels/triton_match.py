"""Assign ground truths to anchors, for a ragged batch at once.

Two launches, whatever the number of images and ground truths:

1. A program takes a block of anchors of one image and walks the image's ground truths. Every anchor keeps its best
   in registers. Every ground truth keeps the anchor it overlaps most as one int64 key, the IoU's bits above the
   complement of the anchor's index, raised by `atomic_max`: a maximum of unique integers does not depend on the
   order in which programs come.
2. The claims, in the order of the ground truths, override the matches of the anchors they fall on.

Reads the anchors once an image (140 KB at A = 8732: the cache), writes [B, A] int64 twice and reads it once; the
only scratch memory is the 8 bytes a ground truth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import iou, load_box, load_one_box

BLOCK_ANCHORS = 256  # anchors a program: 35 programs an image at 8732 anchors, so that few images fill a GPU
NO_ANCHOR = 0x7FFFFFFF  # minus the anchor's index in a key's low word: of equal IoUs the lowest anchor wins


@triton.jit
def _match_kernel(
    gt_boxes_ptr,  # [T, 4] xyxy
    gt_offsets_ptr,  # [B + 1]
    anchors_ptr,  # [A, 4] xyxy
    matched_ptr,  # int64 [B, A]
    claims_ptr,  # int64 [T], zero at first
    num_anchors,
    iou_threshold,
    NO_ANCHOR: tl.constexpr,
    BLOCK_ANCHORS: tl.constexpr,
):
    image = tl.program_id(1)
    anchor = tl.program_id(0) * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    mask = anchor < num_anchors
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    count = (tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first).to(tl.int32)
    ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, mask)

    best_iou = tl.zeros([BLOCK_ANCHORS], tl.float32)
    matched = tl.full([BLOCK_ANCHORS], -1, tl.int32)
    for slot in range(count):
        x1, y1, x2, y2 = load_one_box(gt_boxes_ptr, first + slot, True)
        overlap = iou(x1, y1, x2, y2, ax1, ay1, ax2, ay2)
        overlap = tl.where(overlap > 0, overlap, 0.0)  # a NaN overlaps nothing
        better = overlap > best_iou
        best_iou = tl.where(better, overlap, best_iou)
        matched = tl.where(better, slot, matched)
        keys = (overlap.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (NO_ANCHOR - anchor).to(tl.int64)
        claim = tl.max(tl.where(overlap > 0, keys, 0))
        # The maximum over all programs of the image; relaxed, for only the next launch reads it.
        tl.atomic_max(claims_ptr + first + slot, claim, mask=claim > 0, sem="relaxed")
    matched = tl.where(best_iou >= iou_threshold, matched, -1)
    row = image.to(tl.int64) * num_anchors + anchor
    tl.store(matched_ptr + row, matched.to(tl.int64), mask=mask)


@triton.jit
def _claim_kernel(
    gt_offsets_ptr,  # [B + 1]
    claims_ptr,  # int64 [T]
    matched_ptr,  # int64 [B, A]
    num_anchors,
    NO_ANCHOR: tl.constexpr,
    BLOCK_ANCHORS: tl.constexpr,
):
    image = tl.program_id(1)
    anchor = tl.program_id(0) * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    mask = anchor < num_anchors
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    count = (tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first).to(tl.int32)
    row = image.to(tl.int64) * num_anchors + anchor
    matched = tl.load(matched_ptr + row, mask=mask)
    for slot in range(count):
        claim = tl.load(claims_ptr + first + slot)
        claimed = NO_ANCHOR - (claim & 0xFFFFFFFF).to(tl.int32)  # no claim: NO_ANCHOR itself
        matched = tl.where(anchor == claimed, slot, matched)  # the last claim stands
    tl.store(matched_ptr + row, matched, mask=mask)


def match_anchors_triton(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    batch, num_anchors = len(gt_offsets) - 1, len(anchors)
    matched = torch.empty(batch, num_anchors, dtype=torch.int64, device=anchors.device)
    if matched.numel() == 0:
        return matched
    claims = torch.zeros(len(gt_boxes), dtype=torch.int64, device=anchors.device)
    gt_offsets = gt_offsets.contiguous()
    grid = (triton.cdiv(num_anchors, BLOCK_ANCHORS), batch)
    _match_kernel[grid](
        gt_boxes.contiguous(),
        gt_offsets,
        anchors.contiguous(),
        matched,
        claims,
        num_anchors,
        iou_threshold,
        NO_ANCHOR=NO_ANCHOR,
        BLOCK_ANCHORS=BLOCK_ANCHORS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _claim_kernel[grid](
        gt_offsets,
        claims,
        matched,
        num_anchors,
        NO_ANCHOR=NO_ANCHOR,
        BLOCK_ANCHORS=BLOCK_ANCHORS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return matched
