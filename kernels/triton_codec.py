"""Encode boxes as offsets from anchors, decode them, and the gradient of decoding.

One elementwise pass, a box a lane: reads 16 bytes of boxes and 16 of anchors (8 in 16 bits; anchors shared by a
batch come from the cache), writes 16. No scratch memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssdcore.kernels.boxmath import decode, encode, load_box, store_box
from ssdcore.kernels.eager import MAX_LOG_SCALE

BLOCK = 256  # boxes a program: two a thread at four warps


@triton.jit
def _encode_boxes_kernel(
    boxes_ptr,  # [num_boxes, 4] xyxy
    anchors_ptr,  # [num_anchors, 4] xyxy; box n belongs to anchor n % num_anchors
    deltas_ptr,  # [num_boxes, 4]
    num_boxes,
    num_anchors,
    wx,
    wy,
    ww,
    wh,
    BLOCK: tl.constexpr,
):
    # int64: 4 * box passes 2**31 from 2**29 boxes
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = box < num_boxes
    x1, y1, x2, y2 = load_box(boxes_ptr, box, mask)
    ax1, ay1, ax2, ay2 = load_box(anchors_ptr, box % num_anchors, mask)
    dx, dy, dw, dh = encode(x1, y1, x2, y2, ax1, ay1, ax2, ay2, wx, wy, ww, wh)
    store_box(deltas_ptr, box, dx, dy, dw, dh, mask)


@triton.jit
def _decode_boxes_kernel(
    deltas_ptr,  # [num_boxes, 4]
    anchors_ptr,  # [num_anchors, 4] xyxy
    boxes_ptr,  # [num_boxes, 4] xyxy
    num_boxes,
    num_anchors,
    wx,
    wy,
    ww,
    wh,
    max_log_scale,
    BLOCK: tl.constexpr,
):
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = box < num_boxes
    dx, dy, dw, dh = load_box(deltas_ptr, box, mask)
    ax1, ay1, ax2, ay2 = load_box(anchors_ptr, box % num_anchors, mask)
    x1, y1, x2, y2 = decode(dx, dy, dw, dh, ax1, ay1, ax2, ay2, wx, wy, ww, wh, max_log_scale)
    store_box(boxes_ptr, box, x1, y1, x2, y2, mask)


@triton.jit
def _decode_boxes_backward_kernel(
    grad_boxes_ptr,  # [num_boxes, 4]
    deltas_ptr,  # [num_boxes, 4]
    anchors_ptr,  # [num_anchors, 4] xyxy
    grad_deltas_ptr,  # [num_boxes, 4]
    num_boxes,
    num_anchors,
    wx,
    wy,
    ww,
    wh,
    max_log_scale,
    BLOCK: tl.constexpr,
):
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = box < num_boxes
    gx1, gy1, gx2, gy2 = load_box(grad_boxes_ptr, box, mask)
    _dx, _dy, dw, dh = load_box(deltas_ptr, box, mask)
    ax1, ay1, ax2, ay2 = load_box(anchors_ptr, box % num_anchors, mask)
    anchor_width = ax2 - ax1
    anchor_height = ay2 - ay1
    log_width = tl.div_rn(dw, ww)
    log_height = tl.div_rn(dh, wh)
    width_slope = tl.where(log_width <= max_log_scale, tl.exp(log_width) * anchor_width, 0.0)
    height_slope = tl.where(log_height <= max_log_scale, tl.exp(log_height) * anchor_height, 0.0)
    gx = tl.div_rn((gx1 + gx2) * anchor_width, wx)
    gy = tl.div_rn((gy1 + gy2) * anchor_height, wy)
    gw = tl.div_rn(0.5 * (gx2 - gx1) * width_slope, ww)
    gh = tl.div_rn(0.5 * (gy2 - gy1) * height_slope, wh)
    store_box(grad_deltas_ptr, box, gx, gy, gw, gh, mask)


def _launch(kernel: Any, inputs: tuple[Tensor, ...], anchors: Tensor, out: Tensor, settings: Sequence[float]) -> Tensor:
    assert inputs[0].shape[inputs[0].dim() - anchors.dim() :] == anchors.shape
    num_boxes, num_anchors = out.numel() // 4, anchors.numel() // 4
    if num_boxes == 0:
        return out
    kernel[(triton.cdiv(num_boxes, BLOCK),)](
        *(tensor.contiguous() for tensor in (*inputs, anchors)),
        out,
        num_boxes,
        num_anchors,
        *settings,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def encode_boxes_triton(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    out = torch.empty(boxes.shape, dtype=torch.float32, device=boxes.device)
    return _launch(_encode_boxes_kernel, (boxes,), anchors, out, weights)


def decode_boxes_triton(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    out = torch.empty(deltas.shape, dtype=torch.float32, device=deltas.device)
    return _launch(_decode_boxes_kernel, (deltas,), anchors, out, (*weights, MAX_LOG_SCALE))


def decode_boxes_backward_triton(grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    out = torch.empty(deltas.shape, dtype=deltas.dtype, device=deltas.device)
    return _launch(_decode_boxes_backward_kernel, (grad, deltas), anchors, out, (*weights, MAX_LOG_SCALE))
