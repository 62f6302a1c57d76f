"""The public functions: the contract of each, the checks of its arguments, then the op.

Boxes are `xyxy`, in any one coordinate frame. A batch's ground truth is ragged: image `b` owns the rows
`gt_offsets[b]:gt_offsets[b + 1]` of `gt_boxes` and `gt_labels`, which may be none. Class 0 is background. Every
function takes fp32, fp16 and bf16 (on the CPU fp64 too), computes in fp32 (fp64), modifies nothing, and looks at no
value of a tensor: only shapes, dtypes and devices are checked, so nothing waits for the GPU.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ssdcore.kernels import ops

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # 1 / the SSD paper's variances .1, .1, .2, .2
IOU_THRESHOLD = 0.5  # an anchor is positive from this overlap on; SSD paper, section 2.2
NEG_POS_RATIO = 3.0  # negatives mined per positive; SSD paper, section 2.2

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class MultiBoxLoss(NamedTuple):
    """The two terms of the SSD loss, each a scalar."""

    classification: Tensor
    bbox_regression: Tensor


class Detections(NamedTuple):
    """The detections of a batch, best first, padded to D an image with zeros and label -1."""

    boxes: Tensor  # fp32 [B, D, 4] xyxy
    scores: Tensor  # fp32 [B, D]
    labels: Tensor  # int64 [B, D]
    num_detections: Tensor  # int32 [B]


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair of boxes; a pair without any area is 0/0, which is NaN.

    The values are torchvision's. 16-bit boxes and integers are taken as fp32 from the start (torchvision subtracts
    16-bit corners in 16 bits). Not differentiable: an input that requires a gradient is an error while gradients are
    recorded.

    Args:
        boxes1: [N, 4] xyxy.
        boxes2: [M, 4] xyxy, same dtype and device.

    Returns:
        fp32 (fp64 for fp64 boxes) [N, M].

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit, or an input requires a gradient.
    """
    _check("boxes1", boxes1, ("N", 4), _FLOATS + _INTEGERS)
    _check("boxes2", boxes2, ("M", 4), (boxes1.dtype,), like=boxes1)
    if not boxes1.is_floating_point():
        boxes1, boxes2 = boxes1.float(), boxes2.float()
    _refuse_gradients("box_iou", boxes1=boxes1, boxes2=boxes2)
    return ops.box_iou(boxes1, boxes2)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: the boxes that no kept box of higher score overlaps too much.

    Suppress a box iff its IoU with a kept box is strictly greater than `iou_threshold`, the threshold taken as the
    real number written, as torchvision does on the CPU (on CUDA it rounds it to fp32 first). Equal scores keep the
    lower index; NaN scores come first, as in `torch.sort`. A box with NaN or infinite sides or without area neither
    suppresses nor is suppressed.

    Args:
        boxes: [N, 4] xyxy.
        scores: [N].
        iou_threshold: 0 or more.

    Returns:
        int64 [K], indices of the kept boxes, by descending score.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device or threshold does not fit.
    """
    _check("boxes", boxes, ("N", 4), _FLOATS)
    _check("scores", scores, (boxes.shape[0],), _FLOATS, like=boxes)
    _check_at_least("iou_threshold", iou_threshold, 0)
    return ops.nms(boxes.detach(), scores.detach(), None, float(iou_threshold))


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each class: boxes of different `idxs` never meet.

    Exact for every coordinate, negative and huge ones too, as long as areas are finite in fp32. torchvision moves the
    classes apart by adding `idx * (largest coordinate + 1)`, which goes wrong for negative coordinates and rounds
    large ones.

    Args:
        boxes: [N, 4] xyxy.
        scores: [N].
        idxs: integers [N], the class (or level, or image) of each box.
        iou_threshold: 0 or more.

    Returns:
        int64 [K], indices of the kept boxes of all classes, by descending score, equal scores by index.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device or threshold does not fit.
    """
    _check("boxes", boxes, ("N", 4), _FLOATS)
    _check("scores", scores, (boxes.shape[0],), _FLOATS, like=boxes)
    _check("idxs", idxs, (boxes.shape[0],), _INTEGERS, like=boxes)
    _check_at_least("iou_threshold", iou_threshold, 0)
    return ops.nms(boxes.detach(), scores.detach(), idxs, float(iou_threshold))


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """`batched_nms` of a batch of images at once, with outputs of a fixed shape.

    Never waits for the GPU, and can be captured in a CUDA graph.

    Args:
        boxes: [B, N, 4] xyxy.
        scores: [B, N].
        idxs: integers [B, N], the class of each box; None: all of one class.
        iou_threshold: 0 or more.
        max_output: D, how many boxes to return for an image at most.
        score_threshold: drop boxes whose score is not greater (compared in fp32), NaN among them; None: drop none.

    Returns:
        int64 [B, D], indices into the image's N boxes by descending score, padded with -1; and int32 [B], how many.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device, threshold or count does not fit.
    """
    _check("boxes", boxes, ("B", "N", 4), _FLOATS)
    _check("scores", scores, tuple(boxes.shape[:2]), _FLOATS, like=boxes)
    if idxs is not None:
        _check("idxs", idxs, tuple(boxes.shape[:2]), _INTEGERS, like=boxes)
    _check_at_least("iou_threshold", iou_threshold, 0)
    _check_count("max_output", max_output, 0)
    if score_threshold is not None:
        score_threshold = float(score_threshold)
    return ops.batched_nms_padded(
        boxes.detach(), scores.detach(), idxs, float(iou_threshold), max_output, score_threshold
    )


