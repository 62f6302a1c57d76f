"""IoU, box encoding and decoding in plain PyTorch, on any device.

The order of operations is torchvision's. The kernels follow it step by step, so that an IoU has the same bits
everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssdcore.kernels.rules import MAX_LOG_SCALE, computed_dtype, exp, log, widen


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """IoU [..., N, M] of every pair of `boxes1` [..., N, 4] and `boxes2` [..., M, 4]."""
    # Coordinates come first and are contiguous: one operation serves x and y, and the pairs vectorise.
    a, b = boxes1.movedim(-1, 0).contiguous(), boxes2.movedim(-1, 0).contiguous()
    low = torch.maximum(a[:2, ..., :, None], b[:2, ..., None, :])  # [2, ..., N, M]
    high = torch.minimum(a[2:, ..., :, None], b[2:, ..., None, :])
    intersection = torch.mul(*high.sub_(low).clamp_(min=0))
    union = torch.mul(*(a[2:] - a[:2]))[..., :, None] + torch.mul(*(b[2:] - b[:2]))[..., None, :]
    return intersection.div_(union.sub_(intersection))


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return pairwise_iou(widen(boxes1), widen(boxes2))


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    cx, cy, width, height = _centre_and_size(widen(boxes))
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centre_and_size(anchors.to(computed_dtype(boxes)))
    return torch.stack(
        (
            wx * (cx - anchor_cx) / anchor_width,
            wy * (cy - anchor_cy) / anchor_height,
            ww * log(width / anchor_width),
            wh * log(height / anchor_height),
        ),
        dim=-1,
    )


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    dx, dy, dw, dh = widen(deltas).unbind(-1)
    anchor_cx, anchor_cy, anchor_width, anchor_height = _centre_and_size(anchors.to(computed_dtype(deltas)))
    cx = dx / wx * anchor_width + anchor_cx
    cy = dy / wy * anchor_height + anchor_cy
    half_width = 0.5 * (exp((dw / ww).clamp(max=MAX_LOG_SCALE)) * anchor_width)
    half_height = 0.5 * (exp((dh / wh).clamp(max=MAX_LOG_SCALE)) * anchor_height)
    return torch.stack((cx - half_width, cy - half_height, cx + half_width, cy + half_height), dim=-1)


def decode_boxes_backward(grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    wx, wy, ww, wh = weights
    grad_x1, grad_y1, grad_x2, grad_y2 = widen(grad).unbind(-1)
    _, _, dw, dh = widen(deltas).unbind(-1)
    _, _, anchor_width, anchor_height = _centre_and_size(anchors.to(computed_dtype(deltas)))
    log_width, log_height = dw / ww, dh / wh
    width_slope = torch.where(log_width <= MAX_LOG_SCALE, exp(log_width) * anchor_width, 0.0)
    height_slope = torch.where(log_height <= MAX_LOG_SCALE, exp(log_height) * anchor_height, 0.0)
    grad_deltas = torch.stack(
        (
            (grad_x1 + grad_x2) * anchor_width / wx,
            (grad_y1 + grad_y2) * anchor_height / wy,
            0.5 * (grad_x2 - grad_x1) * width_slope / ww,
            0.5 * (grad_y2 - grad_y1) * height_slope / wh,
        ),
        dim=-1,
    )
    return grad_deltas.to(deltas.dtype)


def _centre_and_size(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x1, y1, x2, y2 = boxes.unbind(-1)
    width, height = x2 - x1, y2 - y1
    return x1 + 0.5 * width, y1 + 0.5 * height, width, height
