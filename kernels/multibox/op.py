"""The SSD loss: the public function, its op and its gradient."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.library import register_autograd

from ssdcore.kernels.checks import (
    FLOATS,
    INTEGERS,
    OFFSETS,
    check_at_least,
    check_count,
    check_no_gradient,
    check_tensor,
    check_weights,
)
from ssdcore.kernels.levels import empty_gradients, view_as_levels
from ssdcore.kernels.multibox import eager
from ssdcore.kernels.registry import LIBRARY, define, forbid_second_gradient
from ssdcore.kernels.rules import BOX_WEIGHTS, computed_dtype

NEG_POS_RATIO = 3.0  # negatives mined per positive; SSD paper, section 2.2


class MultiBoxLosses(NamedTuple):
    """The two terms of the SSD loss, each a scalar."""

    classification: Tensor
    bbox_regression: Tensor


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
) -> MultiBoxLosses:
    """The SSD loss: softmax cross-entropy with hard negative mining, and smooth L1 on the encoded boxes.

    Matched anchors are positives. In each image, the `ceil(neg_pos_ratio * positives)` other anchors with the largest
    cross-entropy are negatives, and at least `min_negatives` anchors are. Equal losses go to the lowest anchor. The
    product with the ratio is taken in float32, as in torchvision. Every anchor counts once. (In torchvision, positives
    count twice where an image has too few negatives to mine.)

    `normalizer="batch"` divides both sums by the number of positives in the batch, at least 1, as the paper and
    torchvision do. An image without positives then contributes its `min_negatives` negatives only.
    `normalizer="image"` divides the sums of each image by its own number of positives, gives images without positives
    weight 0, and takes the mean over the batch, as NVIDIA's SSD does.

    A NaN or +inf logit of any anchor, selected or not, gives a NaN classification loss (with "image", if its image has
    positives). Both losses are NaN if the label of a positive is outside 1..C-1, or if a match is beyond the image's
    ground truths. Memory outside the tensors is never read.

    Differentiable once in `cls_logits` and `box_deltas`. Ground truth or anchors that require a gradient are an error
    while gradients are recorded. On a GPU, B is at most 65,535.

    Args:
        cls_logits: [B, A, C], or the head's maps: a sequence of [B, a * C, H, W] in the order of the anchors, with
            channel `anchor * C + class`. Maps in channels_last and contiguous maps are read where they lie.
        box_deltas: [B, A, 4], or a sequence of [B, a * 4, H, W].
        matched_idxs: int64 [B, A] from `match_anchors`: an index into the image's own ground truths, or negative.
        gt_boxes: [T, 4] xyxy, the ground truths of all images, one image after the other.
        gt_labels: integers [T] in 1..C-1; class 0 is the background.
        gt_offsets: int32 or int64 [B + 1]; image b owns the rows `gt_offsets[b]:gt_offsets[b + 1]`.
        anchors: [A, 4] xyxy, in the frame of `gt_boxes`.
        weights: factors of the encoded dx, dy, dw and dh.
        neg_pos_ratio: negatives mined per positive.
        beta: where smooth L1 turns from a parabola into a line, in units of the deltas; 0 gives plain L1.
        min_negatives: negatives that every image contributes, even without positives.
        normalizer: what the sums are divided by.

    Returns:
        `MultiBoxLosses(classification, bbox_regression)`: float32 scalars, float64 if the logits are.

    Raises:
        TypeError: an argument is not a tensor, has another dtype, or a count is not an int.
        ValueError: a shape, device or setting does not fit, or the ground truth or the anchors require a gradient.

    Source: Liu et al., "SSD: Single Shot MultiBox Detector", section 2.2 (arXiv 1512.02325).
    """
    logits, deltas, batch, num_anchors = view_as_levels(cls_logits, box_deltas)
    check_tensor("anchors", anchors, (num_anchors, 4), FLOATS, like=logits[0])
    check_tensor("matched_idxs", matched_idxs, (batch, num_anchors), (torch.int64,), like=logits[0])
    check_tensor("gt_boxes", gt_boxes, ("T", 4), FLOATS, like=logits[0])
    check_tensor("gt_labels", gt_labels, (gt_boxes.shape[0],), INTEGERS, like=logits[0])
    check_tensor("gt_offsets", gt_offsets, (batch + 1,), OFFSETS, like=logits[0])
    check_no_gradient("multibox_loss", gt_boxes=gt_boxes, anchors=anchors)
    check_at_least("neg_pos_ratio", neg_pos_ratio, 0)
    check_at_least("beta", beta, 0)
    check_count("min_negatives", min_negatives, 0)
    if normalizer not in ("batch", "image"):
        raise ValueError(f"normalizer must be 'batch' or 'image', got {normalizer!r}")
    classification, bbox_regression, *_ = multibox_loss_op(
        logits,
        deltas,
        matched_idxs,
        gt_boxes,
        gt_labels,
        gt_offsets,
        anchors,
        check_weights(weights),
        float(neg_pos_ratio),
        float(beta),
        min_negatives,
        normalizer,
    )
    return MultiBoxLosses(classification, bbox_regression)


# --- registration -----------------------------------------------------------------------------------------


def _load_multibox_loss() -> Callable[..., tuple[Tensor, ...]]:
    from ssdcore.kernels.multibox.triton import launch_multibox_loss

    return launch_multibox_loss


def _load_multibox_loss_backward() -> Callable[..., list[Tensor]]:
    from ssdcore.kernels.multibox.triton import launch_multibox_loss_backward

    return launch_multibox_loss_backward


def _fake_multibox_loss(
    cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor], matched_idxs: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    like, dtype = cls_logits[0], computed_dtype(cls_logits[0])
    return (
        like.new_empty((), dtype=dtype),  # classification
        like.new_empty((), dtype=dtype),  # bbox_regression
        like.new_empty(matched_idxs.shape, dtype=dtype),  # log-sum-exp
        like.new_empty(matched_idxs.shape, dtype=torch.bool),  # selected
        like.new_empty(matched_idxs.shape[0], dtype=dtype),  # scale
    )


def _fake_multibox_loss_backward(
    grad_cls: Tensor, grad_bbox: Tensor, cls_logits: Sequence[Tensor], box_deltas: Sequence[Tensor], *_: Any
) -> list[Tensor]:
    return empty_gradients(cls_logits, box_deltas)


def _save_for_loss_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    cls_logits, box_deltas, *truth, ctx.weights, _ratio, ctx.beta, _min_negatives, _normalizer = inputs
    _classification, _bbox_regression, *saved = output
    ctx.num_levels = len(cls_logits)
    # What only the backward reads gets no gradient, and must not cost a fill with zeros either.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*cls_logits, *box_deltas, *truth, *saved)


def _loss_gradient(ctx: Any, grad_cls: Tensor | None, grad_bbox: Tensor | None, *_: None) -> tuple[Any, ...]:
    num_levels, (*tensors,) = ctx.num_levels, ctx.saved_tensors
    logits, deltas, rest = tensors[:num_levels], tensors[num_levels : 2 * num_levels], tensors[2 * num_levels :]
    # A loss that the caller did not use has no gradient.
    grad_cls, grad_bbox = (rest[-1].new_zeros(()) if grad is None else grad for grad in (grad_cls, grad_bbox))
    grads = multibox_loss_backward_op(grad_cls, grad_bbox, logits, deltas, *rest, ctx.weights, ctx.beta)
    # The ground truth (5 tensors with the anchors) and the 5 settings have no gradient.
    return grads[:num_levels], grads[num_levels:], *(None,) * 10


multibox_loss_op = define(
    "multibox_loss", eager=eager.multibox_loss, load_triton=_load_multibox_loss, fake=_fake_multibox_loss
)
multibox_loss_backward_op = define(
    "multibox_loss_backward",
    eager=eager.multibox_loss_backward,
    load_triton=_load_multibox_loss_backward,
    fake=_fake_multibox_loss_backward,
)
register_autograd("ssdcore::multibox_loss", _loss_gradient, setup_context=_save_for_loss_gradient, lib=LIBRARY)
forbid_second_gradient("multibox_loss", multibox_loss_backward_op)
