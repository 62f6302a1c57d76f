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
from ssdcore.kernels.device.boxmath import Deltas
from ssdcore.kernels.device.constant import Constant
from ssdcore.kernels.levels import in_planes, rows_are_dense

TILE_LOGITS = 8192  # logits that a program holds at once, with padding: 64 per thread at four warps
MAX_TILE_ANCHORS = 64  # with 81 classes 48 logits per thread, so that seven programs fit a multiprocessor
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
    return levels, HeadShape(num_classes, chunk_of(num_classes), planes)


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
    num_blocks = tl.cast(0, tl.int32)
    num_anchors = tl.cast(0, tl.int32)
    for i in tl.static_range(1, len(levels.cells)):
        size = tl.cast(levels.cells[i - 1], tl.int32) * levels.per_cell[i - 1]
        num_blocks += tl.cdiv(size, BLOCK)
        num_anchors += size
        beyond = block_number >= num_blocks
        level = tl.where(beyond, i, level)
        blocks_before = tl.where(beyond, num_blocks, blocks_before)
        first_anchor = tl.where(beyond, num_anchors, first_anchor)
    num_cells = pick_int(levels.cells, level).to(tl.int32)
    per_cell = pick_int(levels.per_cell, level).to(tl.int32)
    return LevelBlock(level, block_number - blocks_before, first_anchor, num_cells, per_cell)


@triton.jit
def anchors_of_block(index, block, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    """The anchors of the level's block `index`, counted from the level's first anchor, and which of them exist.

    `index` is `block.index`, or counts smaller blocks if BLOCK is smaller.
    """
    anchor = index * BLOCK + tl.arange(0, BLOCK)
    exists = anchor < block.num_cells * block.per_cell
    if HEAD.planes:
        anchor = (anchor % block.num_cells) * block.per_cell + anchor // block.num_cells
    return anchor, exists


@triton.jit
def span_of(anchor, block, width, HEAD: tl.constexpr):
    """Where the `width` numbers of each anchor lie; anchors are counted from the level's first."""
    if HEAD.planes:
        start = (anchor % block.per_cell * width).to(tl.int64) * block.num_cells + anchor // block.per_cell
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
    class_id = tl.expand_dims(chunk * HEAD.chunk + tl.arange(0, HEAD.chunk), 1 - axis)
    offset = tl.expand_dims(span.start, axis) + class_id * span.stride
    return class_id, offset, tl.expand_dims(mask, axis) & (class_id < HEAD.classes)


@triton.jit
def load_logits(logits_ptr, span, mask, HEAD: tl.constexpr):
    """All logits of a block of anchors in fp32, a tuple with a tile for each chunk; -inf where none exists."""
    logits = ()
    for chunk in tl.static_range((HEAD.classes + HEAD.chunk - 1) // HEAD.chunk):
        _, offset, inside = tile_of_chunk(span, mask, chunk, HEAD)
        logits += (tl.load(logits_ptr + offset, mask=inside, other=-float("inf")).to(tl.float32),)
    return logits


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
    for chunk in tl.static_range(1, len(logits)):
        top = tl.maximum(top, logits[chunk])
    top = _one_per_thread(tl.max(top, axis=axis))
    powers = ()
    for chunk in tl.static_range(len(logits)):
        powers += (exp_difference(logits[chunk], tl.expand_dims(top, axis)),)
    total = powers[0]
    for chunk in tl.static_range(1, len(logits)):
        total += powers[chunk]
    return top, _one_per_thread(tl.sum(total, axis=axis)), powers


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
def store_deltas(deltas_ptr, anchor, block, deltas, mask, HEAD: tl.constexpr):
    """Store the deltas of each anchor."""
    if HEAD.planes:
        span = span_of(anchor, block, 4, HEAD)
        tl.store(deltas_ptr + span.start, deltas.x, mask=mask)
        tl.store(deltas_ptr + span.start + span.stride, deltas.y, mask=mask)
        tl.store(deltas_ptr + span.start + span.stride * 2, deltas.w, mask=mask)
        tl.store(deltas_ptr + span.start + span.stride * 3, deltas.h, mask=mask)
    else:
        boxmath.store_deltas(deltas_ptr, anchor.to(tl.int64), deltas, mask)
