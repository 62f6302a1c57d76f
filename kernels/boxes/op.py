"""IoU of boxes, and boxes as offsets from anchors: the public functions and their ops.

Boxes and anchors are `xyxy`, in any one coordinate frame. Every function takes float32, float16 and bfloat16 (on the
CPU also float64), computes in float32 (float64), modifies no input and looks at no value of a tensor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd

from ssdcore.kernels.boxes import eager
from ssdcore.kernels.checks import FLOATS, INTEGERS, check_no_gradient, check_tensor, check_weights
from ssdcore.kernels.registry import LIBRARY, define, forbid_second_gradient
from ssdcore.kernels.rules import BOX_WEIGHTS, computed_dtype


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes.

    The values are torchvision's. A pair without any area is 0/0, which is NaN. 16-bit boxes and integers are converted
    to float32 first (torchvision subtracts 16-bit corners in 16 bits). The op has no gradient: an input that requires
    one is an error while gradients are recorded.

    Args:
        boxes1: [N, 4] xyxy, floats or integers.
        boxes2: [M, 4] xyxy, same dtype and device.

    Returns:
        float32 [N, M]; float64 if the boxes are.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape or device does not fit, or an input requires a gradient.
    """
    check_tensor("boxes1", boxes1, ("N", 4), FLOATS + INTEGERS)
    check_tensor("boxes2", boxes2, ("M", 4), (boxes1.dtype,), like=boxes1)
    check_no_gradient("box_iou", boxes1=boxes1, boxes2=boxes2)
    if not boxes1.is_floating_point():
        boxes1, boxes2 = boxes1.float(), boxes2.float()
    return box_iou_op(boxes1, boxes2)


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = BOX_WEIGHTS) -> Tensor:
    """Encode boxes as offsets from anchors: `w * (centre - anchor centre) / anchor size`, `w * log(size / anchor
    size)`.

    This is torchvision's `BoxCoder.encode`. A side of length zero encodes as minus infinity, an inverted one as NaN.
    The op has no gradient: an input that requires one is an error while gradients are recorded.

    Args:
        boxes: [..., 4] xyxy.
        anchors: [..., 4] xyxy; the leading dimensions broadcast with those of `boxes`.
        weights: factors of dx, dy, dw and dh.

    Returns:
        float32 [..., 4], float64 if the boxes are: dx, dy, dw, dh.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape or device does not fit, or an input requires a gradient.
    """
    boxes, anchors = _broadcast("boxes", boxes, anchors)
    check_no_gradient("encode_boxes", boxes=boxes, anchors=anchors)
    return encode_boxes_op(boxes, anchors, check_weights(weights))


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = BOX_WEIGHTS) -> Tensor:
    """Decode offsets from anchors to boxes: the inverse of `encode_boxes`.

    This is torchvision's `BoxCoder.decode`: dw and dh are clamped at log(1000 / 16), so that no side is longer than
    62.5 times the anchor's. Differentiable once in `deltas`. Anchors that require a gradient are an error while
    gradients are recorded.

    Args:
        deltas: [..., 4]: dx, dy, dw, dh.
        anchors: [..., 4] xyxy; the leading dimensions broadcast with those of `deltas`.
        weights: factors of dx, dy, dw and dh.

    Returns:
        float32 [..., 4] xyxy; float64 if the deltas are.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape or device does not fit, or `anchors` requires a gradient.
    """
    deltas, anchors = _broadcast("deltas", deltas, anchors)
    check_no_gradient("decode_boxes", anchors=anchors)
    return decode_boxes_op(deltas, anchors, check_weights(weights))


def _broadcast(name: str, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Check both, expand `boxes` to their common shape, and `anchors` to the last dimensions of it."""
    for argument, tensor, like in ((name, boxes, None), ("anchors", anchors, boxes)):
        shape = tuple(tensor.shape) if isinstance(tensor, Tensor) else ()
        if isinstance(tensor, Tensor) and shape[-1:] != (4,):
            raise ValueError(f"{argument} must have shape [..., 4], got {list(shape)}")
        check_tensor(argument, tensor, shape, FLOATS, like)
    if anchors.shape == boxes.shape[boxes.dim() - anchors.dim() :]:
        return boxes, anchors  # the usual case, because `broadcast_shapes` takes longer than all the checks
    try:
        common = torch.broadcast_shapes(boxes.shape, anchors.shape)
    except RuntimeError as error:
        raise ValueError(
            f"anchors must broadcast with {name} {list(boxes.shape)}, got {list(anchors.shape)}"
        ) from error
    boxes = boxes.expand(common)
    if anchors.shape != common[len(common) - anchors.dim() :]:
        anchors = anchors.expand(common)
    return boxes, anchors


# --- registration -----------------------------------------------------------------------------------------


def _load_box_iou() -> Callable[..., Tensor]:
    from ssdcore.kernels.boxes.triton import launch_box_iou

    return launch_box_iou


def _load_encode_boxes() -> Callable[..., Tensor]:
    from ssdcore.kernels.boxes.triton import launch_encode_boxes

    return launch_encode_boxes


def _load_decode_boxes() -> Callable[..., Tensor]:
    from ssdcore.kernels.boxes.triton import launch_decode_boxes

    return launch_decode_boxes


def _load_decode_boxes_backward() -> Callable[..., Tensor]:
    from ssdcore.kernels.boxes.triton import launch_decode_boxes_backward

    return launch_decode_boxes_backward


def _fake_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    return boxes1.new_empty(boxes1.shape[0], boxes2.shape[0], dtype=computed_dtype(boxes1))


def _fake_coded(boxes: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    return boxes.new_empty(boxes.shape, dtype=computed_dtype(boxes))


def _fake_decode_boxes_backward(grad: Tensor, deltas: Tensor, anchors: Tensor, weights: Sequence[float]) -> Tensor:
    return deltas.new_empty(deltas.shape)


def _save_for_decode_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    deltas, anchors, ctx.weights = inputs
    ctx.save_for_backward(deltas, anchors)


def _decode_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return decode_boxes_backward_op(grad, *ctx.saved_tensors, ctx.weights), None, None


box_iou_op = define("box_iou", eager=eager.box_iou, load_triton=_load_box_iou, fake=_fake_box_iou)
encode_boxes_op = define("encode_boxes", eager=eager.encode_boxes, load_triton=_load_encode_boxes, fake=_fake_coded)
decode_boxes_op = define("decode_boxes", eager=eager.decode_boxes, load_triton=_load_decode_boxes, fake=_fake_coded)
decode_boxes_backward_op = define(
    "decode_boxes_backward",
    eager=eager.decode_boxes_backward,
    load_triton=_load_decode_boxes_backward,
    fake=_fake_decode_boxes_backward,
)
register_autograd("ssdcore::decode_boxes", _decode_gradient, setup_context=_save_for_decode_gradient, lib=LIBRARY)
forbid_second_gradient("decode_boxes", decode_boxes_backward_op)
