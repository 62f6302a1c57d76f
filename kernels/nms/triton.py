"""Kernels of greedy NMS for a batch of images, aware of classes.

Boxes are sorted by class, then by descending score. The blocks that hold the rows of one class form a chain: whether a
row is kept depends on the rows before it. After the sort there are two launches and a fill:

1. Settle. A program owns a block of 128 consecutive rows and decides which of them are kept. It waits for earlier
   blocks of its chain; the picture below shows for which.
2. Collect. A program per image walks through the rows by descending score and writes the first `max_output` kept.

What a block waits for, in an image with classes a, b and c:

    block             0           1           2           3           4           5
    class of rows     aaaaaaaa    aaaabbbb    bbbbbbbb    bbbbbbbb    bbbbbbbb    bbcccccc
    first class       a           a           b           b           b           b
    last class        a           b           b           b           b           c
    waits for bits    -           of 0        of 1        of 2        of 3        of 4
    waits for lists   -           -           -           of 1        of 1, 2     of 1, 2, 3

A block publishes two things: the bits of the rows that it kept, as soon as it knows them, and then the list of the
boxes that it kept of its last class. The bits are for the next block. That block has compared its rows with all rows of
this one in advance, so that it needs nothing but the bits. The lists are for the blocks after the next one, which
compare their rows with the listed boxes before they wait for bits. No two classes are compared, and a block into which
no chain comes waits for nobody: block 0, a block that begins with a new class, or a block whose first row is no
candidate.

Lists are sorted by the left sides of their boxes. The rows of a block are sorted as well, and four neighbours go to one
thread. Where a box must begin to suppress one of the four follows from their widths and the threshold (`_reach`). So a
thread bisects each list, and compares its rows with a part of it: a quarter, if boxes lie anywhere in an image and have
sides up to a fifth of the image's.

A row is compared with other boxes without division, by how far their intersection exceeds what the threshold asks for
(`Rule`). Where rounding could decide, all pairs of the step are compared again by their IoU. So the result is that of
IoUs, at a third of the instructions.

Among the rows of a block, "kept if and only if no better kept row suppresses it" has exactly one solution, which is
that of greedy NMS. A program iterates to it.

The time from one block's bits to the next block's bits is that of an atomic read, an AND, a few rounds of the iteration
(each about 60 instructions and two exchanges through shared memory) and an atomic write. It is expected to be 1 to
1.5 us. A chain of N boxes takes N / 128 times as long. All other comparisons happen meanwhile.

A row is read by its block and by the next block of its chain. A kept box is read by the later blocks of the chain, from
the cache. Scratch memory beside that of the sort: 34 bytes per box (a sorted copy of the box, the list of kept boxes,
the kept flag, the bits and counts).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.device.boxmath import (
    LEAST_AREA,
    Box,
    area,
    columns,
    intersection_sides,
    iou_or_zero,
    load_box,
    load_box_by_coordinate,
    rows,
    store_box,
)
from ssdcore.kernels.device.constant import Constant
from ssdcore.kernels.rules import EXACT, registers, round_down, sort_key

BLOCK_ROWS = 128  # rows per program: one per thread at four warps, so that a row's bits stay in its thread
WARPS = BLOCK_ROWS // 32  # of a program: one per word of bits
REGISTERS = 128  # of a thread at most: four programs per multiprocessor
COLLECT_BLOCK = 4096  # rows collected at once: 8 per thread at sixteen warps, three steps at 8732
MARGIN = Constant(2.0**-18)  # of a box's area; rounding errors of a decision add up to less than a quarter of it
LARGEST_AREA = Constant(2.0**100)  # between LEAST_AREA and this, no product underflows or overflows
LEAST_THRESHOLD = Constant(2.0**-10)  # below it, an intersection of 0 would be nearly in doubt
SLACK = Constant(2.0**-12)  # of a width or a coordinate; lists are sorted to 2**-16, and rounding errors are smaller
LEAST_SLACK = Constant(1e-30)  # much more than the steps between denormal numbers
# The largest number: no intersection exceeds it, and no box begins behind it. It is finite, so that no infinity is
# subtracted from another.
NEVER = Constant(3.4028234663852886e38)
WORD_BITS = Constant(32)  # rows that a word of bits speaks for
LANES = Constant(32)  # threads of a warp
QUAD = Constant(4)  # neighbouring rows that a thread compares with listed boxes, a fourth of them
SEARCH_STEPS = Constant(5)  # to find one of the BLOCK_ROWS / QUAD quads of a list
PUBLISHED = Constant(1 << 32)  # added to a published word, because a word of bits may be zero


class SortedBoxes(NamedTuple):
    """Pointers to the boxes of a batch, sorted by class, then by descending score."""

    boxes_ptr: Tensor  # [B, N, 4] xyxy
    classes_ptr: Tensor  # [B, N]; not read without classes
    ranks_ptr: Tensor  # int64 [B, N]: the position of each row when sorted by score alone; not read without classes
    scores_ptr: Tensor  # [B, N]: scores by rank, -inf for boxes that are no candidates; not read without a threshold


class Chain(NamedTuple):
    """Pointers to what blocks publish, and to the ticket."""

    ticket_ptr: Tensor  # int64 [1], zero at first
    words_ptr: Tensor  # int64 [B, blocks, words], zero at first: bits of the rows that a block kept, and PUBLISHED
    counts_ptr: Tensor  # int64 [B, blocks], zero at first: 1 + how many boxes a block listed
    lists_ptr: Tensor  # fp32 [B, blocks, BLOCK_ROWS, 4]: boxes with an area that a block kept of its last class, by x1


class Block(NamedTuple):
    """The rows of one program."""

    index: tl.tensor  # of the block in its image
    begin: tl.tensor  # first row
    row: tl.tensor  # [BLOCK]
    exists: tl.tensor  # bool [BLOCK]
    class_begin: tl.tensor  # [BLOCK]: the first row of this block and the one before that is of each row's class


class Rule(NamedTuple):
    """When a box suppresses another.

    The overlap I / (a + b - I) of boxes with the areas a and b exceeds the threshold t if and only if the intersection
    I exceeds s * a + s * b, where s = t / (1 + t). I is at most a, so rounding errors near that are small parts of a.
    If the difference is larger than MARGIN * a, they do not change the decision.
    """

    threshold: float  # t, rounded down
    share: float  # s
    margin: float  # MARGIN / s: MARGIN * a as a part of s * a
    reach_before: float  # in widths of a box: how far before it a box may begin that suppresses it
    reach_behind: float  # the same, behind its left side


@triton.jit
def _of_image(sorted_boxes, image, num_boxes):
    """The pointers of one image."""
    return SortedBoxes(
        sorted_boxes.boxes_ptr + image * num_boxes * 4,
        sorted_boxes.classes_ptr + image * num_boxes,
        sorted_boxes.ranks_ptr + image * num_boxes,
        sorted_boxes.scores_ptr + image * num_boxes,
    )


@triton.jit
def _pack(flags, row, BLOCK: tl.constexpr):
    """Flags [BLOCK] of the rows `row` of a block as words of bits, int32 [BLOCK / 32]."""
    word = tl.arange(0, BLOCK // WORD_BITS)
    # Every thread takes part in the sum of every word, so that all threads know all words after one exchange.
    bits = flags.to(tl.int32) << (row % WORD_BITS)
    return tl.sum(tl.where((row // WORD_BITS)[None, :] == word[:, None], bits[None, :], 0), axis=1)


@triton.jit
def _bit_of(row, BLOCK: tl.constexpr):
    """For each row [BLOCK] words that have its bit set, int32 [BLOCK / 32, BLOCK]."""
    word = tl.arange(0, BLOCK // WORD_BITS)
    return tl.where((row // WORD_BITS)[None, :] == word[:, None], (1 << (row % WORD_BITS))[None, :], 0)


@triton.jit
def _any_kept(suppressors, kept_words):
    """Which columns of `suppressors` [W, BLOCK] have a bit of `kept_words` [W] set."""
    return tl.max(((suppressors & kept_words[:, None]) != 0).to(tl.int32), axis=0) != 0


@triton.jit
def _load_tile(boxes_ptr, begin, num_boxes, BLOCK: tl.constexpr, WARPS: tl.constexpr):
    """The rows of a block as a Box of [BLOCK / 32, WARPS, 32], the same for each warp.

    A thread has several rows, and each warp has all. So what a warp loads of another box serves several pairs per
    thread. Loads of one dimension fix which thread has which row; for three dimensions, versions of Triton differ.
    """
    index = tl.arange(0, BLOCK * WARPS)
    row = begin + index // BLOCK * LANES + index % LANES
    box = load_box_by_coordinate(boxes_ptr, tl.minimum(row, num_boxes - 1))
    return _reshape(box, (BLOCK // LANES, WARPS, LANES))


@triton.jit
def _reshape(box, shape: tl.constexpr):
    """Boxes in another shape."""
    return Box(
        tl.reshape(box.x1, shape), tl.reshape(box.y1, shape), tl.reshape(box.x2, shape), tl.reshape(box.y2, shape)
    )


@triton.jit
def _share(box, rule):
    """What an intersection with each box must exceed, beside the share of the other box.

    NEVER for boxes that nothing suppresses; NaN for sizes and thresholds that need exact arithmetic.
    """
    box_area = area(box)
    is_usual = (box_area > LEAST_AREA) & (box_area < LARGEST_AREA) & (rule.threshold >= LEAST_THRESHOLD)
    return tl.where(box_area > 0, tl.where(is_usual, box_area * rule.share, float("nan")), NEVER)


@triton.jit
def _excess(box, other, other_share):
    """The intersection minus the share of the other box."""
    width, height = intersection_sides(box, other)
    return tl.fma(width, height, -other_share)


@triton.jit
def _in_doubt(excess, share, rule):
    """Whether exact arithmetic must decide for any of the boxes, given how far intersections exceed all shares."""
    return tl.max((~(tl.abs(excess) > share * rule.margin)).to(tl.int32)) != 0  # a NaN is in doubt


@triton.jit
def _estimate_suppressors(boxes_ptr, tile, begin, num_boxes, rule, BLOCK: tl.constexpr):
    """Which rows overlap each row, better or not, without division; and whether any of the decisions is in doubt."""
    share = _share(tile, rule)
    thread = tl.arange(0, BLOCK)
    word_end = begin + thread // LANES * LANES + (LANES - 1)  # a word per warp, all of whose threads load one box
    apart = tl.zeros(share.shape, tl.uint32)
    nearest = tl.full(share.shape, float("inf"), tl.float32)
    for step in range(WORD_BITS):
        other_box = load_box(boxes_ptr, tl.minimum(word_end - step, num_boxes - 1), thread >= 0)
        other_box = _reshape(other_box, (1, BLOCK // LANES, LANES))
        other_area = area(other_box)
        # A box without area suppresses nothing.
        excess = _excess(tile, other_box, tl.where(other_area > 0, other_area * rule.share, float("inf"))) - share
        # The sign becomes the lowest bit.
        apart = (apart << 1) | (excess.to(tl.uint32, bitcast=True) >> 31)
        nearest = tl.minimum(nearest, tl.abs(excess), propagate_nan=tl.PropagateNan.ALL)
    words = tl.permute(~apart.to(tl.int32, bitcast=True), (1, 0, 2))
    return tl.reshape(words, (BLOCK // WORD_BITS, BLOCK)), _in_doubt(nearest, share, rule)


@triton.jit
def _find_suppressors_exactly(boxes_ptr, block, begin, num_boxes, rule, BLOCK: tl.constexpr):
    """Which rows overlap each row, better or not, of any boxes."""
    box = load_box(boxes_ptr, block.row, block.exists)
    word = tl.arange(0, BLOCK // WORD_BITS)
    suppressors = tl.zeros([BLOCK // WORD_BITS, BLOCK], tl.int32)
    # Bit by bit, with a word in a register. To pack a tile of comparisons, threads would have to exchange them.
    for bit in range(WORD_BITS):
        other = tl.minimum(begin + word * WORD_BITS + bit, num_boxes - 1)
        other_box = load_box_by_coordinate(boxes_ptr, other)
        overlaps = rule.threshold < iou_or_zero(columns(box), rows(other_box))
        suppressors |= overlaps.to(tl.int32) << bit
    return suppressors


@triton.jit
def _find_suppressors(boxes_ptr, block, tile, begin, num_boxes, rule, BY_CLASS: tl.constexpr, BLOCK: tl.constexpr):
    """Which better rows of its class overlap each row of the block, of the BLOCK rows from `begin` on.

    int32 [BLOCK / 32, BLOCK]: a column per row of the block, with one bit per row from `begin` on.
    """
    suppressors, in_doubt = _estimate_suppressors(boxes_ptr, tile, begin, num_boxes, rule, BLOCK)
    better = _lower_bits(block.row - begin, BLOCK)
    if BY_CLASS:
        better &= ~_lower_bits(block.class_begin - begin, BLOCK)
    # Before the branch: behind it, both would stay in registers until the rows are settled.
    suppressors &= better
    if in_doubt:
        suppressors = _find_suppressors_exactly(boxes_ptr, block, begin, num_boxes, rule, BLOCK) & better
    return suppressors


@triton.jit
def _lower_bits(number, BLOCK: tl.constexpr):
    """The `number` lower bits of a column of words: int32 [BLOCK / 32, BLOCK]."""
    number = number[None, :] - (tl.arange(0, BLOCK // WORD_BITS) * WORD_BITS)[:, None]
    lower_bits = (1 << tl.minimum(tl.maximum(number, 0), WORD_BITS - 1)) - 1
    return tl.where(number < WORD_BITS, lower_bits, -1)


@triton.jit
def _first_row_of_class(classes_ptr, class_id, row):
    """The first row of class `class_id`, which `row` belongs to."""
    low = 0
    high = row
    while low < high:
        middle = (low + high) // 2
        before = tl.load(classes_ptr + middle) < class_id
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _class_begin(classes_ptr, class_id, row, first, BLOCK: tl.constexpr):
    """The first of the 2 * BLOCK rows from `first` on that is of each row's class; the rows [BLOCK] are among them."""
    low = tl.zeros([BLOCK], tl.int32) + first
    high = row
    num_rows = 2 * BLOCK
    while num_rows > 1:
        middle = (low + high) // 2
        before = tl.load(classes_ptr + middle) < class_id
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
        num_rows //= 2
    return low


