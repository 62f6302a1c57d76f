"""Kernels for the IoU of every pair of boxes, box encoding, box decoding and the gradient of decoding.

`box_iou`: one launch. A program makes a tile of the result from two strips of boxes. It moves 4 bytes per pair, and
16 bytes (8 in 16 bits) for each row and each column of a tile.

Encoding, decoding, gradient: one launch each, elementwise. Per box, the kernels read 16 bytes of box or deltas (8 in 16
bits) and 16 bytes of its anchor, and write 16. The gradient reads another 16 bytes and writes in the dtype of the
deltas. Anchors that a batch shares come from the cache.

No kernel needs scratch memory. The gradient of decoding, where s = exp(min(dw / ww, MAX_LOG_SCALE)) is the scale of the
anchor's width W, x1 = cx - s W / 2 and x2 = cx + s W / 2 (y alike):

    d/d dx = (g_x1 + g_x2) W / wx        d/d dw = (g_x2 - g_x1) / 2 * s W / ww, and 0 where dw / ww is clamped
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.device.boxmath import (
    MAX_LOG_SCALE,
    Deltas,
    Weights,
    columns,
    decode,
    encode,
    iou,
    load_box,
    load_deltas,
    rows,
    store_box,
    store_deltas,
)
from ssdcore.kernels.rules import EXACT

IOU_ROWS = 32  # boxes1 per program: with 128 columns, 32 pairs per thread
IOU_COLUMNS = 128  # boxes2 per program: one row of a tile is four lines of 128 bytes
BLOCK_BOXES = 256  # boxes per program of the other kernels: two per thread at four warps


@triton.jit
def _box_iou_kernel(
    boxes1_ptr,  # [N, 4] xyxy
    boxes2_ptr,  # [M, 4] xyxy
    iou_ptr,  # [N, M]
    num_boxes1,
    num_boxes2,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # The grid has one axis, because a second one ends at 65,535 programs: 8 million boxes.
    num_strips = tl.cdiv(num_boxes2, COLUMNS)
    row = tl.program_id(0) // num_strips * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) % num_strips * COLUMNS + tl.arange(0, COLUMNS)
    boxes1 = load_box(boxes1_ptr, row, row < num_boxes1)
    boxes2 = load_box(boxes2_ptr, column, column < num_boxes2)
    value = iou(rows(boxes1), columns(boxes2))
    # int64: N * M passes 2**31 from 46,341 boxes against themselves
    offset = row[:, None].to(tl.int64) * num_boxes2 + column[None, :]
    tl.store(iou_ptr + offset, value, mask=(row < num_boxes1)[:, None] & (column < num_boxes2)[None, :])


@triton.jit
def _boxes_of_program(num_boxes, BLOCK: tl.constexpr):
    """The boxes that this program computes, and which of them exist."""
    # int64: 4 * box passes 2**31 from 2**29 boxes
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return box, box < num_boxes


@triton.jit
def _encode_boxes_kernel(
    boxes_ptr,  # [num_boxes, 4] xyxy
    anchors_ptr,  # [num_anchors, 4] xyxy; box n belongs to anchor n % num_anchors
    deltas_ptr,  # [num_boxes, 4]
    num_boxes,
    num_anchors,
    weights,  # Weights
    BLOCK: tl.constexpr,
):
    index, mask = _boxes_of_program(num_boxes, BLOCK)
    box = load_box(boxes_ptr, index, mask)
    anchor = load_box(anchors_ptr, index % num_anchors, mask)
    store_deltas(deltas_ptr, index, encode(box, anchor, weights), mask)


@triton.jit
def _decode_boxes_kernel(
    deltas_ptr,  # [num_boxes, 4]
    anchors_ptr,  # [num_anchors, 4] xyxy; box n belongs to anchor n % num_anchors
    boxes_ptr,  # [num_boxes, 4] xyxy
    num_boxes,
    num_anchors,
    weights,  # Weights
    BLOCK: tl.constexpr,
):
    index, mask = _boxes_of_program(num_boxes, BLOCK)
    deltas = load_deltas(deltas_ptr, index, mask)
    anchor = load_box(anchors_ptr, index % num_anchors, mask)
    store_box(boxes_ptr, index, decode(deltas, anchor, weights), mask)


@triton.jit
def _decode_boxes_backward_kernel(
    grad_boxes_ptr,  # [num_boxes, 4]
    deltas_ptr,  # [num_boxes, 4]
    anchors_ptr,  # [num_anchors, 4] xyxy; box n belongs to anchor n % num_anchors
    grad_deltas_ptr,  # [num_boxes, 4]
    num_boxes,
    num_anchors,
    weights,  # Weights
    BLOCK: tl.constexpr,
):
    index, mask = _boxes_of_program(num_boxes, BLOCK)
    grad = load_box(grad_boxes_ptr, index, mask)
    deltas = load_deltas(deltas_ptr, index, mask)
    anchor = load_box(anchors_ptr, index % num_anchors, mask)
    anchor_width = anchor.x2 - anchor.x1
    anchor_height = anchor.y2 - anchor.y1
    log_width = tl.div_rn(deltas.w, weights.w)
    log_height = tl.div_rn(deltas.h, weights.h)
    width_slope = tl.where(log_width <= MAX_LOG_SCALE, tl.exp(log_width) * anchor_width, 0.0)
    height_slope = tl.where(log_height <= MAX_LOG_SCALE, tl.exp(log_height) * anchor_height, 0.0)
    grad_deltas = Deltas(
        tl.div_rn((grad.x1 + grad.x2) * anchor_width, weights.x),
        tl.div_rn((grad.y1 + grad.y2) * anchor_height, weights.y),
        tl.div_rn(0.5 * (grad.x2 - grad.x1) * width_slope, weights.w),
        tl.div_rn(0.5 * (grad.y2 - grad.y1) * height_slope, weights.h),
    )
    store_deltas(grad_deltas_ptr, index, grad_deltas, mask)


def launch_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    num_boxes1, num_boxes2 = len(boxes1), len(boxes2)
    iou_matrix = torch.empty(num_boxes1, num_boxes2, dtype=torch.float32, device=boxes1.device)
    if iou_matrix.numel() == 0:
        return iou_matrix
    _box_iou_kernel[(triton.cdiv(num_boxes1, IOU_ROWS) * triton.cdiv(num_boxes2, IOU_COLUMNS),)](
        boxes1_ptr=boxes1.contiguous(),
        boxes2_ptr=boxes2.contiguous(),
        iou_ptr=iou_matrix,
        num_boxes1=num_boxes1,
        num_boxes2=num_boxes2,
        ROWS=IOU_ROWS,
        COLUMNS=IOU_COLUMNS,
        num_warps=4,
        **EXACT,
    )
    return iou_matrix


def launch_encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    _assert_anchors_repeat(boxes, anchors)
    deltas = torch.empty(boxes.shape, dtype=torch.float32, device=boxes.device)
    num_boxes = deltas.numel() // 4
    if num_boxes:
        _encode_boxes_kernel[(triton.cdiv(num_boxes, BLOCK_BOXES),)](
            boxes_ptr=boxes.contiguous(),
            anchors_ptr=anchors.contiguous(),
            deltas_ptr=deltas,
            num_boxes=num_boxes,
            num_anchors=anchors.numel() // 4,
            weights=Weights(*weights),
            BLOCK=BLOCK_BOXES,
            num_warps=4,
            **EXACT,
        )
    return deltas


def launch_decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    _assert_anchors_repeat(deltas, anchors)
    boxes = torch.empty(deltas.shape, dtype=torch.float32, device=deltas.device)
    num_boxes = boxes.numel() // 4
    if num_boxes:
        _decode_boxes_kernel[(triton.cdiv(num_boxes, BLOCK_BOXES),)](
            deltas_ptr=deltas.contiguous(),
            anchors_ptr=anchors.contiguous(),
            boxes_ptr=boxes,
            num_boxes=num_boxes,
            num_anchors=anchors.numel() // 4,
            weights=Weights(*weights),
            BLOCK=BLOCK_BOXES,
            num_warps=4,
            **EXACT,
        )
    return boxes


def launch_decode_boxes_backward(grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    _assert_anchors_repeat(deltas, anchors)
    grad_deltas = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    num_boxes = grad_deltas.numel() // 4
    if num_boxes:
        _decode_boxes_backward_kernel[(triton.cdiv(num_boxes, BLOCK_BOXES),)](
            grad_boxes_ptr=grad.contiguous(),
            deltas_ptr=deltas.contiguous(),
            anchors_ptr=anchors.contiguous(),
            grad_deltas_ptr=grad_deltas,
            num_boxes=num_boxes,
            num_anchors=anchors.numel() // 4,
            weights=Weights(*weights),
            BLOCK=BLOCK_BOXES,
            num_warps=4,
            **EXACT,
        )
    return grad_deltas


def _assert_anchors_repeat(boxes: Tensor, anchors: Tensor) -> None:
    """The anchors repeat over the leading dimensions of `boxes`."""
    assert boxes.shape[boxes.dim() - anchors.dim() :] == anchors.shape
