"""Where a detector's head leaves its outputs, and how a program of a kernel finds its part of them there.

A level is one map's outputs seen as [B, P, a, C]: P cells, each with a anchors. It is read where it lies, in one of two
layouts, the same for all levels:

- rows, [P, a, C] an image: packed outputs [B, A, C], which are one level, and maps in channels_last. A row's logits
  are neighbours.
- planes, [a, C, P] an image: maps in NCHW. A class's logits are neighbours.

Anchors are numbered level after level, cell after cell. A block is some consecutive anchors of one level, in the order
of memory; a kernel's blocks are those of all levels, one level after the other. So one launch serves all levels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import load_box, store_box
from ssdcore.kernels.eager import in_planes

TILE = 8192  # logits a program has at once, the last piece's padding included: 64 a thread at four warps
TILE_ANCHORS = 64  # at most: with 81 classes 48 logits a thread, and registers for seven programs a multiprocessor


@dataclass(frozen=True)
class Head:
    """What the kernels are told of a head's outputs, as tuples of a level each."""

    logits: tuple[Tensor, ...]  # [B, P, a, C]
    deltas: tuple[Tensor, ...]  # [B, P, a, 4]
    planes: bool

    @classmethod
    def of(cls, cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor]) -> "Head":
        """Copies only what lies in neither layout."""
        planes = in_planes([*cls_logits, *box_deltas])

        def readable(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
            return tuple(x if planes or not len(x) or x[0].is_contiguous() else x.contiguous() for x in levels)

        return cls(readable(cls_logits), readable(box_deltas), planes)

    @property
    def cells(self) -> tuple[int, ...]:
        return tuple(x.shape[1] for x in self.logits)

    @property
    def per_cell(self) -> tuple[int, ...]:
        return tuple(x.shape[2] for x in self.logits)

    @property
    def strides(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """From one image to the next, of the logits and of the deltas."""
        return tuple(x.stride(0) for x in self.logits), tuple(x.stride(0) for x in self.deltas)

    def blocks(self, size: int) -> int:
        """How many blocks of `size` anchors an image has."""
        return sum(triton.cdiv(a * b, size) for a, b in zip(self.cells, self.per_cell, strict=True))


def tile(num_classes: int) -> tuple[int, int]:
    """Anchors and classes that a program has in its registers at once.

    Classes in pieces whose sum exceeds them little, 81 as six times 16: a power of two would be 128.
    """
    chunk = max(16, triton.next_power_of_2(num_classes) // 8)
    columns = triton.cdiv(num_classes, chunk) * chunk
    return max(1, min(TILE_ANCHORS, TILE // triton.next_power_of_2(columns))), chunk


@triton.jit
def pick(values, level):
    """`values[level]`, of a tuple of pointers."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        if level == i:
            value = values[i]
    return value


@triton.jit
def pick_int(values, level):
    """`values[level]`, of a tuple of integers, as int64."""
    # Triton makes an argument of 1 a constant: only the cast gives all one type.
    value = tl.cast(values[0], tl.int64)
    for i in tl.static_range(1, len(values)):
        value = tl.where(level == i, tl.cast(values[i], tl.int64), value)
    return value


@triton.jit
def locate(block, cells, per_cell, BLOCK: tl.constexpr):
    """The level of a block, its number on the level, the level's first anchor, cells and anchors a cell."""
    level = tl.cast(0, tl.int32)
    blocks_before = tl.cast(0, tl.int32)
    first_anchor = tl.cast(0, tl.int32)
    blocks = tl.cast(0, tl.int32)
    anchors = tl.cast(0, tl.int32)
    for i in tl.static_range(1, len(cells)):
        size = tl.cast(cells[i - 1], tl.int32) * per_cell[i - 1]
        blocks += tl.cdiv(size, BLOCK)
        anchors += size
        beyond = block >= blocks
        level = tl.where(beyond, i, level)
        blocks_before = tl.where(beyond, blocks, blocks_before)
        first_anchor = tl.where(beyond, anchors, first_anchor)
    num_cells = pick_int(cells, level).to(tl.int32)
    return level, block - blocks_before, first_anchor, num_cells, pick_int(per_cell, level).to(tl.int32)


@triton.jit
def anchors_of_block(block, num_cells, per_cell, PLANES: tl.constexpr, BLOCK: tl.constexpr):
    """The anchors of a level's block, counted from the level's first, and which of them there are."""
    anchor = block * BLOCK + tl.arange(0, BLOCK)
    mask = anchor < num_cells * per_cell
    if PLANES:
        anchor = (anchor % num_cells) * per_cell + anchor // num_cells
    return anchor, mask


@triton.jit
def first_number(anchor, num_cells, per_cell, width, PLANES: tl.constexpr):
    """Where in an image's level an anchor's `width` numbers begin, and how far apart they lie."""
    start, stride = anchor.to(tl.int64) * width, 1
    if PLANES:
        start, stride = (anchor % per_cell * width).to(tl.int64) * num_cells + anchor // per_cell, num_cells
    return start, stride


@triton.jit
def logit_tile(start, stride, mask, chunk, CLASSES: tl.constexpr, CHUNK: tl.constexpr, PLANES: tl.constexpr):
    """The classes of a piece, and of a tile of them and of anchors the places and which there are.

    Classes are the tile's first axis in planes, the second in rows: the last is what neighbouring threads share out.
    """
    axis: tl.constexpr = 1 - PLANES  # of the classes
    category = tl.expand_dims(chunk * CHUNK + tl.arange(0, CHUNK), 1 - axis)
    return category, tl.expand_dims(start, axis) + category * stride, tl.expand_dims(mask, axis) & (category < CLASSES)


@triton.jit
def load_logits(logits_ptr, start, stride, mask, CLASSES: tl.constexpr, CHUNK: tl.constexpr, PLANES: tl.constexpr):
    """All logits of a block of anchors, a tuple of tiles, -inf where there are none."""
    logits = ()
    for chunk in tl.static_range((CLASSES + CHUNK - 1) // CHUNK):
        _, place, inside = logit_tile(start, stride, mask, chunk, CLASSES, CHUNK, PLANES)
        logits += (tl.load(logits_ptr + place, mask=inside, other=-float("inf")).to(tl.float32),)
    return logits


@triton.jit
def _one_a_thread(x):
    """`x` [N] anew, its elements shared out: a reduction leaves each to as many threads as had a part in it, and what
    follows would be done by all of them."""
    return tl.gather(x, tl.arange(0, x.shape[0]), 0)


@triton.jit
def power(logit, top):
    """e to the difference of two logits; what is less than the least normal number is 0."""
    # `tl.exp` keeps such numbers, with three more instructions for each.
    return tl.exp2((logit - top) * 1.4426950408889634)


@triton.jit
def softmax(logits, PLANES: tl.constexpr):
    """Of each anchor the largest logit and the sum of what is left of each; and the latter, a tuple of tiles."""
    axis: tl.constexpr = 1 - PLANES
    top = logits[0]
    for chunk in tl.static_range(1, len(logits)):
        top = tl.maximum(top, logits[chunk])
    top = _one_a_thread(tl.max(top, axis=axis))
    powers = ()
    for chunk in tl.static_range(len(logits)):
        powers += (power(logits[chunk], tl.expand_dims(top, axis)),)
    total = powers[0]
    for chunk in tl.static_range(1, len(logits)):
        total += powers[chunk]
    return top, _one_a_thread(tl.sum(total, axis=axis)), powers


@triton.jit
def load_deltas(deltas_ptr, anchor, num_cells, per_cell, mask, PLANES: tl.constexpr):
    """The four deltas of each anchor in fp32; where `mask` is false, 0."""
    if PLANES:
        start, stride = first_number(anchor, num_cells, per_cell, 4, PLANES)
        dx = tl.load(deltas_ptr + start, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(deltas_ptr + start + stride, mask=mask, other=0.0).to(tl.float32)
        dw = tl.load(deltas_ptr + start + stride * 2, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(deltas_ptr + start + stride * 3, mask=mask, other=0.0).to(tl.float32)
    else:
        dx, dy, dw, dh = load_box(deltas_ptr, anchor.to(tl.int64), mask)
    return dx, dy, dw, dh


@triton.jit
def store_deltas(deltas_ptr, anchor, num_cells, per_cell, dx, dy, dw, dh, mask, PLANES: tl.constexpr):
    if PLANES:
        start, stride = first_number(anchor, num_cells, per_cell, 4, PLANES)
        tl.store(deltas_ptr + start, dx, mask=mask)
        tl.store(deltas_ptr + start + stride, dy, mask=mask)
        tl.store(deltas_ptr + start + stride * 2, dw, mask=mask)
        tl.store(deltas_ptr + start + stride * 3, dh, mask=mask)
    else:
        store_box(deltas_ptr, anchor.to(tl.int64), dx, dy, dw, dh, mask)
