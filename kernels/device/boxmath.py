"""Geometry of boxes for kernels, step by step as in the eager code.

The order of operations is that of `eager.py`, and division is IEEE (`tl.div_rn`; Triton's `/` is approximate), because
a decision may depend on the last bit. Launches add the option `EXACT`, which forbids fused multiply-adds.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ssdcore.kernels import rules
from ssdcore.kernels.device.arithmetic import fused_multiply_add, half_step
from ssdcore.kernels.device.constant import Constant

MAX_LOG_SCALE = Constant(rules.MAX_LOG_SCALE)
LEAST_AREA = Constant(2.0**-80)  # areas and thresholds from these on have products far from underflow
LEAST_THRESHOLD = Constant(2.0**-10)


class Box(NamedTuple):
    """Corners of boxes, one tensor per corner coordinate."""

    x1: tl.tensor
    y1: tl.tensor
    x2: tl.tensor
    y2: tl.tensor


class Deltas(NamedTuple):
    """Boxes as offsets from anchors: of the centre and of the logarithm of the size."""

    x: tl.tensor
    y: tl.tensor
    w: tl.tensor
    h: tl.tensor


class Weights(NamedTuple):
    """Factors of the four deltas; 1 / the variances of the SSD paper."""

    x: float
    y: float
    w: float
    h: float


class IouLimit(NamedTuple):
    """A threshold of the IoU, as `iou_exceeds` takes it."""

    threshold: tl.tensor
    half_step: tl.tensor  # half the distance to the next larger number
    least_area: tl.tensor  # the comparison is exact for areas from here on


@triton.jit
def _load_fours(ptr, index, mask):
    """The four numbers at a block of `index` in `ptr` [..., 4], in fp32; 0 where `mask` is false.

    A thread loads all four at once: 16 bytes of fp32.
    """
    offset = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    numbers = tl.load(ptr + offset, mask=mask[:, None], other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(numbers, (index.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _store_fours(ptr, index, first, second, third, fourth, mask):
    """Store four numbers at a block of `index` in `ptr` [..., 4]."""
    offset = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    numbers = tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (index.shape[0], 4))
    tl.store(ptr + offset, numbers, mask=mask[:, None])


@triton.jit
def load_box(boxes_ptr, index, mask):
    """The boxes at a block of `index` in `boxes_ptr` [..., 4], in fp32; a box without area where `mask` is false."""
    x1, y1, x2, y2 = _load_fours(boxes_ptr, index, mask)
    return Box(x1, y1, x2, y2)


@triton.jit
def store_box(boxes_ptr, index, box, mask):
    """Store `box` at a block of `index` in `boxes_ptr` [..., 4]."""
    _store_fours(boxes_ptr, index, box.x1, box.y1, box.x2, box.y2, mask)


@triton.jit
def load_deltas(deltas_ptr, index, mask):
    """The deltas at a block of `index` in `deltas_ptr` [..., 4], in fp32; 0 where `mask` is false."""
    dx, dy, dw, dh = _load_fours(deltas_ptr, index, mask)
    return Deltas(dx, dy, dw, dh)


@triton.jit
def store_deltas(deltas_ptr, index, deltas, mask):
    """Store `deltas` at a block of `index` in `deltas_ptr` [..., 4]."""
    _store_fours(deltas_ptr, index, deltas.x, deltas.y, deltas.w, deltas.h, mask)


@triton.jit
def load_box_by_coordinate(boxes_ptr, index):
    """The boxes at a block of `index` in `boxes_ptr` [..., 4], in fp32, with one load per coordinate.

    For a few boxes that every thread needs: `load_box` would give each box to one thread, which would have to share it.
    """
    corner = boxes_ptr + index * 4
    x1 = tl.load(corner).to(tl.float32)
    y1 = tl.load(corner + 1).to(tl.float32)
    x2 = tl.load(corner + 2).to(tl.float32)
    y2 = tl.load(corner + 3).to(tl.float32)
    return Box(x1, y1, x2, y2)


@triton.jit
def rows(box):
    """Boxes [N] as a column [N, 1], to pair them with `columns` of other boxes."""
    return Box(box.x1[:, None], box.y1[:, None], box.x2[:, None], box.y2[:, None])


@triton.jit
def columns(box):
    """Boxes [M] as a row [1, M], to pair them with `rows` of other boxes."""
    return Box(box.x1[None, :], box.y1[None, :], box.x2[None, :], box.y2[None, :])


@triton.jit
def area(box):
    """The area of boxes; negative where one side is."""
    return (box.x2 - box.x1) * (box.y2 - box.y1)


@triton.jit
def intersection_sides(a, b):
    """Width and height of the intersection of boxes, the width not below 0.

    Either side may be negative where boxes do not intersect. One of both must not be, because the product of two
    negative sides would count as an area.
    """
    # `min` and `max` may drop a NaN here, because the area brings the NaN back.
    width = tl.maximum(tl.minimum(a.x2, b.x2) - tl.maximum(a.x1, b.x1), 0.0)
    return width, tl.minimum(a.y2, b.y2) - tl.maximum(a.y1, b.y1)


# Most pairs of boxes do not intersect, and IEEE division takes a slow path when the dividend is zero. Such pairs divide
# 1 instead, and the quotient is not used.


@triton.jit
def iou(a, b):
    """IoU of two boxes, elementwise; 0/0 is NaN."""
    width, height = intersection_sides(a, b)
    intersection = width * tl.maximum(height, 0.0)
    union = area(a) + area(b) - intersection
    intersects = intersection > 0
    quotient = tl.div_rn(tl.where(intersects, intersection, 1.0), union)
    zero_over_union = tl.where(union > 0, 0.0, tl.where(union < 0, -0.0, float("nan")))
    return tl.where(intersects, quotient, zero_over_union)


@triton.jit
def iou_or_zero(a, b):
    """IoU of two boxes, elementwise; 0 wherever they do not intersect.

    This is enough for a comparison with a threshold of 0 or more.
    """
    width, height = intersection_sides(a, b)
    intersection = width * height  # not above 0 unless both sides are
    union = area(a) + area(b) - intersection
    intersects = intersection > 0
    return tl.where(intersects, tl.div_rn(tl.where(intersects, intersection, 1.0), union), 0.0)


@triton.jit
def iou_limit(threshold):
    """A threshold of 0 or more, for `iou_exceeds`."""
    least_area = tl.where(threshold >= LEAST_THRESHOLD, LEAST_AREA, float("inf"))
    return IouLimit(threshold, half_step(threshold), least_area)


@triton.jit
def areas_are_usual(box, limit):
    """Whether no box of a row [1, M] has an area so small that `iou_exceeds` cannot decide without division."""
    box_area = area(box)
    is_unusual = ((box_area > 0) & (box_area < limit.least_area)).to(tl.int32)
    # Along the row first, which a warp has to itself.
    return tl.max(tl.max(is_unusual, axis=1)) == 0


@triton.jit
def iou_exceeds(a, b, limit, b_is_usual):
    """Whether the IoU of boxes, elementwise, exceeds the threshold: `iou_or_zero(a, b) > threshold`, to the last bit.

    The quotient I / U of two numbers rounds to more than t if and only if it is larger than t + h, where h is half the
    distance from t to the next number. It is never t + h itself, which has a bit more than I can have if it is to be a
    product with U. So the question is whether I - t U exceeds h U. Near that border, I - t U is a number without
    rounding, and far from it, rounding does not carry it across.

    Args:
        a, b: boxes.
        limit: the threshold.
        b_is_usual: `areas_are_usual(b, limit)`, a scalar. The union is at least as large as `b` here, because boxes
            without a positive area overlap nothing.
    """
    if b_is_usual:
        width, height = intersection_sides(a, b)
        intersection = width * height  # not above 0 unless both sides are
        union = _area_or_zero(a) + _area_or_zero(b) - intersection
        excess = fused_multiply_add(-limit.threshold, union, intersection)
        exceeds = excess > limit.half_step * union
    else:
        exceeds = iou_or_zero(a, b) > limit.threshold
    return exceeds


@triton.jit
def _area_or_zero(box):
    """The area of boxes, 0 where it is negative; a NaN stays a NaN."""
    return tl.maximum(area(box), 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def encode(box, anchor, weights):
    """The deltas that turn `anchor` into `box`."""
    width = box.x2 - box.x1
    height = box.y2 - box.y1
    anchor_width = anchor.x2 - anchor.x1
    anchor_height = anchor.y2 - anchor.y1
    dx = tl.div_rn(weights.x * ((box.x1 + 0.5 * width) - (anchor.x1 + 0.5 * anchor_width)), anchor_width)
    dy = tl.div_rn(weights.y * ((box.y1 + 0.5 * height) - (anchor.y1 + 0.5 * anchor_height)), anchor_height)
    dw = weights.w * tl.log(tl.div_rn(width, anchor_width))
    dh = weights.h * tl.log(tl.div_rn(height, anchor_height))
    return Deltas(dx, dy, dw, dh)


@triton.jit
def decode(deltas, anchor, weights):
    """The box that `deltas` make of `anchor`; a NaN stays a NaN."""
    anchor_width = anchor.x2 - anchor.x1
    anchor_height = anchor.y2 - anchor.y1
    cx = tl.div_rn(deltas.x, weights.x) * anchor_width + (anchor.x1 + 0.5 * anchor_width)
    cy = tl.div_rn(deltas.y, weights.y) * anchor_height + (anchor.y1 + 0.5 * anchor_height)
    log_width = tl.minimum(tl.div_rn(deltas.w, weights.w), MAX_LOG_SCALE, propagate_nan=tl.PropagateNan.ALL)
    log_height = tl.minimum(tl.div_rn(deltas.h, weights.h), MAX_LOG_SCALE, propagate_nan=tl.PropagateNan.ALL)
    half_width = 0.5 * (tl.exp(log_width) * anchor_width)
    half_height = 0.5 * (tl.exp(log_height) * anchor_height)
    return Box(cx - half_width, cy - half_height, cx + half_width, cy + half_height)
