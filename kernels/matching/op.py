"""Assignment of ground truths to anchors: the public function and its op."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssdcore.kernels.checks import FLOATS, OFFSETS, check_tensor
from ssdcore.kernels.matching import eager
from ssdcore.kernels.registry import define

IOU_THRESHOLD = 0.5  # an anchor with this overlap is positive; SSD paper, section 2.2


def match_anchors(
    gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float = IOU_THRESHOLD
) -> Tensor:
    """Assign to every anchor one of its image's ground truths, or none.

    First, an anchor matches the ground truth that it overlaps most, if their IoU is at least `iou_threshold` (compared
    in float32; in float64 if an input is float64). Equal IoUs go to the ground truth with the lowest index. Then every
    ground truth, in order, claims the anchor that it overlaps most, whatever the threshold; equal IoUs go to the lowest
    anchor. Of several claims on one anchor, the last one stands.

    These are the rules of torchvision's `SSDMatcher`, with one difference: a ground truth that overlaps no anchor, has
    no area or holds a NaN claims no anchor. In torchvision it claims anchor 0.

    On a GPU, [T, A] is never stored: the kernels take 8 bytes of scratch memory for each ground truth and 256 anchors,
    and B is at most 65,535. The result has no gradient.

    Args:
        gt_boxes: [T, 4] xyxy, the ground truths of all images, one image after the other.
        gt_offsets: int32 or int64 [B + 1]; image b owns the rows `gt_offsets[b]:gt_offsets[b + 1]`, which may be none.
        anchors: [A, 4] xyxy, in the frame of `gt_boxes`.
        iou_threshold: in (0, 1].

    Returns:
        int64 [B, A]: an index into the image's own ground truths, or -1.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: a shape, device or threshold does not fit.

    Source: Liu et al., "SSD: Single Shot MultiBox Detector", section 2.2 (arXiv 1512.02325).
    """
    check_tensor("gt_boxes", gt_boxes, ("T", 4), FLOATS)
    check_tensor("gt_offsets", gt_offsets, ("B + 1",), OFFSETS, like=gt_boxes)
    check_tensor("anchors", anchors, ("A", 4), FLOATS, like=gt_boxes)
    if gt_offsets.shape[0] == 0:
        raise ValueError("gt_offsets must have shape [B + 1], got [0]")
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}")
    return match_anchors_op(gt_boxes.detach(), gt_offsets, anchors.detach(), float(iou_threshold))


# --- registration -----------------------------------------------------------------------------------------


def _load_match_anchors() -> Callable[..., Tensor]:
    from ssdcore.kernels.matching.triton import launch_match_anchors

    return launch_match_anchors


def _fake_match_anchors(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    return anchors.new_empty(gt_offsets.shape[0] - 1, anchors.shape[0], dtype=torch.int64)


match_anchors_op = define(
    "match_anchors", eager=eager.match_anchors, load_triton=_load_match_anchors, fake=_fake_match_anchors
)