def encode_boxes(boxes: Tensor, anchors: Tensor, weights: Sequence[float] = BOX_WEIGHTS) -> Tensor:
    """Boxes as offsets from anchors: `w * (centre - anchor centre) / anchor size`, `w * log(size / anchor size)`.

    torchvision's `BoxCoder.encode`. A box without area has a size of minus infinity, an inverted one NaN. Not
    differentiable: an input that requires a gradient is an error while gradients are recorded.

    Args:
        boxes: [..., 4] xyxy.
        anchors: [..., 4] xyxy; the leading dimensions broadcast with those of `boxes`.
        weights: of x, y, width and height.

    Returns:
        fp32 (fp64 for fp64 boxes) [..., 4]: dx, dy, dw, dh.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit, or an input requires a gradient.
    """
    boxes, anchors = _broadcast("boxes", boxes, anchors)
    _refuse_gradients("encode_boxes", boxes=boxes, anchors=anchors)
    return ops.encode_boxes(boxes, anchors, _check_weights(weights))


def decode_boxes(deltas: Tensor, anchors: Tensor, weights: Sequence[float] = BOX_WEIGHTS) -> Tensor:
    """The boxes that `encode_boxes` would turn into `deltas`; sizes are clamped at 62.5 times the anchor's.

    torchvision's `BoxCoder.decode`, dw and dh clamped at log(1000 / 16). Differentiable in `deltas`, not in `anchors`:
    anchors that require a gradient are an error while gradients are recorded.

    Args:
        deltas: [..., 4]: dx, dy, dw, dh.
        anchors: [..., 4] xyxy; the leading dimensions broadcast with those of `deltas`.
        weights: of x, y, width and height.

    Returns:
        fp32 (fp64 for fp64 deltas) [..., 4] xyxy.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape or device does not fit, or `anchors` requires a gradient.
    """
    deltas, anchors = _broadcast("deltas", deltas, anchors)
    _refuse_gradients("decode_boxes", anchors=anchors)
    return ops.decode_boxes(deltas, anchors, _check_weights(weights))


