"""Kernels that assign ground truths to anchors, for a ragged batch at once.

Two launches, whatever the number of images and ground truths:

1. Match. A program takes a block of anchors of one image and walks through the image's ground truths. It skips those
   above or below all of its anchors: consecutive anchors lie in a few rows of the image. Every anchor keeps its best
   ground truth in registers. Each warp finds the best anchor of a ground truth among the warp's own anchors, which
   needs no exchange with other warps, and keeps it in a register until LANES ground truths are done. Then the warps
   compare, and every ground truth stores a key of its best anchor in this block, at an address of its own. So nothing
   has to be zeroed first, and the order of the programs does not matter. A key is the IoU's bits above the complement
   of the anchor's index. So a maximum finds the largest IoU and, of equal ones, the lowest index.
2. Claim. A program per image reduces the keys of its ground truths over the blocks. Then the ground truths, in order,
   claim their best anchors and override what these had matched.

The anchors are read once per image (140 KB at A = 8732, from the cache), and [B, A] int64 is written once. Scratch
memory: 8 bytes for each ground truth and block of anchors (280 bytes per ground truth at A = 8732), written and read
once. No program waits for another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.device.boxmath import Box, iou_or_zero, load_box, load_box_by_coordinate
from ssdcore.kernels.device.constant import Constant
from ssdcore.kernels.device.selection import LAST_NUMBER, complement
from ssdcore.kernels.rules import EXACT

BLOCK_ANCHORS = 256  # anchors per program: 35 programs per image at 8732 anchors, so that a few images fill a GPU
MATCH_WARPS = 4  # two anchors per thread; with two warps, many ground truths of one image take a third longer
LANES = Constant(32)  # threads of a warp, and ground truths whose claims a warp keeps
CLAIM_TRUTHS = 32  # ground truths that claim at once
CLAIM_BLOCKS = 64  # blocks of anchors reduced at once: 16 keys per thread


@triton.jit
def _truths_of_image(gt_offsets_ptr, image):
    """The row of the image's first ground truth, and the number of its ground truths."""
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    return first, (tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first).to(tl.int32)


