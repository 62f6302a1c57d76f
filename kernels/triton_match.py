"""Assign ground truths to anchors, for a ragged batch at once.

Two launches, whatever the number of images and ground truths:

1. Match. A program takes a block of anchors of one image and walks the image's ground truths, some at a time. An
   overlap is one int64 key, the IoU's bits above the complement of an index, so that a maximum finds the largest and,
   of equal ones, the lowest index. Every anchor keeps its best ground truth's key in registers; every ground truth
   leaves its best anchor of the block in memory, a cell of its own, so that no cell is zeroed before and no order
   matters.
2. Claim. A program an image reduces its ground truths' cells over the blocks and lets the claims override the matches
   of the anchors they fall on, in the order of the ground truths.

Reads the anchors once an image (140 KB at A = 8732: the cache) and writes [B, A] int64 once. Scratch memory: 8 bytes
for each ground truth and block of anchors (280 bytes a ground truth at A = 8732), written and read once. No program
waits for another: with a handful of truths an image, a launch is expected to take its own time and a few trips to
memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import iou_or_zero, load_box

BLOCK_ANCHORS = 256  # anchors a program: 35 programs an image at 8732 anchors, so that few images fill a GPU
BLOCK_TRUTHS = 8  # ground truths compared at once: 16 pairs a thread at four warps
CLAIM_TRUTHS = 32  # ground truths that claim at once, and
CLAIM_BLOCKS = 64  # blocks of anchors reduced at once: 16 keys a thread
LOWEST = 0x7FFFFFFF  # minus an index in a key's low word: of equal IoUs the lowest index wins


@triton.jit
def _match_kernel(
    gt_boxes_ptr,  # [T, 4] xyxy
    gt_offsets_ptr,  # [B + 1]
    anchors_ptr,  # [A, 4] xyxy
    matched_ptr,  # int64 [B, A]
    claims_ptr,  # int64 [T, blocks]
    num_anchors,
    iou_threshold,
    LOWEST: tl.constexpr,
    BLOCK_ANCHORS: tl.constexpr,
    BLOCK_TRUTHS: tl.constexpr,
):
    image, block = tl.program_id(1), tl.program_id(0)
    anchor = block * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    mask = anchor < num_anchors
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    count = (tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first).to(tl.int32)
    ax1, ay1, ax2, ay2 = load_box(anchors_ptr, anchor, mask)

    best = tl.zeros([BLOCK_ANCHORS], tl.int64)
    for begin in range(0, count, BLOCK_TRUTHS):
        slot = begin + tl.arange(0, BLOCK_TRUTHS)
        # What stands for a box outside has no area, and overlaps nothing.
        x1, y1, x2, y2 = load_box(gt_boxes_ptr, first + slot, slot < count)
        overlap = iou_or_zero(
            x1[:, None], y1[:, None], x2[:, None], y2[:, None],
            ax1[None, :], ay1[None, :], ax2[None, :], ay2[None, :],
        )  # fmt: skip
        high = overlap.to(tl.int32, bitcast=True).to(tl.int64) << 32
        some = overlap > 0
        best = tl.maximum(best, tl.max(tl.where(some, high | (LOWEST - slot)[:, None], 0), axis=0))
        claim = tl.max(tl.where(some, high | (LOWEST - anchor)[None, :], 0), axis=1)
        tl.store(claims_ptr + (first + slot) * tl.num_programs(0) + block, claim, mask=slot < count)
    best_iou = (best >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    # A threshold may round to 0, which no overlap reaches.
    matched = tl.where((best > 0) & (best_iou >= iou_threshold), LOWEST - (best & LOWEST), -1)
    tl.store(matched_ptr + image.to(tl.int64) * num_anchors + anchor, matched, mask=mask)


@triton.jit
def _claim_kernel(
    gt_offsets_ptr,  # [B + 1]
    claims_ptr,  # int64 [T, blocks]
    matched_ptr,  # int64 [B, A]
    num_anchors,
    num_blocks,
    LOWEST: tl.constexpr,
    CLAIM_TRUTHS: tl.constexpr,
    CLAIM_BLOCKS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    first = tl.load(gt_offsets_ptr + image).to(tl.int64)
    count = (tl.load(gt_offsets_ptr + image + 1).to(tl.int64) - first).to(tl.int32)
    for begin in range(0, count, CLAIM_TRUTHS):
        slot = begin + tl.arange(0, CLAIM_TRUTHS)
        claim = tl.zeros([CLAIM_TRUTHS], tl.int64)
        for first_block in range(0, num_blocks, CLAIM_BLOCKS):
            block = first_block + tl.arange(0, CLAIM_BLOCKS)
            cell = (first + slot)[:, None] * num_blocks + block[None, :]
            mask = (slot < count)[:, None] & (block < num_blocks)[None, :]
            claim = tl.maximum(claim, tl.max(tl.load(claims_ptr + cell, mask=mask, other=0), axis=1))
        anchor = (LOWEST - (claim & LOWEST)).to(tl.int32)  # no claim: LOWEST itself, which is no anchor
        # Of several claims on an anchor the last stands: among these it alone is stored,
        later = (anchor[:, None] == anchor[None, :]) & (slot[:, None] < slot[None, :])
        stands = (claim > 0) & (tl.max(later.to(tl.int32), axis=1) == 0)
        tl.store(matched_ptr + image * num_anchors + anchor, slot.to(tl.int64), mask=stands)
        # and after those before, which are other threads' stores.
        tl.debug_barrier()


def match_anchors_triton(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    batch, num_anchors = len(gt_offsets) - 1, len(anchors)
    matched = torch.empty(batch, num_anchors, dtype=torch.int64, device=anchors.device)
    if matched.numel() == 0:
        return matched
    num_blocks = triton.cdiv(num_anchors, BLOCK_ANCHORS)
    claims = torch.empty(len(gt_boxes), num_blocks, dtype=torch.int64, device=anchors.device)
    gt_offsets = gt_offsets.contiguous()
    _match_kernel[(num_blocks, batch)](
        gt_boxes.contiguous(),
        gt_offsets,
        anchors.contiguous(),
        matched,
        claims,
        num_anchors,
        iou_threshold,
        LOWEST=LOWEST,
        BLOCK_ANCHORS=BLOCK_ANCHORS,
        BLOCK_TRUTHS=BLOCK_TRUTHS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    _claim_kernel[(batch,)](
        gt_offsets,
        claims,
        matched,
        num_anchors,
        num_blocks,
        LOWEST=LOWEST,
        CLAIM_TRUTHS=CLAIM_TRUTHS,
        CLAIM_BLOCKS=CLAIM_BLOCKS,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return matched