def match_anchors(
    gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float = IOU_THRESHOLD
) -> Tensor:
    """Assign to every anchor one of its image's ground truths, or none.

    An anchor takes the ground truth of the largest IoU if that is at least `iou_threshold` (compared in fp32), the
    lowest of equals. Then every ground truth in turn claims the anchor it overlaps most, the lowest of equals,
    whatever the threshold; of several claims on one anchor the last stands. A ground truth that overlaps no anchor,
    has no area or is NaN claims none: with torchvision's `SSDMatcher`, whose rules these are otherwise, it would
    take anchor 0. Memory is that of the result; [T, A] is never stored.

    Args:
        gt_boxes: [T, 4] xyxy, the images' ground truths one after the other.
        gt_offsets: int32 or int64 [B + 1]; image b owns rows `gt_offsets[b]:gt_offsets[b + 1]`.
        anchors: [A, 4] xyxy.
        iou_threshold: in (0, 1].

    Returns:
        int64 [B, A]: an index into the image's own ground truths, or -1.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device or threshold does not fit.

    Source: Liu et al., SSD, section 2.2 (arXiv 1512.02325).
    """
    _check("anchors", anchors, ("A", 4), _FLOATS)
    _check("gt_boxes", gt_boxes, ("T", 4), _FLOATS, like=anchors)
    _check("gt_offsets", gt_offsets, ("B + 1",), (torch.int32, torch.int64), like=anchors)
    _check_offsets(gt_offsets)
    if not 0 < iou_threshold <= 1:
        raise ValueError(f"iou_threshold must be in (0, 1], got {iou_threshold}")
    return ops.match_anchors(gt_boxes.detach(), gt_offsets, anchors.detach(), float(iou_threshold))


def multibox_loss(
    cls_logits: Tensor | Sequence[Tensor],
    box_deltas: Tensor | Sequence[Tensor],
    matched_idxs: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    gt_offsets: Tensor,
    anchors: Tensor,
    *,
    weights: Sequence[float] = BOX_WEIGHTS,
    neg_pos_ratio: float = NEG_POS_RATIO,
    beta: float = 1.0,
    min_negatives: int = 0,
    normalizer: Literal["batch", "image"] = "batch",
) -> MultiBoxLoss:
    """The SSD loss: softmax cross-entropy with hard negative mining, and smooth L1 on the encoded boxes.

    Positives are the matched anchors. Of the others, each image adds its `ceil(neg_pos_ratio * positives)` of the
    largest cross-entropy, at least `min_negatives`, the lowest anchors of equals; every anchor counts once. (In
    torchvision, positives count twice where an image has too few negatives to mine.) The product with the ratio is
    taken in fp32, as torchvision does.

    With `normalizer="batch"` both sums are divided by the positives of the whole batch, at least 1, as in the paper
    and torchvision; an image without positives then only adds `min_negatives` negatives. With `"image"` each
    image's sums are divided by its own positives, an image without any weighs 0, and the mean over the batch is
    taken, as NVIDIA does.

    A NaN or +inf logit of any anchor, selected or not, gives a NaN classification loss (with `"image"`: where the
    image has positives). The label of a positive outside 1..C-1, or a match beyond the image's ground truths, gives
    NaN for both losses; memory outside the tensors is never read.
    Differentiable in `cls_logits` and `box_deltas`, once. Ground truth or anchors that require a gradient are an error
    while gradients are recorded.

    Args:
        cls_logits: [B, A, C], or the head's maps, a sequence of [B, a * C, H, W] in the order of the anchors, the
            channel being `anchor * C + class`. Maps in channels_last and contiguous ones are read where they lie.
        box_deltas: [B, A, 4], or a sequence of [B, a * 4, H, W].
        matched_idxs: int64 [B, A] from `match_anchors`.
        gt_boxes: [T, 4] xyxy.
        gt_labels: integers [T] in 1..C-1.
        gt_offsets: int32 or int64 [B + 1].
        anchors: [A, 4] xyxy.
        weights: of the box encoding.
        neg_pos_ratio: negatives mined per positive.
        beta: where smooth L1 turns from a parabola into a line, in units of the deltas; 0 is plain L1.
        min_negatives: negatives that every image contributes, also one without positives.
        normalizer: what the sums are divided by.

    Returns:
        `MultiBoxLoss(classification, bbox_regression)`, fp32 (fp64 for fp64 logits) scalars.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device or setting does not fit.

    Source: Liu et al., SSD, section 2.2 (arXiv 1512.02325).
    """
    logits, deltas, batch, num_anchors = _levels(cls_logits, box_deltas)
    _check("anchors", anchors, (num_anchors, 4), _FLOATS, like=logits[0])
    _check("matched_idxs", matched_idxs, (batch, num_anchors), (torch.int64,), like=logits[0])
    _check("gt_boxes", gt_boxes, ("T", 4), _FLOATS, like=logits[0])
    _check("gt_labels", gt_labels, (gt_boxes.shape[0],), _INTEGERS, like=logits[0])
    _check("gt_offsets", gt_offsets, (batch + 1,), (torch.int32, torch.int64), like=logits[0])
    _check_at_least("neg_pos_ratio", neg_pos_ratio, 0)
    _check_at_least("beta", beta, 0)
    _check_count("min_negatives", min_negatives, 0)
    if normalizer not in ("batch", "image"):
        raise ValueError(f"normalizer must be 'batch' or 'image', got {normalizer!r}")
    _refuse_gradients("multibox_loss", gt_boxes=gt_boxes, anchors=anchors)
    classification, bbox_regression, *_ = ops.multibox_loss(
        logits,
        deltas,
        matched_idxs,
        gt_boxes,
        gt_labels,
        gt_offsets,
        anchors,
        _check_weights(weights),
        float(neg_pos_ratio),
        float(beta),
        min_negatives,
        normalizer,
    )
    return MultiBoxLoss(classification, bbox_regression)


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
    """From the head's outputs to detections, for a batch and without waiting for the GPU.

    torchvision's SSD: softmax; of each foreground class the `topk_candidates` best scores greater than
    `score_threshold` (compared in fp32; equal scores by anchor); decode and clip these; `nms` within each class;
    the `max_detections` best of the image (equal scores by class, then anchor). A NaN score is no candidate.

    Args:
        cls_logits: [B, A, C], or the head's maps, a sequence of [B, a * C, H, W] in the order of the anchors, the
            channel being `anchor * C + class`. Maps in channels_last and contiguous ones are read where they lie.
        box_deltas: [B, A, 4], or a sequence of [B, a * 4, H, W].
        anchors: [A, 4] xyxy.
        image_sizes: [B, 2] height and width, in the anchors' frame, that boxes are clipped to.
        weights: of the box encoding.
        score_threshold: 0 or more.
        iou_threshold: 0 or more.
        topk_candidates: of each class, before NMS.
        max_detections: D, of each image, after NMS.

    Returns:
        `Detections` of fixed shapes, fp32, best first, padded with zeros and label -1.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: a shape, device or setting does not fit.
    """
    logits, deltas, batch, num_anchors = _levels(cls_logits, box_deltas)
    _check("anchors", anchors, (num_anchors, 4), _FLOATS, like=logits[0])
    _check("image_sizes", image_sizes, (batch, 2), _FLOATS + _INTEGERS, like=logits[0])
    _check_at_least("score_threshold", score_threshold, 0)
    _check_at_least("iou_threshold", iou_threshold, 0)
    _check_count("topk_candidates", topk_candidates, 1)
    _check_count("max_detections", max_detections, 1)
    return Detections(
        *ops.postprocess_detections(
            [x.detach() for x in logits],
            [x.detach() for x in deltas],
            anchors.detach(),
            image_sizes,
            _check_weights(weights),
            float(score_threshold),
            float(iou_threshold),
            topk_candidates,
            max_detections,
        )
    )


