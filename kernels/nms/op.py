"""Greedy non-maximum suppression: the public functions and their ops."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ssdcore.kernels.checks import FLOATS, INTEGERS, check_at_least, check_count, check_tensor
from ssdcore.kernels.nms import eager
from ssdcore.kernels.registry import define


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: keep the boxes that overlap no kept box of higher score too much.

    A box is suppressed if and only if its IoU with a kept box is strictly greater than `iou_threshold`. The threshold
    is the real number that was written, as in torchvision on the CPU (on CUDA, torchvision rounds it to float32 first).
    Equal scores keep the lower index. NaN scores come first, as in `torch.sort`. Boxes with NaN or infinite sides or
    without area neither suppress nor are suppressed.

    On a GPU, the host waits for the result, because its length depends on the values. `batched_nms_padded` does not
    wait.

    Args:
        boxes: [N, 4] xyxy, in any frame.
        scores: [N].
        iou_threshold: 0 or more.

    Returns:
        int64 [K]: indices of the kept boxes, by descending score.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, device or threshold does not fit.
    """
    check_tensor("boxes", boxes, ("N", 4), FLOATS)
    check_tensor("scores", scores, (boxes.shape[0],), FLOATS, like=boxes)
    check_at_least("iou_threshold", iou_threshold, 0)
    return nms_op(boxes.detach(), scores.detach(), None, float(iou_threshold))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each class: boxes with different `idxs` do not suppress each other.

    The result is exact for all coordinates, also negative and huge ones, as long as areas are finite in float32.
    (torchvision separates the classes by adding `idx * (largest coordinate + 1)` to the coordinates. That fails for
    negative coordinates and rounds large ones.)

    On a GPU, the host waits for the result, because its length depends on the values. `batched_nms_padded` does not
    wait.

    Args:
        boxes: [N, 4] xyxy, in any frame.
        scores: [N].
        idxs: integers [N]: the class (or level, or image) of each box.
        iou_threshold: 0 or more.

    Returns:
        int64 [K]: indices of the kept boxes of all classes, by descending score, equal scores by index.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, device or threshold does not fit.
    """
    check_tensor("boxes", boxes, ("N", 4), FLOATS)
    check_tensor("scores", scores, (boxes.shape[0],), FLOATS, like=boxes)
    check_tensor("idxs", idxs, (boxes.shape[0],), INTEGERS, like=boxes)
    check_at_least("iou_threshold", iou_threshold, 0)
    return nms_op(boxes.detach(), scores.detach(), idxs, float(iou_threshold))


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`batched_nms` of a batch of images at once, with outputs of a fixed shape.

    The host never waits for the GPU, and the call can be captured in a CUDA graph.

    Args:
        boxes: [B, N, 4] xyxy, in any frame.
        scores: [B, N].
        idxs: integers [B, N], the class of each box; None if all boxes are of one class.
        iou_threshold: 0 or more.
        max_output: D, the largest number of boxes to return per image.
        score_threshold: drop boxes whose score is not greater (compared in float32; float64 scores in float64), and NaN
            scores; None drops none.

    Returns:
        int64 [B, D]: indices into the image's N boxes by descending score, padded with -1; and int32 [B]: their number.

    Raises:
        TypeError: an argument is not a tensor, has another dtype, or `max_output` is not an int.
        ValueError: a shape, device, threshold or count does not fit.
    """
    check_tensor("boxes", boxes, ("B", "N", 4), FLOATS)
    check_tensor("scores", scores, tuple(boxes.shape[:2]), FLOATS, like=boxes)
    if idxs is not None:
        check_tensor("idxs", idxs, tuple(boxes.shape[:2]), INTEGERS, like=boxes)
    check_at_least("iou_threshold", iou_threshold, 0)
    check_count("max_output", max_output, 0)
    if score_threshold is not None:
        score_threshold = float(score_threshold)
        if math.isnan(score_threshold):
            raise ValueError("score_threshold must be a number or None, got nan")
    return batched_nms_padded_op(
        boxes.detach(), scores.detach(), idxs, float(iou_threshold), max_output, score_threshold
    )


# --- registration -----------------------------------------------------------------------------------------


def _load_nms() -> Callable[..., Tensor]:
    from ssdcore.kernels.nms.triton import launch_nms

    return launch_nms


def _load_batched_nms_padded() -> Callable[..., tuple[Tensor, Tensor]]:
    from ssdcore.kernels.nms.triton import launch_batched_nms_padded

    return launch_batched_nms_padded


def _fake_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int64)


def _fake_batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    return (
        boxes.new_empty(boxes.shape[0], max_output, dtype=torch.int64),
        boxes.new_empty(boxes.shape[0], dtype=torch.int32),
    )


nms_op = define("nms", eager=eager.nms, load_triton=_load_nms, fake=_fake_nms)
batched_nms_padded_op = define(
    "batched_nms_padded",
    eager=eager.batched_nms_padded,
    load_triton=_load_batched_nms_padded,
    fake=_fake_batched_nms_padded,
)
