"""The SSD criterion as a module, for people who have a model of their own."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from ssdcore.kernels import MultiBoxLosses, match_anchors, multibox_loss
from ssdcore.objects import Target, ragged


class MultiBoxLoss(nn.Module):
    """Matches anchors with the ground truth and computes the SSD loss: `criterion(cls_logits, box_deltas, targets)`.

    The anchors are a buffer, so that `criterion.to(device)` moves them. Nothing waits for the GPU.

    Outputs that lie as [B, C, A] and [B, 4, A], as NVIDIA's SSD gives them, are one map of A cells with one anchor
    each. They are read where they lie: `criterion([cls_logits[..., None]], [box_deltas[..., None]], targets)`.

    Args:
        anchors: [A, 4] xyxy.
        iou_threshold: an anchor whose IoU with a ground truth is at least this is a positive, as in `match_anchors`.
        weights, neg_pos_ratio, beta, min_negatives, normalizer: those of `ssdcore.kernels.multibox_loss`, where they
            are described.

    Source: Liu et al., "SSD: Single Shot MultiBox Detector" (2016), section 2.2.
    """

    anchors: Tensor  # [A, 4] xyxy

    def __init__(
        self,
        anchors: Tensor,
        *,
        iou_threshold: float = 0.5,
        weights: Sequence[float] = (10.0, 10.0, 5.0, 5.0),  # 1 / 0.1 and 1 / 0.2, the paper's variances
        neg_pos_ratio: float = 3.0,
        beta: float = 1.0,
        min_negatives: int = 0,
        normalizer: Literal["batch", "image"] = "batch",
    ) -> None:
        super().__init__()
        self.register_buffer("anchors", anchors, persistent=False)
        self.iou_threshold = iou_threshold
        self.weights = weights
        self.neg_pos_ratio = neg_pos_ratio
        self.beta = beta
        self.min_negatives = min_negatives
        self.normalizer: Literal["batch", "image"] = normalizer

    def forward(
        self,
        cls_logits: Tensor | Sequence[Tensor],
        box_deltas: Tensor | Sequence[Tensor],
        targets: Sequence[Target],
    ) -> MultiBoxLosses:
        """Compute the losses of a batch.

        Args:
            cls_logits: [B, A, C], or the head's maps: a sequence of [B, a * C, H, W] in the order of the anchors.
            box_deltas: [B, A, 4], or a sequence of [B, a * 4, H, W].
            targets: one per image: `boxes` float [G, 4] xyxy in the frame of the anchors, and `labels` int64 [G] in
                1..C-1, because 0 is the background. G may be 0. On any device.

        Returns:
            `MultiBoxLosses(classification, bbox_regression)`, two float32 scalars to add and differentiate.

        Raises:
            TypeError, ValueError: an argument has another dtype, shape or device than described.
        """
        gt_boxes, gt_labels, gt_offsets = ragged(targets, self.anchors.device)
        return multibox_loss(
            cls_logits,
            box_deltas,
            match_anchors(gt_boxes, gt_offsets, self.anchors, self.iou_threshold),
            gt_boxes,
            gt_labels,
            gt_offsets,
            self.anchors,
            weights=self.weights,
            neg_pos_ratio=self.neg_pos_ratio,
            beta=self.beta,
            min_negatives=self.min_negatives,
            normalizer=self.normalizer,
        )