# --- checks -----------------------------------------------------------------------------------------------


def _check(
    name: str,
    tensor: Tensor,
    shape: tuple[str | int, ...],
    dtypes: tuple[torch.dtype, ...],
    like: Tensor | None = None,
) -> None:
    """Raise unless `tensor` has `shape` (a string stands for any length), one of `dtypes`, and `like`'s device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.dim() == len(shape) and all(
        isinstance(want, str) or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, as the first argument, got {tensor.device}")
    if tensor.dtype == torch.float64 and tensor.device.type != "cpu":
        raise TypeError(f"{name} must be float32, float16 or bfloat16 on {tensor.device.type}, got float64")


def _refuse_gradients(function: str, **tensors: Tensor) -> None:
    """Raise if gradients are being recorded and a tensor, which `function` has no gradient for, requires one."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor.requires_grad:
                raise ValueError(
                    f"{name} requires a gradient, and {function} has none with respect to it: "
                    f"pass {name}.detach(), or call {function} under torch.no_grad()"
                )


def _check_offsets(gt_offsets: Tensor) -> None:
    if gt_offsets.shape[0] == 0:
        raise ValueError("gt_offsets must have shape [B + 1], got [0]")


def _check_at_least(name: str, value: float, least: float) -> None:
    if not least <= value < math.inf:  # written so that NaN fails
        raise ValueError(f"{name} must be finite and {least} or more, got {value}")


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")


