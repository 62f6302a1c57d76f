"""Device code shared by the kernels: geometry of boxes, step for step as in `eager`."""

import triton
import triton.language as tl

# These spell out `eager`'s order of operations. Division is IEEE (`/` is approximate in Triton), and every launch says
# enable_fp_fusion=False: a fused multiply-add rounds differently, and a decision may hang on the last bit.


@triton.jit
def load_box(boxes_ptr, index, mask):
    """x1, y1, x2, y2 of `boxes_ptr` [..., 4] at a block of `index`, in fp32; where `mask` is false, a box without area.

    A box a thread, in one load of 16 bytes.
    """
    cell = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    boxes = tl.load(boxes_ptr + cell, mask=mask[:, None], other=0.0).to(tl.float32)
    x, y = tl.split(tl.reshape(boxes, (index.shape[0], 2, 2)))
    x1, x2 = tl.split(x)
    y1, y2 = tl.split(y)
    return x1, y1, x2, y2


@triton.jit
def load_one_box(boxes_ptr, index, mask):
    """The same at a scalar `index`."""
    corner = boxes_ptr + index * 4
    x1 = tl.load(corner, mask=mask, other=0.0).to(tl.float32)
    y1 = tl.load(corner + 1, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(corner + 2, mask=mask, other=0.0).to(tl.float32)
    y2 = tl.load(corner + 3, mask=mask, other=0.0).to(tl.float32)
    return x1, y1, x2, y2


@triton.jit
def store_box(boxes_ptr, index, x1, y1, x2, y2, mask):
    cell = index[:, None] * 4 + tl.arange(0, 4)[None, :]
    boxes = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (index.shape[0], 4))
    tl.store(boxes_ptr + cell, boxes, mask=mask[:, None])


@triton.jit
def _intersection_and_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """NaN needs no care in min and max: it comes back through the area."""
    width = tl.maximum(tl.minimum(ax2, bx2) - tl.maximum(ax1, bx1), 0.0)
    height = tl.maximum(tl.minimum(ay2, by2) - tl.maximum(ay1, by1), 0.0)
    intersection = width * height
    return intersection, (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection


# Most pairs of boxes do not meet, and IEEE division takes a slow path for a dividend of zero: they divide 1, in vain.


@triton.jit
def iou(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """IoU of two boxes, elementwise; 0/0 is NaN."""
    intersection, union = _intersection_and_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    meet = intersection > 0
    quotient = tl.div_rn(tl.where(meet, intersection, 1.0), union)
    nothing = tl.where(union > 0, 0.0, tl.where(union < 0, -0.0, float("nan")))
    return tl.where(meet, quotient, nothing)


@triton.jit
def iou_or_zero(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2):
    """The same, but 0 wherever the boxes do not meet: enough for a comparison with a threshold of 0 or more."""
    intersection, union = _intersection_and_union(ax1, ay1, ax2, ay2, bx1, by1, bx2, by2)
    meet = intersection > 0
    return tl.where(meet, tl.div_rn(tl.where(meet, intersection, 1.0), union), 0.0)


@triton.jit
def encode(x1, y1, x2, y2, ax1, ay1, ax2, ay2, wx, wy, ww, wh):
    """Offsets of a box from an anchor."""
    width = x2 - x1
    height = y2 - y1
    anchor_width = ax2 - ax1
    anchor_height = ay2 - ay1
    dx = tl.div_rn(wx * ((x1 + 0.5 * width) - (ax1 + 0.5 * anchor_width)), anchor_width)
    dy = tl.div_rn(wy * ((y1 + 0.5 * height) - (ay1 + 0.5 * anchor_height)), anchor_height)
    dw = ww * tl.log(tl.div_rn(width, anchor_width))
    dh = wh * tl.log(tl.div_rn(height, anchor_height))
    return dx, dy, dw, dh


@triton.jit
def decode(dx, dy, dw, dh, ax1, ay1, ax2, ay2, wx, wy, ww, wh, max_log_scale):
    """The box at these offsets from an anchor."""
    anchor_width = ax2 - ax1
    anchor_height = ay2 - ay1
    cx = tl.div_rn(dx, wx) * anchor_width + (ax1 + 0.5 * anchor_width)
    cy = tl.div_rn(dy, wy) * anchor_height + (ay1 + 0.5 * anchor_height)
    log_width = tl.minimum(tl.div_rn(dw, ww), max_log_scale, propagate_nan=tl.PropagateNan.ALL)
    log_height = tl.minimum(tl.div_rn(dh, wh), max_log_scale, propagate_nan=tl.PropagateNan.ALL)
    half_width = 0.5 * (tl.exp(log_width) * anchor_width)
    half_height = 0.5 * (tl.exp(log_height) * anchor_height)
    return cx - half_width, cy - half_height, cx + half_width, cy + half_height
