"""Greedy NMS of a batch of images, aware of classes.

Two launches after a sort by score:

1. Mask. A program takes 32 boxes (one word of bits) and a block of the boxes before them, and packs into one int32
   for each of the latter which of the 32 it would suppress: IoU above the threshold, same class, lower score.
2. Resolve. A program an image walks the words in order. A word's boxes are suppressed by the kept ones before it, an
   OR over the mask's row; among the 32 themselves the answer is the fixpoint of "kept iff no kept better one
   suppresses it", which greedy NMS is the only one of. Kept boxes go straight to their place in the output.

Scratch memory: B * N * N / 8 bytes of mask, of which the half that concerns earlier boxes is written and read.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import iou, load_box, load_one_box
from ssdcore.kernels.eager import round_down, sort_key

WORD = 32  # boxes a word of the mask
MASK_BLOCK = 1024  # boxes a program of the mask at most: eight a thread at four warps, a word of each in a register
RESOLVE_BLOCK = 256  # boxes a step of the resolve: their words, taken apart into bits, are 64 registers a thread


@triton.jit
def _or_of_all(words):
    """The bits set in any of `words`. (`tl.reduce` with an operator of our own takes the interpreter forever.)"""
    bit = tl.arange(0, 32)
    return tl.sum(tl.max((words[:, None] >> bit[None, :]) & 1, axis=0) << bit)


@triton.jit
def resolve_word(alive, suppresses):
    """Greedy NMS among 32 boxes: which bits of `alive` are kept, box i suppressing the bits of `suppresses[i]`."""
    bit = tl.arange(0, 32)
    kept = alive
    before = alive ^ 1
    # Box i is settled after i + 1 rounds at the latest; a few do for real boxes.
    while kept != before:
        before = kept
        kept = alive & ~_or_of_all(tl.where(((kept >> bit) & 1) != 0, suppresses, 0))
    return kept


@triton.jit
def _suppression_kernel(
    boxes_ptr,  # [B, N, 4] xyxy, by descending score
    classes_ptr,  # [B, N], or anything if not BY_CLASS
    candidates_ptr,  # int64 [B]: how many of the image's boxes take part
    mask_ptr,  # int32 [B, words, words * 32]: at [w, i], the boxes of word w that box i would suppress
    num_boxes,
    num_words,
    iou_threshold,
    BY_CLASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    word, image = tl.program_id(0), tl.program_id(2).to(tl.int64)
    candidates = tl.load(candidates_ptr + image).to(tl.int32)
    first = tl.program_id(1) * BLOCK
    # A box suppresses only those after it: of a word's row the part up to the word itself is used.
    if (word * 32 < candidates) & (first < word * 32 + 32):
        boxes_ptr += image * num_boxes * 4
        classes_ptr += image * num_boxes
        box = first + tl.arange(0, BLOCK)
        mask = box < candidates
        ax1, ay1, ax2, ay2 = load_box(boxes_ptr, box, mask)
        if BY_CLASS:
            box_class = tl.load(classes_ptr + box, mask=mask, other=0)
        suppresses = tl.zeros([BLOCK], tl.int32)
        # Bit by bit with a word a lane: packing a tile of comparisons would need exchange between lanes.
        for bit in range(32):
            other = word * 32 + bit
            bx1, by1, bx2, by2 = load_one_box(boxes_ptr, other, other < candidates)
            over = (iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2) > iou_threshold) & (box < other)
            if BY_CLASS:
                over &= box_class == tl.load(classes_ptr + other, mask=other < candidates, other=0)
            suppresses |= over.to(tl.int32) << bit
        row = image * num_words + word
        tl.store(mask_ptr + row * num_words * 32 + box, suppresses, mask=box < num_words * 32)


@triton.jit
def _resolve_kernel(
    mask_ptr,  # int32 [B, words, words * 32]
    order_ptr,  # int64 [B, N]: the box at each place of the sorted ones
    candidates_ptr,  # int64 [B]
    kept_words_ptr,  # int32 [B, words]
    kept_ptr,  # int64 [B, max_output], -1 at first
    num_kept_ptr,  # int32 [B]
    num_boxes,
    num_words,
    max_output,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    candidates = tl.load(candidates_ptr + image).to(tl.int32)
    mask_ptr += image * num_words * num_words * 32
    order_ptr += image * num_boxes
    kept_words_ptr += image * num_words
    kept_ptr += image * max_output
    bit = tl.arange(0, 32)
    num_kept = 0
    word = 0
    while (word * 32 < candidates) & (num_kept < max_output):
        row_ptr = mask_ptr + tl.cast(word, tl.int64) * num_words * 32
        suppressed = tl.zeros([BLOCK], tl.int32)
        for start in range(0, word * 32, BLOCK):
            box = start + tl.arange(0, BLOCK)
            earlier = box < word * 32
            kept = (tl.load(kept_words_ptr + box // 32, mask=earlier, other=0) >> (box % 32)) & 1
            suppressed |= tl.where(kept != 0, tl.load(row_ptr + box, mask=earlier, other=0), 0)
        box = word * 32 + bit
        present = tl.sum((box < candidates).to(tl.int32) << bit)
        alive = present & ~_or_of_all(suppressed)
        kept_word = resolve_word(alive, tl.load(row_ptr + box))
        tl.store(kept_words_ptr + word, kept_word)
        # The words after this one read, from other threads, what was just written.
        tl.debug_barrier()
        kept = (kept_word >> bit) & 1
        slot = num_kept + tl.cumsum(kept, 0) - kept
        index = tl.load(order_ptr + box, mask=kept != 0, other=0)
        tl.store(kept_ptr + slot, index, mask=(kept != 0) & (slot < max_output))
        num_kept += tl.sum(kept)
        word += 1
    tl.store(num_kept_ptr + image, tl.minimum(num_kept, max_output))


def batched_nms_padded_triton(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    batch, num_boxes = scores.shape
    device = boxes.device
    kept = torch.full((batch, max_output), -1, dtype=torch.int64, device=device)
    num_kept = torch.zeros(batch, dtype=torch.int32, device=device)
    if kept.numel() == 0 or num_boxes == 0:
        return kept, num_kept

    key = sort_key(scores)
    if score_threshold is None:
        candidates = torch.full((batch,), num_boxes, device=device)
    else:
        candidate = key > score_threshold
        candidates = candidate.sum(dim=1)
        key = key.masked_fill(~candidate, -torch.inf)  # behind every candidate, which -inf cannot be
    order = key.argsort(dim=1, descending=True, stable=True)
    boxes = boxes.take_along_dim(order[..., None], dim=1)
    classes = boxes if idxs is None else idxs.take_along_dim(order, dim=1)

    num_words = triton.cdiv(num_boxes, WORD)
    block = min(MASK_BLOCK, max(128, triton.next_power_of_2(num_boxes)))
    mask = torch.empty(batch, num_words, num_words * WORD, dtype=torch.int32, device=device)
    _suppression_kernel[(num_words, triton.cdiv(num_boxes, block), batch)](
        boxes,
        classes,
        candidates,
        mask,
        num_boxes,
        num_words,
        round_down(iou_threshold),
        BY_CLASS=idxs is not None,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
    kept_words = torch.empty(batch, num_words, dtype=torch.int32, device=device)
    _resolve_kernel[(batch,)](
        mask,
        order,
        candidates,
        kept_words,
        kept,
        num_kept,
        num_boxes,
        num_words,
        max_output,
        BLOCK=RESOLVE_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return kept, num_kept


def nms_triton(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    classes = None if idxs is None else idxs[None]
    kept, num_kept = batched_nms_padded_triton(boxes[None], scores[None], classes, iou_threshold, len(boxes), None)
    # The length of the result is a fact of its values: here, and only here, the host waits for the GPU.
    return kept[0, : int(num_kept)].clone()
