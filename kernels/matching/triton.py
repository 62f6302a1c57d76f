"""Kernels that assign ground truths to anchors, for a ragged batch at once.

Two launches, whatever the number of images and ground truths:

1. Match. A program takes a block of anchors of one image and walks through the image's ground truths, a few at a time.
   An overlap is one int64 key: the IoU's bits above the complement of an index. So a maximum finds the largest IoU and,
   of equal ones, the lowest index. Every anchor keeps the key of its best ground truth in registers. Every ground truth
   stores the key of its best anchor in this block, at an address of its own. So nothing has to be zeroed first, and the
   order of the programs does not matter.
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

from ssdcore.kernels.device.boxmath import columns, iou_or_zero, load_box, rows
from ssdcore.kernels.device.selection import LAST_NUMBER, complement
from ssdcore.kernels.rules import EXACT

BLOCK_ANCHORS = 256  # anchors per program: 35 programs per image at 8732 anchors, so that a few images fill a GPU
MATCH_TRUTHS = 8  # ground truths compared at once: 16 pairs per thread at four warps
CLAIM_TRUTHS = 32  # ground truths that claim at once
CLAIM_BLOCKS = 64  # blocks of anchors reduced at once: 16 keys per thread


@triton.jit
def _truths_of_image(gt_offsets_ptr, image):
    """The row of the image's first ground truth, and the number of its ground truths."""
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    return first, (tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first).to(tl.int32)


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
    TRUTHS: tl.constexpr,
):
    block, image = tl.program_id(0), tl.program_id(1)
    anchor = block * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    exists = anchor < num_anchors
    first, num_truths = _truths_of_image(gt_offsets_ptr, image)
    anchor_box = load_box(anchors_ptr, anchor, exists)

    best = tl.zeros([BLOCK_ANCHORS], tl.int64)
    for start in range(0, num_truths, TRUTHS):
        gt_index = start + tl.arange(0, TRUTHS)
        # Behind the last ground truth, a box without area is loaded, which overlaps nothing.
        gt_box = load_box(gt_boxes_ptr, first + gt_index, gt_index < num_truths)
        overlap = iou_or_zero(rows(gt_box), columns(anchor_box))
        overlaps = overlap > 0
        high_word = overlap.to(tl.int32, bitcast=True).to(tl.int64) << 32
        by_truth = tl.where(overlaps, high_word | complement(gt_index)[:, None], 0)
        best = tl.maximum(best, tl.max(by_truth, axis=0))
        by_anchor = tl.where(overlaps, high_word | complement(anchor)[None, :], 0)
        claim_offset = (first + gt_index) * tl.num_programs(0) + block
        tl.store(claims_ptr + claim_offset, tl.max(by_anchor, axis=1), mask=gt_index < num_truths)
    best_iou = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    # `best > 0`, because a threshold may round to 0, which every pair would reach.
    matched = tl.where((best > 0) & (best_iou >= iou_threshold), complement(best & LAST_NUMBER), -1)
    tl.store(matched_ptr + image.to(tl.int64) * num_anchors + anchor, matched, mask=exists)


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
        TRUTHS=MATCH_TRUTHS,
        num_warps=4,
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
