"""The head's outputs in kernels: where they lie, and how a program finds its part of them.

`ssdcore.kernels.levels` explains levels and their two memory layouts. A kernel reads all levels where they lie, in one
launch. It gets them as one bundle, `Levels`, and is compiled for a `HeadShape`. A block is a number of consecutive
anchors of one level, in the order of memory. The blocks of a kernel are those of the first level, then those of the
second, and so on.
"""

from collections.abc import Sequence
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.device import boxmath
from ssdcore.kernels.device.arithmetic import whole_quotient
from ssdcore.kernels.device.boxmath import Deltas
from ssdcore.kernels.device.constant import Constant
from ssdcore.kernels.levels import in_planes, rows_are_dense

WORD_BYTES = 4  # a word holds two logits of 2 bytes
WORDS_AT_ONCE = 8  # words of an anchor that neighbouring threads take: more would cost exchanges between threads
TILE_LOGITS = 8192  # logits that a program holds at once, with padding: 128 per thread
MAX_TILE_ANCHORS = 64  # one per thread, so that what is done once per anchor leaves no thread idle
TILE_WARPS = 2
LOG2_E = Constant(1.4426950408889634)  # exp(x) is exp2(x * log2(e))


class Levels(NamedTuple):
    """The head's outputs as kernels take them: tuples with an element per level."""

    logits: tuple[Tensor, ...]  # [B, P, a, C]
    deltas: tuple[Tensor, ...]  # [B, P, a, 4]; empty for kernels that read no deltas
    logits_strides: tuple[int, ...]  # elements from one image to the next
    deltas_strides: tuple[int, ...]
    cells: tuple[int, ...]  # P
    per_cell: tuple[int, ...]  # a


class HeadShape(NamedTuple):
    """What a kernel is compiled for."""

    classes: int  # C, with the background
    chunk: int  # classes of a tile
    planes: bool  # levels lie in planes, not in rows
    words: int  # words of a tile, if the logits are read as words of two; otherwise 0


class LevelBlock(NamedTuple):
    """The level that a block lies on, and where the block lies there."""

    level: tl.tensor
    index: tl.tensor  # of the block among the level's blocks
    first_anchor: tl.tensor  # number of the level's first anchor
    num_cells: tl.tensor  # P of the level
    per_cell: tl.tensor  # a of the level


class Span(NamedTuple):
    """Where the numbers of each anchor of a block lie, counted from the image's first number."""

    start: tl.tensor  # of each anchor's first number
    stride: tl.tensor  # from one number of an anchor to the next


# --- on the host ------------------------------------------------------------------------------------------


def levels_of(cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor]) -> tuple[Levels, HeadShape]:
    """Bundle the head's outputs for kernels; unless all levels lie in planes, copies those that do not lie in rows.

    Args:
        cls_logits: levels [B, P, a, C].
        box_deltas: levels [B, P, a, 4].
    """
    planes = in_planes([*cls_logits, *box_deltas])
    logits, deltas = (
        tuple(x if planes or rows_are_dense(x) else x.contiguous() for x in maps) for maps in (cls_logits, box_deltas)
    )
    levels = Levels(
        logits,
        deltas,
        tuple(x.stride(0) for x in logits),
        tuple(x.stride(0) for x in deltas),
        tuple(x.shape[1] for x in logits),
        tuple(x.shape[2] for x in logits),
    )
    num_classes = logits[0].shape[3]
    by_words = not planes and num_classes > 1 < tile_anchors(num_classes) and all(map(_begins_with_words, logits))
    return levels, HeadShape(num_classes, chunk_of(num_classes), planes, words_of(num_classes) if by_words else 0)


def _begins_with_words(level: Tensor) -> bool:
    """Whether the logits of every image begin at the address of a word, and are half as long as a word."""
    return level.itemsize * 2 == WORD_BYTES and level.data_ptr() % WORD_BYTES == 0 and level.stride(0) % 2 == 0


def without_deltas(levels: Levels) -> Levels:
    """The bundle for kernels that read no deltas."""
    return levels._replace(deltas=(), deltas_strides=())


