"""From the head's outputs to detections: the public function and its op."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssdcore.kernels.checks import FLOATS, INTEGERS, check_at_least, check_count, check_tensor, check_weights
from ssdcore.kernels.levels import view_as_levels
from ssdcore.kernels.postprocess import eager
from ssdcore.kernels.registry import define
from ssdcore.kernels.rules import BOX_WEIGHTS


class Detections(NamedTuple):
    """The detections of a batch, best first, padded to D per image with zeros, label -1 and anchor -1."""

    boxes: Tensor  # fp32 [B, D, 4] xyxy
    scores: Tensor  # fp32 [B, D]
    labels: Tensor  # int64 [B, D]
    num_detections: Tensor  # int32 [B]
    anchor_idxs: Tensor  # int64 [B, D]: the anchor that each detection came from, -1 where padded


def postprocess_detections(
    cls_logits: Tensor | Sequence[Tensor],
    box_deltas: Tensor | Sequence[Tensor],
    anchors: Tensor,
    image_sizes: Tensor,
    *,
    weights: Sequence[float] = BOX_WEIGHTS,
    score_threshold: float = 0.01,
    iou_threshold: float = 0.45,
    topk_candidates: int = 400,
    max_detections: int = 200,
) -> Detections:
    """Turn the head's outputs into detections, for a whole batch. The host never waits for the GPU.

    The steps are those of torchvision's SSD:

    1. Softmax over the classes.
    2. For each foreground class, the `topk_candidates` best scores greater than `score_threshold`, compared in float32.
       Equal scores go to the lowest anchor. A NaN score is no candidate.
    3. Decode the boxes and clip them to the image.
    4. `nms` within each class.
    5. The `max_detections` best of the image. Equal scores are ordered by class, then by anchor.

    `anchor_idxs` says which anchor each detection came from, to gather what else is known of it: its logits, a mask, an
    embedding. An anchor may give detections of several classes.

    The detections are constants: they carry no gradient. On a GPU, B is at most 65,535.

    Args:
        cls_logits: [B, A, C], or the head's maps: a sequence of [B, a * C, H, W] in the order of the anchors, with
            channel `anchor * C + class`. Maps in channels_last and contiguous maps are read where they lie.
        box_deltas: [B, A, 4], or a sequence of [B, a * 4, H, W].
        anchors: [A, 4] xyxy.
        image_sizes: [B, 2] height and width, in the frame of the anchors, to which boxes are clipped.
        weights: factors of the encoded dx, dy, dw and dh.
        score_threshold: 0 or more.
        iou_threshold: 0 or more.
        topk_candidates: the most candidates of a class that take part in NMS; 1 or more.
        max_detections: D, the most detections of an image; 1 or more.

    Returns:
        `Detections` of fixed shapes, float32, best first, padded with zeros, label -1 and anchor -1.

    Raises:
        TypeError: an argument is not a tensor, has another dtype, or a count is not an int.
        ValueError: a shape, device or setting does not fit.
    """
    logits, deltas, batch, num_anchors = view_as_levels(cls_logits, box_deltas)
    check_tensor("anchors", anchors, (num_anchors, 4), FLOATS, like=logits[0])
    check_tensor("image_sizes", image_sizes, (batch, 2), FLOATS + INTEGERS, like=logits[0])
    check_at_least("score_threshold", score_threshold, 0)
    check_at_least("iou_threshold", iou_threshold, 0)
    check_count("topk_candidates", topk_candidates, 1)
    check_count("max_detections", max_detections, 1)
    return Detections(
        *postprocess_detections_op(
            [x.detach() for x in logits],
            [x.detach() for x in deltas],
            anchors.detach(),
            image_sizes,
            check_weights(weights),
            float(score_threshold),
            float(iou_threshold),
            topk_candidates,
            max_detections,
        )
    )


# --- registration -----------------------------------------------------------------------------------------


def _load_postprocess_detections() -> Callable[..., tuple[Tensor, ...]]:
    from ssdcore.kernels.postprocess.triton import launch_postprocess_detections

    return launch_postprocess_detections


def _fake_postprocess_detections(
    cls_logits: Sequence[Tensor],
    box_deltas: Sequence[Tensor],
    anchors: Tensor,
    image_sizes: Tensor,
    weights: Sequence[float],
    score_threshold: float,
    iou_threshold: float,
    topk_candidates: int,
    max_detections: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, batch = cls_logits[0], cls_logits[0].shape[0]
    return (
        like.new_empty(batch, max_detections, 4, dtype=torch.float32),
        like.new_empty(batch, max_detections, dtype=torch.float32),
        like.new_empty(batch, max_detections, dtype=torch.int64),
        like.new_empty(batch, dtype=torch.int32),
        like.new_empty(batch, max_detections, dtype=torch.int64),
    )


postprocess_detections_op = define(
    "postprocess_detections",
    eager=eager.postprocess_detections,
    load_triton=_load_postprocess_detections,
    fake=_fake_postprocess_detections,
)