@triton.jit
def _wait_for_count(counts_ptr):
    """Wait until a block has published its list, and return its length."""
    # Acquire: the list was stored before the count, and is seen after it. An atomic, because one thread executes it and
    # shares the value. With plain loads, threads could leave the loop at different times.
    count = tl.atomic_add(counts_ptr, 0, sem="acquire")
    while count == 0:
        count = tl.atomic_add(counts_ptr, 0, sem="acquire")
    return count.to(tl.int32) - 1


@triton.jit
def _wait_for_words(words_ptr):
    """Wait until a block has published its bits, and return them."""
    # Relaxed: nothing but the words is read. An atomic, for the reason given in `_wait_for_count`.
    words = tl.atomic_add(words_ptr, tl.zeros(words_ptr.shape, tl.int64), sem="relaxed")
    while tl.min(words) == 0:
        words = tl.atomic_add(words_ptr, tl.zeros(words_ptr.shape, tl.int64), sem="relaxed")
    return words.to(tl.int32)


@triton.jit
def _compare_with_list_exactly(suppressed, boxes_ptr, list_ptr, count, block, rule, LISTED_AT_ONCE: tl.constexpr):
    """Add to `suppressed`, int32 [BLOCK], what the `count` boxes of a list suppress."""
    box = load_box(boxes_ptr, block.row, block.exists)
    for first in range(0, count, LISTED_AT_ONCE):
        # Without a mask, so that one address serves all threads. Behind the last entry are boxes without area.
        listed_box = load_box_by_coordinate(list_ptr + first * 4, tl.arange(0, LISTED_AT_ONCE))
        overlaps = rule.threshold < iou_or_zero(columns(box), rows(listed_box))
        suppressed |= tl.max(overlaps.to(tl.int32), axis=0)
    return suppressed


