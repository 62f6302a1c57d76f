"""Greedy NMS of a batch of images, aware of classes.

Boxes are sorted by class, then by score; the rows of a class are a chain, in which a row hangs on those before it.
Then two launches and a fill:

1. Settle. A program owns a block of 128 consecutive rows. It compares them with each other and, where a chain comes in
   from the block before, with that block's rows, into words of bits: for every row, which of them would suppress it.
   Then it follows the chain: as each earlier block publishes what it kept, it compares its rows with these boxes. Of
   the block just before it only has to learn the bits. What is kept among its own rows is the fixpoint of "kept iff
   no kept better one suppresses it", which greedy NMS is the only one of. It publishes the bits, for the block after
   it, and then the boxes, for all later ones.
2. Collect. A program an image walks the rows by score and writes the first `max_output` kept.

No two classes are compared, and a block into which no chain comes waits for nobody. In a chain each block waits for the
one before it, from bits to bits: an atomic's way back, a few rounds of the fixpoint of some 60 instructions and two
exchanges through shared memory, and an atomic's way out. That is expected to take 1 to 1.5 µs, and a chain of N boxes
N / 128 times as long; all other comparisons are made meanwhile.

Reads each row twice; a kept box is read by the later blocks of its chain, from the cache. Scratch memory beside the
sort's: 34 bytes a box (a sorted copy of the box, the list of kept ones, the bits and a flag).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import iou_or_zero, load_box, load_one_box, store_box
from ssdcore.kernels.eager import round_down, sort_key

BLOCK = 128  # rows a program: one a thread at four warps, so that suppression and its bits stay in the thread
LIST_BLOCK = 8  # kept boxes compared at once: eight pairs a thread
COLLECT_BLOCK = 4096  # rows a step of the collection: 8 a thread at sixteen warps, three steps at 8732
PUBLISHED = 1 << 32  # marks a word of bits that has been written: zero is a word as well


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
def _suppressors(
    boxes_ptr, classes_ptr, begin, num_boxes, x1, y1, x2, y2, own_class, iou_threshold,
    BY_CLASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Which of the BLOCK rows from `begin` on overlap each own row: int32 [BLOCK / 32, BLOCK], a bit a row."""
    word = tl.arange(0, BLOCK // 32)
    words = tl.zeros([BLOCK // 32, BLOCK], tl.int32)
    # Bit by bit with a word a register: packing a tile of comparisons would need exchange between threads.
    for bit in range(32):
        other = tl.minimum(begin + word * 32 + bit, num_boxes - 1)  # what stands for a row outside is never kept
        bx1, by1, bx2, by2 = load_one_box(boxes_ptr, other, True)
        over = iou_threshold < iou_or_zero(
            x1[None, :], y1[None, :], x2[None, :], y2[None, :],
            bx1[:, None], by1[:, None], bx2[:, None], by2[:, None],
        )  # fmt: skip
        if BY_CLASS:
            over &= tl.load(classes_ptr + other)[:, None] == own_class[None, :]
        words |= over.to(tl.int32) << bit
    return words


@triton.jit
def _first_of_class(classes_ptr, own_class, row):
    """The first row of `own_class`, which `row` is of."""
    low = 0
    high = row
    while low < high:
        middle = (low + high) // 2
        before = tl.load(classes_ptr + middle) < own_class
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _pack(flags, BLOCK: tl.constexpr):
    """Flags [BLOCK] as words of bits, int32 [BLOCK / 32]."""
    word = tl.arange(0, BLOCK // 32)
    column = tl.arange(0, BLOCK)
    # Every thread in every word's sum, not 32 threads a word: so all threads know all words after one exchange.
    bits = flags.to(tl.int32) << (column % 32)
    return tl.sum(tl.where((column // 32)[None, :] == word[:, None], bits[None, :], 0), axis=1)


@triton.jit
def _met(suppressors, kept):
    """Which columns of words `suppressors` [W, BLOCK] have a bit of `kept` [W] set."""
    return tl.max(((suppressors & kept[:, None]) != 0).to(tl.int32), axis=0) != 0


# These numbers differ from call to call: to Triton an argument of 1, or a multiple of 16, is another kernel.
@triton.jit(do_not_specialize=["num_boxes", "max_output"])
def _settle_kernel(
    boxes_ptr,  # [B, N, 4] xyxy, by class, then by descending score
    classes_ptr,  # [B, N], or anything if not BY_CLASS
    places_ptr,  # int64 [B, N]: each row's place by score alone, or anything if not BY_CLASS
    keys_ptr,  # [B, N]: scores by place, -inf of what is no candidate; or anything if not BY_SCORE
    ticket_ptr,  # int64 [1], zero at first
    words_ptr,  # int64 [B, blocks, BLOCK / 32], zero at first: which rows a block kept, and PUBLISHED
    counts_ptr,  # int64 [B, blocks], zero at first: how many of its last class a block kept, and one
    list_ptr,  # fp32 [B, blocks, BLOCK, 4]: these boxes
    kept_ptr,  # bool [B, N], by place
    batch,
    num_boxes,
    num_blocks,
    max_output,
    iou_threshold,
    BY_CLASS: tl.constexpr,
    BY_SCORE: tl.constexpr,
    PUBLISHED: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    # Tickets say who does what, and not program_id: a block waits for earlier tickets only, whose programs run already.
    ticket = tl.atomic_add(ticket_ptr, 1, sem="relaxed")
    image = ticket % batch  # int64, and so are the rows before it
    block = (ticket // batch).to(tl.int32)
    boxes_ptr += image * num_boxes * 4
    classes_ptr += image * num_boxes
    places_ptr += image * num_boxes
    keys_ptr += image * num_boxes
    kept_ptr += image * num_boxes
    first_block = image * num_blocks  # of the image

    begin = block * BLOCK
    row = begin + tl.arange(0, BLOCK)
    inside = row < num_boxes
    word = tl.arange(0, BLOCK // 32)
    x1, y1, x2, y2 = load_box(boxes_ptr, row, inside)
    own_class = row
    of_first = inside
    # Does a chain come in? (A single block is a constant to Triton, which then leaves out all the waiting.)
    goes_on = (block > 0) & (num_blocks > 1)
    if BY_CLASS:
        own_class = tl.load(classes_ptr + row, mask=inside, other=0)
        first_class = tl.load(classes_ptr + begin)
        of_first &= own_class == first_class
        goes_on &= tl.load(classes_ptr + tl.maximum(begin, 1) - 1) == first_class
    alive = inside
    if BY_SCORE:
        place, first_place = row, begin
        if BY_CLASS:
            place, first_place = tl.load(places_ptr + row, mask=inside, other=0), tl.load(places_ptr + begin)
        alive &= tl.load(keys_ptr + place, mask=inside, other=-float("inf")) > -float("inf")
        # Of a class the best come first: if this is no candidate, then the others are none either.
        goes_on &= tl.load(keys_ptr + first_place) > -float("inf")
    within = _suppressors(
        boxes_ptr, classes_ptr, begin, num_boxes, x1, y1, x2, y2, own_class, iou_threshold, BY_CLASS, BLOCK
    )
    # Only better rows suppress: of each word as many bits as there are.
    better = (row - begin)[None, :] - word[:, None] * 32
    within &= tl.where(better < 32, (1 << tl.minimum(tl.maximum(better, 0), 31)) - 1, -1)

    if goes_on:
        from_previous = _suppressors(
            boxes_ptr, classes_ptr, begin - BLOCK, num_boxes, x1, y1, x2, y2, own_class, iou_threshold, BY_CLASS, BLOCK
        )  # fmt: skip
        suppressed = tl.zeros([BLOCK], tl.int32)
        num_kept = 0
        earlier = 0  # at first the block in which the chain begins
        if BY_CLASS:
            earlier = _first_of_class(classes_ptr, first_class, begin) // BLOCK
        # A chain that has given all that can be returned needs no more comparisons.
        while (earlier < block - 1) & (num_kept < max_output):
            # Acquire: the boxes listed before the count are seen after it. An atomic, which one thread does and tells
            # the others: with a load of its own, each thread could leave the loop at another time.
            count = tl.atomic_add(counts_ptr + first_block + earlier, 0, sem="acquire")
            while count == 0:
                count = tl.atomic_add(counts_ptr + first_block + earlier, 0, sem="acquire")
            count = count.to(tl.int32) - 1
            for first in range(0, count, LIST_BLOCK):
                entry = first + tl.arange(0, LIST_BLOCK)
                entries_ptr = list_ptr + ((first_block + earlier) * BLOCK + first) * 4
                # Without a mask, so that one address serves all: what lies behind the last entry does not count.
                bx1, by1, bx2, by2 = load_one_box(entries_ptr, tl.arange(0, LIST_BLOCK), True)
                over = iou_threshold < iou_or_zero(
                    x1[None, :], y1[None, :], x2[None, :], y2[None, :],
                    bx1[:, None], by1[:, None], bx2[:, None], by2[:, None],
                )  # fmt: skip
                suppressed |= tl.max((over & (entry < count)[:, None]).to(tl.int32), axis=0)
            num_kept += count
            earlier += 1
        if num_kept < max_output:
            previous_ptr = words_ptr + (first_block + block - 1) * (BLOCK // 32) + word
            # Relaxed: the word is all there is to see. Atomic for the same reason.
            previous = tl.atomic_add(previous_ptr, tl.zeros_like(word).to(tl.int64), sem="relaxed")
            while tl.min(previous) == 0:
                previous = tl.atomic_add(previous_ptr, tl.zeros_like(word).to(tl.int64), sem="relaxed")
            suppressed |= _met(from_previous, previous.to(tl.int32)).to(tl.int32)
        else:
            suppressed |= 1
        alive &= (suppressed == 0) | ~of_first

    kept = alive
    changed = 1
    # Row i of the block is settled after i + 1 rounds at the latest; a few do for real boxes.
    while changed != 0:
        before = kept
        kept = alive & ~_met(within, _pack(before, BLOCK))
        changed = tl.max((kept ^ before).to(tl.int32))
    kept_words = _pack(kept, BLOCK)
    block_ptr = words_ptr + (first_block + block) * (BLOCK // 32) + word
    # Relaxed, the word being all there is to see; atomic, so that no cache holds it back. Added to zero, for AMD's
    # backend of Triton 3.6 cannot exchange.
    tl.atomic_add(block_ptr, (kept_words.to(tl.int64) & 0xFFFFFFFF) | PUBLISHED, sem="relaxed")

    of_last = inside
    if BY_CLASS:
        last_class = tl.load(classes_ptr + tl.minimum(begin + BLOCK, num_boxes) - 1)
        of_last &= tl.load(classes_ptr + row, mask=inside, other=0) == last_class
    listed = (kept & of_last).to(tl.int32)
    count = tl.sum(listed)
    slot = tl.cumsum(listed, 0) - listed
    store_box(list_ptr + (first_block + block) * BLOCK * 4, slot, x1, y1, x2, y2, listed != 0)
    # Every thread's part of the list is stored before one thread publishes it.
    tl.debug_barrier()
    # Release: whoever sees the count sees the list.
    tl.atomic_xchg(counts_ptr + first_block + block, count.to(tl.int64) + 1, sem="release")
    kept_place = row
    if BY_CLASS:
        kept_place = tl.load(places_ptr + row, mask=inside, other=0)
    tl.store(kept_ptr + kept_place, kept, mask=inside)


@triton.jit(do_not_specialize=["num_boxes", "max_output"])
def _collect_kernel(
    kept_ptr,  # bool [B, N], by place
    order_ptr,  # int64 [B, N]: the box at each place
    output_ptr,  # int64 [B, max_output]
    num_kept_ptr,  # int32 [B]
    num_boxes,
    max_output,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    kept_ptr += image * num_boxes
    order_ptr += image * num_boxes
    output_ptr += image * max_output
    num_kept = 0
    begin = 0
    while (begin < num_boxes) & (num_kept < max_output):
        place = begin + tl.arange(0, BLOCK)
        kept = tl.load(kept_ptr + place, mask=place < num_boxes, other=0).to(tl.int32)
        slot = num_kept + tl.cumsum(kept, 0) - kept
        box = tl.load(order_ptr + place, mask=kept != 0, other=0)
        tl.store(output_ptr + slot, box, mask=(kept != 0) & (slot < max_output))
        num_kept += tl.sum(kept)
        begin += BLOCK
    num_kept = tl.minimum(num_kept, max_output)
    tl.store(num_kept_ptr + image, num_kept)
    for begin in range(num_kept, max_output, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        tl.store(output_ptr + slot, tl.full([BLOCK], -1, tl.int64), mask=slot < max_output)


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
    if batch * max_output * num_boxes == 0:
        output = torch.full((batch, max_output), -1, dtype=torch.int64, device=device)
        return output, torch.zeros(batch, dtype=torch.int32, device=device)

    keys = sort_key(scores)
    if score_threshold is not None:
        keys = torch.where(keys > score_threshold, keys, -torch.inf)  # behind every candidate, which -inf cannot be
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    rows = places = classes = order
    if idxs is not None:
        classes, places = idxs.take_along_dim(order, dim=1).sort(dim=1, stable=True)
        rows = order.take_along_dim(places, dim=1)
    boxes = boxes.take_along_dim(rows[..., None], dim=1)

    num_blocks, words = triton.cdiv(num_boxes, BLOCK), BLOCK // 32
    cells = torch.zeros(1 + batch * num_blocks * (words + 1), dtype=torch.int64, device=device)
    ticket, words_cells, counts = cells.split((1, batch * num_blocks * words, batch * num_blocks))
    kept = torch.empty(batch, num_boxes, dtype=torch.bool, device=device)
    _settle_kernel[(batch * num_blocks,)](
        boxes,
        classes,
        places,
        keys,
        ticket,
        words_cells,
        counts,
        torch.empty(batch, num_blocks, BLOCK, 4, dtype=torch.float32, device=device),
        kept,
        batch,
        num_boxes,
        num_blocks,
        max_output,
        round_down(iou_threshold),
        BY_CLASS=idxs is not None,
        BY_SCORE=score_threshold is not None,
        PUBLISHED=PUBLISHED,
        BLOCK=BLOCK,
        LIST_BLOCK=LIST_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    output = torch.empty(batch, max_output, dtype=torch.int64, device=device)
    num_kept = torch.empty(batch, dtype=torch.int32, device=device)
    _collect_kernel[(batch,)](
        kept,
        order,
        output,
        num_kept,
        num_boxes,
        max_output,
        BLOCK=COLLECT_BLOCK,
        num_warps=16,
        enable_fp_fusion=False,
    )
    return output, num_kept


def nms_triton(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    classes = None if idxs is None else idxs[None]
    kept, num_kept = batched_nms_padded_triton(boxes[None], scores[None], classes, iou_threshold, len(boxes), None)
    # The length of the result is a fact of its values: here, and only here, the host waits for the GPU.
    return kept[0, : int(num_kept)].clone()