@triton.jit
def _by_warp(numbers, WARPS: tl.constexpr):
    """Numbers [N] as [N / (WARPS * LANES), WARPS, LANES], which is how threads hold them anyway."""
    return tl.reshape(numbers, (numbers.shape[0] // (WARPS * LANES), WARPS, LANES))


@triton.jit
def _truths_between(gt_boxes_ptr, first, num_truths, top, bottom):
    """Which of the LANES ground truths from `first` on may overlap boxes between `top` and `bottom`: one bit each."""
    slot = tl.arange(0, LANES)
    corner = gt_boxes_ptr + (first + tl.minimum(slot, num_truths - 1)) * 4
    above = tl.load(corner + 3).to(tl.float32) <= top
    below = tl.load(corner + 1).to(tl.float32) >= bottom
    # A NaN is neither above nor below.
    return tl.sum(((slot < num_truths) & ~(above | below)).to(tl.int32) << slot)


@triton.jit
def _best_of_warp(overlap, anchor):
    """The bits of the largest overlap [WARPS], 0 if nothing overlaps, and the lowest anchor that has it."""
    bits = tl.where(overlap > 0, overlap.to(tl.int32, bitcast=True), 0)  # a NaN counts as 0
    largest = tl.max(tl.max(bits, axis=0), axis=1)
    candidate = tl.where(bits == largest[None, :, None], anchor, LAST_NUMBER)
    return largest, tl.min(tl.min(candidate, axis=0), axis=1)


@triton.jit
def _match_kernel(
    gt_boxes_ptr,  # [T, 4] xyxy
    gt_offsets_ptr,  # [B + 1]
    anchors_ptr,  # [A, 4] xyxy
    matched_ptr,  # int64 [B, A]
    claims_ptr,  # int64 [T, blocks]
    num_anchors,
    iou_threshold,
    BLOCK_ANCHORS: tl.constexpr,
    WARPS: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1)
    anchor = block * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    first, num_truths = _truths_of_image(gt_offsets_ptr, image)
    box = load_box(anchors_ptr, anchor, anchor < num_anchors)
    top, bottom = tl.min(box.y1), tl.max(box.y2)
    anchor = _by_warp(anchor, WARPS)
    box = Box(_by_warp(box.x1, WARPS), _by_warp(box.y1, WARPS), _by_warp(box.x2, WARPS), _by_warp(box.y2, WARPS))

    best_iou = tl.zeros(anchor.shape, tl.float32)
    best_truth = tl.zeros(anchor.shape, tl.int32)
    slot = tl.arange(0, LANES)
    for start in range(0, num_truths, LANES):
        num_left = num_truths - start
        between = _truths_between(gt_boxes_ptr, first + start, num_left, top, bottom)
        # The claims of this step, one per thread of each warp.
        claim_bits = tl.zeros([WARPS, LANES], tl.int32)
        claimed = tl.zeros([WARPS, LANES], tl.int32)
        for index in range(tl.minimum(num_left, LANES)):
            if (between >> index) & 1 != 0:
                overlap = iou_or_zero(load_box_by_coordinate(gt_boxes_ptr, first + start + index), box)
                better = overlap > best_iou  # a NaN is not
                best_iou = tl.where(better, overlap, best_iou)
                best_truth = tl.where(better, start + index, best_truth)
                largest, lowest = _best_of_warp(overlap, anchor)
                is_own = (slot == index)[None, :]
                claim_bits = tl.where(is_own, largest[:, None], claim_bits)
                claimed = tl.where(is_own, lowest[:, None], claimed)
        key = (claim_bits.to(tl.int64) << 32) | complement(claimed).to(tl.int64)
        claim = tl.max(tl.where(claim_bits > 0, key, 0), axis=0)
        claim_offset = (first + start + slot) * tl.num_programs(0) + block
        tl.store(claims_ptr + claim_offset, claim, mask=slot < num_left)
    # `best_iou > 0`, because a threshold may round to 0, which every pair would reach.
    matched = tl.where((best_iou > 0) & (best_iou >= iou_threshold), best_truth, -1).to(tl.int64)
    tl.store(matched_ptr + image.to(tl.int64) * num_anchors + anchor, matched, mask=anchor < num_anchors)


@triton.jit
def _claim_kernel(
    gt_offsets_ptr,  # [B + 1]
    claims_ptr,  # int64 [T, num_blocks]
    matched_ptr,  # int64 [B, A]
    num_anchors,
    num_blocks,
    TRUTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first, num_truths = _truths_of_image(gt_offsets_ptr, image)
    for start in range(0, num_truths, TRUTHS):
        gt_index = start + tl.arange(0, TRUTHS)
        claim = tl.zeros([TRUTHS], tl.int64)
        for first_block in range(0, num_blocks, BLOCKS):
            block = first_block + tl.arange(0, BLOCKS)
            offset = (first + gt_index)[:, None] * num_blocks + block[None, :]
            mask = (gt_index < num_truths)[:, None] & (block < num_blocks)[None, :]
            claim = tl.maximum(claim, tl.max(tl.load(claims_ptr + offset, mask=mask, other=0), axis=1))
        # Without a claim this is LAST_NUMBER itself, which is no anchor.
        anchor = complement(claim & LAST_NUMBER).to(tl.int32)
        # The last of several claims on one anchor wins. Of the claims of this step, only the winning one is stored.
        claimed_later = (anchor[:, None] == anchor[None, :]) & (gt_index[:, None] < gt_index[None, :])
        wins = (claim > 0) & (tl.max(claimed_later.to(tl.int32), axis=1) == 0)
        tl.store(matched_ptr + image * num_anchors + anchor, gt_index.to(tl.int64), mask=wins)
        # Later claims override these, so all threads must have stored these first.
        tl.debug_barrier()


def launch_match_anchors(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    batch, num_anchors = len(gt_offsets) - 1, len(anchors)
    matched = torch.empty(batch, num_anchors, dtype=torch.int64, device=anchors.device)
    if matched.numel() == 0:
        return matched
    num_blocks = triton.cdiv(num_anchors, BLOCK_ANCHORS)
    claims = torch.empty(len(gt_boxes), num_blocks, dtype=torch.int64, device=anchors.device)
    gt_offsets = gt_offsets.contiguous()
    _match_kernel[(num_blocks, batch)](
        gt_boxes_ptr=gt_boxes.contiguous(),
        gt_offsets_ptr=gt_offsets,
        anchors_ptr=anchors.contiguous(),
        matched_ptr=matched,
        claims_ptr=claims,
        num_anchors=num_anchors,
        iou_threshold=iou_threshold,
        BLOCK_ANCHORS=BLOCK_ANCHORS,
        WARPS=MATCH_WARPS,
        num_warps=MATCH_WARPS,
        **EXACT,
    )
    _claim_kernel[(batch,)](
        gt_offsets_ptr=gt_offsets,
        claims_ptr=claims,
        matched_ptr=matched,
        num_anchors=num_anchors,
        num_blocks=num_blocks,
        TRUTHS=CLAIM_TRUTHS,
        BLOCKS=CLAIM_BLOCKS,
        num_warps=4,
        **EXACT,
    )
    return matched