@triton.jit
def _order_by_left(box, BLOCK: tl.constexpr):
    """The rows [BLOCK] sorted by their left sides, of which the lowest 7 bits are replaced by the row."""
    bits = box.x1.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # sorts as the number does
    return tl.sort((key & -BLOCK) | tl.arange(0, BLOCK)) & (BLOCK - 1)


@triton.jit
def _load_quads(boxes_ptr, begin, order, num_boxes, BLOCK: tl.constexpr):
    """The rows of a block as a Box of [4, BLOCK]: a column per thread, and four threads have the same four rows.

    Each of these takes a fourth of the listed boxes.
    """
    index = tl.arange(0, BLOCK * QUAD)
    row = begin + tl.gather(order, index % BLOCK // QUAD * QUAD + index // BLOCK, 0)
    return _reshape(load_box_by_coordinate(boxes_ptr, tl.minimum(row, num_boxes - 1)), (QUAD, BLOCK))


@triton.jit
def _reach(box, rule):
    """Between which two numbers, [BLOCK] each, a box begins that suppresses any of four rows, if the rule can tell.

    If the IoU exceeds t, the intersection is more than t times as wide as either box. So a box of width w is suppressed
    by none that begins more than (1 - t) w behind its left side. The other box is at most w / t wide, so that it begins
    at most (1 - t) w / t before that side.
    """
    width = box.x2 - box.x1
    slack = tl.abs(box.x1) * SLACK + LEAST_SLACK
    first = (box.x1 - slack) - width * rule.reach_before
    last = (box.x1 + slack) + width * rule.reach_behind
    return tl.min(first, axis=0), tl.max(last, axis=0)


@triton.jit
def _last_quad_before(list_ptr, x, BLOCK: tl.constexpr):
    """The last quad of a list of which the first box begins before x, [BLOCK]; 0 if there is none."""
    quad = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(SEARCH_STEPS):
        middle = quad + (BLOCK // QUAD >> (step + 1))
        quad = tl.where(tl.load(list_ptr + middle * (QUAD * 4)) < x, middle, quad)
    return quad


@triton.jit
def _largest_excess(quads, reach_first, reach_last, list_ptr, rule, BLOCK: tl.constexpr):
    """The largest excess of each box over the boxes of a list within reach, of which each thread takes a fourth."""
    thread = tl.arange(0, BLOCK)
    first = _last_quad_before(list_ptr, reach_first, BLOCK)
    num_steps = tl.max(_last_quad_before(list_ptr, reach_last, BLOCK) - first) + 1
    # All threads take as many steps as the one that needs most, within the list.
    listed_index = tl.minimum(first, BLOCK // QUAD - num_steps) * QUAD + thread % QUAD
    largest = tl.full(quads.x1.shape, -float("inf"), tl.float32)
    for _ in range(num_steps):
        listed = load_box(list_ptr, listed_index, thread >= 0)
        excess = _excess(quads, _reshape(listed, (1, BLOCK)), (area(listed) * rule.share)[None, :])
        largest = tl.maximum(largest, excess, propagate_nan=tl.PropagateNan.ALL)
        listed_index += QUAD
    return largest


@triton.jit
def _follow_chain(
    sorted_boxes, chain, block, order, tile, first_block, num_boxes, max_output, rule, first_class,
    BY_CLASS: tl.constexpr, BLOCK: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Which rows the earlier blocks of the chain suppress, int32 [BLOCK]; waits for these blocks."""
    by_previous = _find_suppressors(
        sorted_boxes.boxes_ptr, block, tile, block.begin - BLOCK, num_boxes, rule, BY_CLASS, BLOCK
    )
    suppressed = tl.zeros([BLOCK], tl.int32)
    quads = _load_quads(sorted_boxes.boxes_ptr, block.begin, order, num_boxes, BLOCK)
    share = _share(quads, rule)
    reach_first, reach_last = _reach(quads, rule)
    row_of_thread = tl.arange(0, QUAD)[:, None]
    hits = tl.zeros([BLOCK], tl.int32)  # a bit per row of the thread
    num_kept = 0
    earlier = 0  # the block whose list is read next; at first the block in which the chain begins
    if BY_CLASS:
        earlier = _first_row_of_class(sorted_boxes.classes_ptr, first_class, block.begin) // BLOCK
    # A chain that has kept all that can be returned needs no more comparisons.
    while (earlier < block.index - 1) & (num_kept < max_output):
        count = _wait_for_count(chain.counts_ptr + first_block + earlier)
        list_ptr = chain.lists_ptr + (first_block + earlier) * BLOCK * 4
        excess = _largest_excess(quads, reach_first, reach_last, list_ptr, rule, BLOCK) - share
        hits |= tl.sum((excess > share * rule.margin).to(tl.int32) << row_of_thread, axis=0)
        if _in_doubt(excess, share, rule):
            suppressed = _compare_with_list_exactly(
                suppressed, sorted_boxes.boxes_ptr, list_ptr, count, block, rule, WARPS
            )
        num_kept += count
        earlier += 1
    if num_kept < max_output:
        position = tl.arange(0, BLOCK)
        of_quads = tl.reduce_or(tl.reshape(hits, (BLOCK // QUAD, QUAD)), axis=1)
        hits = tl.gather(of_quads, position // QUAD, 0) >> (position % QUAD)
        hit_words = _pack(hits & 1, order, BLOCK)
        suppressed |= _any_kept(_bit_of(position, BLOCK), hit_words).to(tl.int32)
        word = tl.arange(0, BLOCK // WORD_BITS)
        previous = _wait_for_words(chain.words_ptr + (first_block + block.index - 1) * (BLOCK // WORD_BITS) + word)
        suppressed |= _any_kept(by_previous, previous).to(tl.int32)
    else:
        suppressed |= 1
    return suppressed


@triton.jit
def _settle(alive, suppressors, BLOCK: tl.constexpr):
    """Which of the rows `alive` [BLOCK] greedy NMS keeps."""
    kept = alive
    changed = 1
    # Row i of the block is settled after i + 1 rounds at the latest. Real boxes need a few.
    while changed != 0:
        before = kept
        kept = alive & ~_any_kept(suppressors, _pack(before, tl.arange(0, BLOCK), BLOCK))
        changed = tl.max((kept ^ before).to(tl.int32))
    return kept


@triton.jit
def _publish_words(words_ptr, kept, BLOCK: tl.constexpr):
    """Publish which rows are kept, for the next block of the chain."""
    word = tl.arange(0, BLOCK // WORD_BITS)
    # Relaxed: nothing but the words is read. An atomic, so that no cache holds them back. They are added to zero,
    # because AMD's backend of Triton 3.6 cannot exchange a tensor.
    published = _pack(kept, tl.arange(0, BLOCK), BLOCK).to(tl.uint32, bitcast=True).to(tl.int64) | PUBLISHED
    tl.atomic_add(words_ptr + word, published, sem="relaxed")


@triton.jit
def _publish_list(boxes_ptr, list_ptr, counts_ptr, block, order, listed, num_boxes, BLOCK: tl.constexpr):
    """Publish the boxes that are kept, for later blocks of the chain."""
    position = tl.arange(0, BLOCK)
    box = load_box(boxes_ptr, tl.minimum(block.begin + order, num_boxes - 1), position >= 0)
    listed = tl.gather(listed, order, 0) & (area(box) > 0).to(tl.int32)
    count = tl.sum(listed)
    before = tl.cumsum(listed, 0) - listed
    is_listed = listed != 0
    slot = tl.where(is_listed, before, count + position - before)
    # Readers search a whole list. Behind the last box they find boxes without area, which suppress nothing.
    x1, y1 = tl.where(is_listed, box.x1, NEVER), tl.where(is_listed, box.y1, 0.0)
    x2, y2 = tl.where(is_listed, box.x2, NEVER), tl.where(is_listed, box.y2, 0.0)
    every_row = block.row >= block.begin
    store_box(list_ptr, slot, Box(x1, y1, x2, y2), every_row)
    # Every thread's part of the list is stored before one thread publishes it.
    tl.debug_barrier()
    # Release: whoever sees the count sees the list.
    tl.atomic_xchg(counts_ptr, count.to(tl.int64) + 1, sem="release")


# `num_boxes` and `max_output` differ from call to call. If they were specialised, Triton would compile other kernels
# for the value 1 and for multiples of 16.
@triton.jit(do_not_specialize=["num_boxes", "max_output"])
def _settle_kernel(
    sorted_boxes,  # SortedBoxes
    chain,  # Chain
    kept_ptr,  # bool [B, N], by rank
    batch,
    num_boxes,
    num_blocks,
    max_output,
    threshold,  # this and the next four are a Rule, as numbers because a bundle would cost the host more
    share,
    margin,
    reach_before,
    reach_behind,
    BY_CLASS: tl.constexpr,
    BY_SCORE: tl.constexpr,
    BLOCK: tl.constexpr,
    WARPS: tl.constexpr,
):
    # A ticket and not program_id says which block a program owns. A block waits for earlier tickets only, whose
    # programs are running already. Relaxed: the programs share nothing else through the ticket.
    ticket = tl.atomic_add(chain.ticket_ptr, 1, sem="relaxed")
    image = ticket % batch  # int64, and so is every offset that it makes
    index = (ticket // batch).to(tl.int32)
    sorted_boxes = _of_image(sorted_boxes, image, num_boxes)
    first_block = image * num_blocks

    begin = index * BLOCK
    row = begin + tl.arange(0, BLOCK)
    exists = row < num_boxes
    class_begin = row
    first_class = 0
    of_first_class = exists
    # Whether a chain comes in. If `num_blocks` is 1, Triton compiles it as a constant and leaves out all the waiting.
    chain_comes_in = (index > 0) & (num_blocks > 1)
    if BY_CLASS:
        class_id = tl.load(sorted_boxes.classes_ptr + row, mask=exists, other=0)
        first_class = tl.load(sorted_boxes.classes_ptr + begin)
        of_first_class &= class_id == first_class
        class_begin = _class_begin(
            sorted_boxes.classes_ptr, class_id, tl.minimum(row, num_boxes - 1), tl.maximum(begin - BLOCK, 0), BLOCK
        )
        chain_comes_in &= tl.load(sorted_boxes.classes_ptr + tl.maximum(begin, 1) - 1) == first_class
    alive = exists
    if BY_SCORE:
        rank, first_rank = row, begin
        if BY_CLASS:
            rank = tl.load(sorted_boxes.ranks_ptr + row, mask=exists, other=0)
            first_rank = tl.load(sorted_boxes.ranks_ptr + begin)
        alive &= tl.load(sorted_boxes.scores_ptr + rank, mask=exists, other=-float("inf")) > -float("inf")
        # Rows of a class are sorted by score. If the block's first row is no candidate, no later row of its class is.
        chain_comes_in &= tl.load(sorted_boxes.scores_ptr + first_rank) > -float("inf")
    block = Block(index, begin, row, exists, class_begin)
    rule = Rule(threshold, share, margin, reach_before, reach_behind)
    tile = _load_tile(sorted_boxes.boxes_ptr, begin, num_boxes, BLOCK, WARPS)
    suppressors = _find_suppressors(sorted_boxes.boxes_ptr, block, tile, begin, num_boxes, rule, BY_CLASS, BLOCK)
    order = _order_by_left(load_box(sorted_boxes.boxes_ptr, row, exists), BLOCK)

    if chain_comes_in:
        suppressed = _follow_chain(
            sorted_boxes, chain, block, order, tile, first_block, num_boxes, max_output, rule, first_class,
            BY_CLASS, BLOCK, WARPS,
        )  # fmt: skip
        alive &= (suppressed == 0) | ~of_first_class
    kept = _settle(alive, suppressors, BLOCK)
    _publish_words(chain.words_ptr + (first_block + index) * (BLOCK // WORD_BITS), kept, BLOCK)

    of_last_class = exists
    if BY_CLASS:
        last_class = tl.load(sorted_boxes.classes_ptr + tl.minimum(begin + BLOCK, num_boxes) - 1)
        of_last_class &= tl.load(sorted_boxes.classes_ptr + row, mask=exists, other=0) == last_class
    list_ptr = chain.lists_ptr + (first_block + index) * BLOCK * 4
    # Boxes without area suppress nothing, and readers rely on it that none is listed.
    listed = (kept & of_last_class).to(tl.int32)
    _publish_list(
        sorted_boxes.boxes_ptr, list_ptr, chain.counts_ptr + first_block + index, block, order, listed, num_boxes, BLOCK
    )
    kept_rank = row
    if BY_CLASS:
        kept_rank = tl.load(sorted_boxes.ranks_ptr + row, mask=exists, other=0)
    tl.store(kept_ptr + image * num_boxes + kept_rank, kept, mask=exists)


@triton.jit(do_not_specialize=["num_boxes", "max_output"])
def _collect_kernel(
    kept_ptr,  # bool [B, N], by rank
    order_ptr,  # int64 [B, N]: the box of each rank
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
        rank = begin + tl.arange(0, BLOCK)
        kept = tl.load(kept_ptr + rank, mask=rank < num_boxes, other=0).to(tl.int32)
        slot = num_kept + tl.cumsum(kept, 0) - kept
        box = tl.load(order_ptr + rank, mask=kept != 0, other=0)
        tl.store(output_ptr + slot, box, mask=(kept != 0) & (slot < max_output))
        num_kept += tl.sum(kept)
        begin += BLOCK
    num_kept = tl.minimum(num_kept, max_output)
    tl.store(num_kept_ptr + image, num_kept)
    for begin in range(num_kept, max_output, BLOCK):
        slot = begin + tl.arange(0, BLOCK)
        tl.store(output_ptr + slot, tl.full([BLOCK], -1, tl.int64), mask=slot < max_output)


def _sort(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, score_threshold: float | None
) -> tuple[SortedBoxes, Tensor]:
    """The boxes sorted by class, then by descending score; and the order [B, N] by score alone."""
    keys = sort_key(scores)
    if score_threshold is not None:
        keys = torch.where(keys > score_threshold, keys, -torch.inf)  # behind every candidate, which -inf cannot be
    keys, order = keys.sort(dim=1, descending=True, stable=True)
    box_of_row = ranks = classes = order
    if idxs is not None:
        classes, ranks = idxs.gather(1, order).sort(dim=1, stable=True)
        box_of_row = order.gather(1, ranks)
    # `gather`, because `take_along_dim` takes twice the time on the host to come to the same call.
    return SortedBoxes(boxes.gather(1, box_of_row[..., None].expand(-1, -1, 4)), classes, ranks, keys), order


def _rule(iou_threshold: float) -> Rule:
    """The rule of a threshold. Its numbers are computed here, because a kernel would keep them in registers."""
    threshold = max(iou_threshold, LEAST_THRESHOLD.value)  # below it, exact arithmetic decides
    share = threshold / (1 + threshold)
    rest = max(1 - threshold, 0.0) + SLACK.value
    return Rule(round_down(iou_threshold), share, MARGIN.value / share, rest / threshold, rest)


def launch_batched_nms_padded(
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

    sorted_boxes, order = _sort(boxes, scores, idxs, score_threshold)
    num_blocks, num_words = triton.cdiv(num_boxes, BLOCK_ROWS), BLOCK_ROWS // WORD_BITS.value
    zeros = torch.zeros(1 + batch * num_blocks * (num_words + 1), dtype=torch.int64, device=device)
    ticket, words, counts = zeros.split((1, batch * num_blocks * num_words, batch * num_blocks))
    lists = torch.empty(batch, num_blocks, BLOCK_ROWS, 4, dtype=torch.float32, device=device)
    kept = torch.empty(batch, num_boxes, dtype=torch.bool, device=device)
    _settle_kernel[(batch * num_blocks,)](
        sorted_boxes=sorted_boxes,
        chain=Chain(ticket, words, counts, lists),
        kept_ptr=kept,
        batch=batch,
        num_boxes=num_boxes,
        num_blocks=num_blocks,
        max_output=max_output,
        **_rule(iou_threshold)._asdict(),
        BY_CLASS=idxs is not None,
        BY_SCORE=score_threshold is not None,
        BLOCK=BLOCK_ROWS,
        WARPS=WARPS,
        num_warps=WARPS,
        **registers(REGISTERS),
        **EXACT,
    )
    output = torch.empty(batch, max_output, dtype=torch.int64, device=device)
    num_kept = torch.empty(batch, dtype=torch.int32, device=device)
    _collect_kernel[(batch,)](
        kept_ptr=kept,
        order_ptr=order,
        output_ptr=output,
        num_kept_ptr=num_kept,
        num_boxes=num_boxes,
        max_output=max_output,
        BLOCK=COLLECT_BLOCK,
        num_warps=16,
        **EXACT,
    )
    return output, num_kept


def launch_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    idxs = None if idxs is None else idxs[None]
    kept, num_kept = launch_batched_nms_padded(boxes[None], scores[None], idxs, iou_threshold, len(boxes), None)
    # The length of the result depends on its values: here, and only here, the host waits for the GPU.
    return kept[0, : int(num_kept)].clone()