def num_blocks(levels: Levels, block_anchors: int) -> int:
    """The number of blocks of `block_anchors` anchors that an image has."""
    sizes = (cells * per_cell for cells, per_cell in zip(levels.cells, levels.per_cell, strict=True))
    return sum(triton.cdiv(size, block_anchors) for size in sizes)


def chunk_of(num_classes: int) -> int:
    """How many classes a tile has: a power of two whose multiples exceed the number of classes little.

    81 classes are 6 chunks of 16. The next power of two would be 128.
    """
    return max(16, triton.next_power_of_2(num_classes) // 8)


def words_of(num_classes: int) -> int:
    """How many words a tile has: a power of two, as for `chunk_of`."""
    words = triton.next_power_of_2(num_classes // 2)
    return max(min(words, WORDS_AT_ONCE), words // 8)


def tile_anchors(num_classes: int) -> int:
    """How many anchors a program takes when it holds all their logits at once."""
    padded_classes = triton.cdiv(num_classes, chunk_of(num_classes)) * chunk_of(num_classes)
    return max(1, min(MAX_TILE_ANCHORS, TILE_LOGITS // triton.next_power_of_2(padded_classes)))


# --- on the device ----------------------------------------------------------------------------------------


@triton.jit
def pick(values, level):
    """`values[level]` of a tuple of pointers."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        if level == i:
            value = values[i]
    return value


@triton.jit
def pick_int(values, level):
    """`values[level]` of a tuple of integers, as int64."""
    # Triton makes a constant of an argument of 1. Only the cast gives all of them one type.
    value = tl.cast(values[0], tl.int64)
    for i in tl.static_range(1, len(values)):
        value = tl.where(level == i, tl.cast(values[i], tl.int64), value)
    return value


@triton.jit
def ptr_of_image(ptrs, strides, block, image):
    """Where an image's numbers begin on the level of `block`."""
    return pick(ptrs, block.level) + image * pick_int(strides, block.level)


@triton.jit
def locate_block(block_number, levels, BLOCK: tl.constexpr):
    """The level of block `block_number`, and where the block lies there."""
    level = tl.cast(0, tl.int32)
    blocks_before = tl.cast(0, tl.int32)
    first_anchor = tl.cast(0, tl.int32)
    num_cells, per_cell = tl.cast(levels.cells[0], tl.int32), tl.cast(levels.per_cell[0], tl.int32)
    num_blocks = tl.cast(0, tl.int32)
    num_anchors = tl.cast(0, tl.int32)
    for i in tl.static_range(1, len(levels.cells)):
        size = tl.cast(levels.cells[i - 1], tl.int32) * levels.per_cell[i - 1]
        num_blocks += ((size + (BLOCK - 1)).to(tl.uint32) // BLOCK).to(tl.int32)  # a shift, because it has no sign
        num_anchors += size
        beyond = block_number >= num_blocks
        level = tl.where(beyond, i, level)
        blocks_before = tl.where(beyond, num_blocks, blocks_before)
        first_anchor = tl.where(beyond, num_anchors, first_anchor)
        num_cells = tl.where(beyond, levels.cells[i], num_cells)
        per_cell = tl.where(beyond, levels.per_cell[i], per_cell)
    return LevelBlock(level, block_number - blocks_before, first_anchor, num_cells, per_cell)


@triton.jit
def _planes_of_block(position, block, BLOCK: tl.constexpr):
    """On which planes anchors at positions in a block lie: their numbers among the anchors of their cells."""
    first_plane = whole_quotient(block.index * BLOCK, block.num_cells)
    if block.num_cells >= BLOCK:  # the block lies on two planes at most, and no thread need divide for each anchor
        plane = first_plane + (position >= (first_plane + 1) * block.num_cells).to(tl.int32)
    else:
        plane = whole_quotient(position, block.num_cells)
    return plane


@triton.jit
def anchors_of_block(block, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The anchors of a block, counted from the level's first anchor, and which of them exist."""
    position = block.index * BLOCK + tl.arange(0, BLOCK)  # in the order of memory
    exists = position < block.num_cells * block.per_cell
    anchor = position
    if HEAD.planes:
        plane = _planes_of_block(position, block, BLOCK)
        anchor = (position - plane * block.num_cells) * block.per_cell + plane
    return anchor, exists


@triton.jit
def span_of_block(
    block, width, HEAD: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr = 0, PARTS: tl.constexpr = 1
):
    """Where the `width` numbers of each anchor of a block lie, or of part number PART if it has PARTS parts."""
    position = block.index * BLOCK + PART * (BLOCK // PARTS) + tl.arange(0, BLOCK // PARTS)
    if HEAD.planes:
        plane = _planes_of_block(position, block, BLOCK)
        span = Span(plane.to(tl.int64) * ((width - 1) * block.num_cells) + position, block.num_cells)
    else:
        span = Span(position.to(tl.int64) * width, 1)
    return span


@triton.jit
def span_of(anchor, block, width, HEAD: tl.constexpr):
    """Where the `width` numbers of any anchors lie, which are counted from the level's first."""
    if HEAD.planes:
        cell = whole_quotient(anchor, block.per_cell)
        start = ((anchor - cell * block.per_cell) * width).to(tl.int64) * block.num_cells + cell
        span = Span(start, block.num_cells)
    else:
        span = Span(anchor.to(tl.int64) * width, 1)
    return span


@triton.jit
def tile_of_chunk(span, mask, chunk, HEAD: tl.constexpr):
    """For a tile of anchors and the classes of `chunk`: the classes, the offsets of the logits, which of them exist.

    Neighbouring threads take neighbours on the last axis of a tile. The numbers that are neighbours in memory lie on
    that axis: the classes in rows, the anchors in planes.
    """
    axis: tl.constexpr = 1 - HEAD.planes  # of the classes
    lane = tl.expand_dims(tl.arange(0, HEAD.chunk), 1 - axis)
    class_id = chunk * HEAD.chunk + lane
    # All chunks share the first sum, and in rows the second is a constant, which a load takes for nothing.
    offset = (tl.expand_dims(span.start, axis) + lane * span.stride) + chunk * HEAD.chunk * span.stride
    return class_id, offset, tl.expand_dims(mask, axis) & (class_id < HEAD.classes)


@triton.jit
def load_logits(logits_ptr, block, span, mask, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """All logits of a block of anchors in fp32, a tuple of tiles; -inf where none exists."""
    if HEAD.words > 0:
        logits = _load_logits_by_words(logits_ptr, block, mask, HEAD, BLOCK)
    else:
        logits = ()
        for chunk in tl.static_range((HEAD.classes + HEAD.chunk - 1) // HEAD.chunk):
            _, offset, inside = tile_of_chunk(span, mask, chunk, HEAD)
            logits += (tl.load(logits_ptr + offset, mask=inside, other=-float("inf")).to(tl.float32),)
    return logits


@triton.jit
def _load_logits_by_words(logits_ptr, block, mask, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The logits of anchors in rows: two tiles from each tile of words, and one of the class left over if C is odd.

    If C is odd, the row of every second anchor begins in the middle of a word. There the class left over is the
    background, otherwise the last class. The number of anchors of a block is even, so that it begins with a word.
    """
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    logits_ptr += block.index.to(tl.int64) * (BLOCK * HEAD.classes)
    anchor = tl.arange(0, BLOCK)[:, None]
    word = tl.arange(0, HEAD.words)[None, :]
    word_ptr = logits_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    # (anchor * C + 1) // 2, of which a thread's anchors share all but a constant.
    word_ptr = word_ptr + (anchor // 2 * HEAD.classes + anchor % 2 * ((HEAD.classes + 1) // 2) + word)
    mask = mask[:, None]
    logits = ()
    for chunk in tl.static_range((HEAD.classes // 2 + HEAD.words - 1) // HEAD.words):
        inside = mask & (chunk * HEAD.words + word < HEAD.classes // 2)
        # The word in place of one that does not exist is -inf twice.
        if dtype == tl.bfloat16:
            words = tl.load(word_ptr + chunk * HEAD.words, mask=inside, other=-0x7F0080)
            logits += ((words << 16).to(tl.float32, bitcast=True), (words & -0x10000).to(tl.float32, bitcast=True))
        else:
            words = tl.load(word_ptr + chunk * HEAD.words, mask=inside, other=-0x3FF0400)
            logits += (words.to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)
            logits += ((words >> 16).to(tl.int16).to(dtype, bitcast=True).to(tl.float32),)
    if HEAD.classes % 2 == 1:
        left_over = tl.where(anchor % 2 == 0, HEAD.classes - 1, 0)
        left_over_ptr = logits_ptr + (anchor * HEAD.classes + left_over + word)
        logits += (tl.load(left_over_ptr, mask=mask & (word == 0), other=-float("inf")).to(tl.float32),)
    return logits


@triton.jit
def best_foreground(powers, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The largest power of a class other than the background, for each anchor of a block; `powers` from `softmax`."""
    axis: tl.constexpr = 1 - HEAD.planes  # of the classes
    has_left_over: tl.constexpr = HEAD.classes % 2 if HEAD.words > 0 else 0  # every second one is the background
    if HEAD.words > 0:
        begins_with_word = tl.arange(0, BLOCK)[:, None] % 2 * has_left_over == 0
        is_background = begins_with_word & (tl.arange(0, HEAD.words)[None, :] == 0)
    else:
        is_background = tl.expand_dims(tl.arange(0, HEAD.chunk), 1 - axis) == 0
    best = tl.where(is_background, 0.0, powers[0])
    for tile in tl.static_range(1, len(powers) - has_left_over):
        best = tl.maximum(best, powers[tile])
    if has_left_over:
        best = tl.maximum(best, tl.where(begins_with_word, powers[len(powers) - 1], 0.0))
    return _one_per_thread(tl.max(best, axis=axis))


@triton.jit
def _one_per_thread(x):
    """`x` [N] with its elements shared out among the threads.

    A reduction leaves each element in every thread that took part in it, and all of them would do what follows.
    """
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def exp_difference(logit, top):
    """exp(logit - top); a result below the smallest normal number is 0."""
    # `tl.exp` keeps such results, at the price of three more instructions.
    return tl.exp2((logit - top) * LOG2_E)


@triton.jit
def softmax(logits, HEAD: tl.constexpr):
    """For each anchor the largest logit, and the sum of exp(logit - largest); and these powers, a tuple of tiles."""
    axis: tl.constexpr = 1 - HEAD.planes  # of the classes
    top = logits[0]
    for tile in tl.static_range(1, len(logits)):
        top = tl.maximum(top, logits[tile])
    top = tl.max(top, axis=axis)
    powers = ()
    for tile in tl.static_range(len(logits)):
        powers += (exp_difference(logits[tile], tl.expand_dims(top, axis)),)
    total = powers[0]
    for tile in tl.static_range(1, len(logits)):
        total += powers[tile]
    return _one_per_thread(top), _one_per_thread(tl.sum(total, axis=axis)), powers


@triton.jit
def load_deltas(deltas_ptr, anchor, block, mask, HEAD: tl.constexpr):
    """The deltas of each anchor in fp32; 0 where `mask` is false."""
    if HEAD.planes:
        span = span_of(anchor, block, 4, HEAD)
        deltas = Deltas(
            tl.load(deltas_ptr + span.start, mask=mask, other=0.0).to(tl.float32),
            tl.load(deltas_ptr + span.start + span.stride, mask=mask, other=0.0).to(tl.float32),
            tl.load(deltas_ptr + span.start + span.stride * 2, mask=mask, other=0.0).to(tl.float32),
            tl.load(deltas_ptr + span.start + span.stride * 3, mask=mask, other=0.0).to(tl.float32),
        )
    else:
        deltas = boxmath.load_deltas(deltas_ptr, anchor.to(tl.int64), mask)
    return deltas


@triton.jit
def store_deltas(deltas_ptr, anchor, span, deltas, mask, HEAD: tl.constexpr):
    """Store the deltas of each anchor, which lie at `span`."""
    if HEAD.planes:
        tl.store(deltas_ptr + span.start, deltas.x, mask=mask)
        tl.store(deltas_ptr + span.start + span.stride, deltas.y, mask=mask)
        tl.store(deltas_ptr + span.start + span.stride * 2, deltas.w, mask=mask)
        tl.store(deltas_ptr + span.start + span.stride * 3, deltas.h, mask=mask)
    else:
        boxmath.store_deltas(deltas_ptr, anchor.to(tl.int64), deltas, mask)