def _check_weights(weights: Sequence[float]) -> list[float]:
    if len(weights) != 4 or not all(weight > 0 for weight in weights):
        raise ValueError(f"weights must be four positive numbers, got {weights}")
    return [float(weight) for weight in weights]


def _broadcast(name: str, boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """`boxes` in the broadcast shape of both, `anchors` repeating over its leading dimensions at most."""
    for key, tensor, like in ((name, boxes, None), ("anchors", anchors, boxes)):
        if isinstance(tensor, Tensor) and (tensor.dim() == 0 or tensor.shape[-1] != 4):
            raise ValueError(f"{key} must have shape [..., 4], got {list(tensor.shape)}")
        _check(key, tensor, tuple(tensor.shape), _FLOATS, like)
    try:
        shape = torch.broadcast_shapes(boxes.shape, anchors.shape)
    except RuntimeError as error:
        raise ValueError(
            f"anchors must broadcast with {name} {list(boxes.shape)}, got {list(anchors.shape)}"
        ) from error
    boxes = boxes.expand(shape)
    if anchors.shape != shape[len(shape) - anchors.dim() :]:
        anchors = anchors.expand(shape)
    return boxes, anchors


def _levels(
    cls_logits: Tensor | Sequence[Tensor], box_deltas: Tensor | Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor], int, int]:
    """Views of the head's outputs, [B, P, a, C] and [B, P, a, 4] a level of P cells with a anchors each; B and A.

    From [B, A, C] and [B, A, 4], which are one level of A cells, or from maps [B, a * C, H, W] and [B, a * 4, H, W].
    """
    if isinstance(cls_logits, Tensor) and isinstance(box_deltas, Tensor):
        _check("cls_logits", cls_logits, ("B", "A", "C"), _FLOATS)
        _check("box_deltas", box_deltas, (*cls_logits.shape[:2], 4), _FLOATS, like=cls_logits)
        if cls_logits.shape[2] == 0:
            raise ValueError(f"cls_logits must have at least one class, got {list(cls_logits.shape)}")
        return [cls_logits.unsqueeze(2)], [box_deltas.unsqueeze(2)], *cls_logits.shape[:2]
    if isinstance(cls_logits, Tensor) or isinstance(box_deltas, Tensor):
        raise TypeError("cls_logits and box_deltas must both be tensors, or both be sequences of maps")
    if len(cls_logits) != len(box_deltas) or not cls_logits:
        raise ValueError(
            f"cls_logits and box_deltas must have one map a level each, got {len(cls_logits)} and {len(box_deltas)}"
        )
    logits: list[Tensor] = []
    deltas: list[Tensor] = []
    batch: str | int = "B"
    cls_dtypes: tuple[torch.dtype, ...] = _FLOATS
    box_dtypes: tuple[torch.dtype, ...] = _FLOATS
    num_classes, num_anchors = 0, 0
    for level, (cls_map, box_map) in enumerate(zip(cls_logits, box_deltas, strict=True)):
        _check(f"cls_logits[{level}]", cls_map, (batch, "a * C", "H", "W"), cls_dtypes, like=cls_logits[0])
        batch, channels, height, width = cls_map.shape
        _check(f"box_deltas[{level}]", box_map, (batch, "a * 4", height, width), box_dtypes, like=cls_map)
        cls_dtypes, box_dtypes = (cls_map.dtype,), (box_map.dtype,)
        per_cell = box_map.shape[1] // 4
        if per_cell == 0 or channels == 0 or box_map.shape[1] % 4 or channels % per_cell:
            raise ValueError(
                f"cls_logits[{level}] must have a * C channels and box_deltas[{level}] a * 4, "
                f"got {channels} and {box_map.shape[1]}"
            )
        num_classes = num_classes or channels // per_cell
        if channels != per_cell * num_classes:
            raise ValueError(
                f"cls_logits[{level}] must have {per_cell} * {num_classes} channels, as level 0, got {channels}"
            )
        num_anchors += height * width * per_cell
        for maps, views in ((cls_map, logits), (box_map, deltas)):
            views.append(maps.unflatten(1, (per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 2))
    return logits, deltas, cls_logits[0].shape[0], num_anchors  # not int(batch), which would fix its size
