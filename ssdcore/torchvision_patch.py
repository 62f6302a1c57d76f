"""torchvision's own SSD on the ops of `ssdcore.kernels`: `accelerate(model)`."""

import torch
from torch import Tensor
from torchvision.models.detection import _utils
from torchvision.models.detection.ssd import SSD

from ssdcore.kernels import match_anchors, multibox_loss, postprocess_detections


def accelerate(model: SSD) -> SSD:
    """Give a torchvision SSD a loss and a postprocess that treat the whole batch at once.

    The same weights, calls, targets and results; what differs is told in the README. Any
    `torchvision.models.detection` SSD will do: ssd300_vgg16, ssdlite320_mobilenet_v3_large, your own.

    Args:
        model: is changed, not copied; its settings (thresholds, ratio, top-k) are obeyed.

    Returns:
        The same model.

    Raises:
        TypeError: it is no torchvision SSD.
    """
    if not isinstance(model, SSD):
        raise TypeError(f"model must be a torchvision SSD, got {type(model).__name__}")
    model.__class__ = AcceleratedSSD
    model.proposal_matcher = _MatchLater(model.proposal_matcher.high_threshold)
    return model


class _MatchLater(_utils.Matcher):
    """Stands in torchvision's loop over images; `compute_loss` matches them all at once."""

    def __init__(self, iou_threshold: float) -> None:
        super().__init__(iou_threshold, iou_threshold)

    def __call__(self, match_quality_matrix: Tensor) -> None:
        return None


class AcceleratedSSD(SSD):
    """What `accelerate` makes of a torchvision SSD."""

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor | None],
    ) -> dict[str, Tensor]:
        device = head_outputs["cls_logits"].device
        counts = [len(target["labels"]) for target in targets]
        gt_offsets = torch.tensor([0, *counts]).cumsum(0).to(device, non_blocking=True)  # [B + 1]
        gt_boxes = torch.cat([target["boxes"] for target in targets]).float()  # [T, 4] xyxy
        gt_labels = torch.cat([target["labels"] for target in targets])  # [T]
        matched = match_anchors(gt_boxes, gt_offsets, anchors[0], self.proposal_matcher.high_threshold)
        return multibox_loss(
            head_outputs["cls_logits"],
            head_outputs["bbox_regression"],
            matched,
            gt_boxes,
            gt_labels,
            gt_offsets,
            anchors[0],  # torchvision resizes every image to one size: all have the same
            weights=self.box_coder.weights,
            neg_pos_ratio=self.neg_to_pos_ratio,
        )._asdict()

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        logits = head_outputs["cls_logits"]
        boxes, scores, labels, counts = postprocess_detections(
            logits,
            head_outputs["bbox_regression"],
            image_anchors[0],
            torch.tensor(image_shapes).to(logits.device, non_blocking=True),
            weights=self.box_coder.weights,
            score_threshold=self.score_thresh,
            iou_threshold=self.nms_thresh,
            topk_candidates=self.topk_candidates,
            max_detections=self.detections_per_img,
        )
        return [
            {"boxes": boxes[b, :count], "scores": scores[b, :count], "labels": labels[b, :count]}
            for b, count in enumerate(counts.tolist())  # the one wait for the GPU
        ]
