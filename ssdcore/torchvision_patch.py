"""Run torchvision's own SSD models on the ops of `ssdcore.kernels`: `accelerate(model)`."""

import torch
from torch import Tensor
from torchvision.models.detection import _utils
from torchvision.models.detection.ssd import SSD

from ssdcore.kernels import match_anchors, multibox_loss, postprocess_detections
from ssdcore.objects import DetectedObjects, Target


def accelerate(model: SSD) -> SSD:
    """Replace the loss and the postprocess of a torchvision SSD with ops that process the whole batch at once.

    Weights, calls, targets and results stay the same, except for the differences that the README lists. This works for
    every SSD of `torchvision.models.detection`: ssd300_vgg16, ssdlite320_mobilenet_v3_large, or an SSD that you built
    from a backbone and a head of your own. A subclass of SSD is refused, because it would lose its methods.

    Args:
        model: changed in place, not copied. Its settings (thresholds, ratio of negatives, top-k) stay in force, and
            may still be changed afterwards.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a torchvision SSD, or is of a subclass.
    """
    if type(model) not in (SSD, AcceleratedSSD):
        reason = ", a subclass, which would lose its methods" if isinstance(model, SSD) else ""
        raise TypeError(f"model must be a torchvision SSD, got {type(model).__name__}{reason}")
    model.__class__ = AcceleratedSSD
    model.proposal_matcher = _DeferredMatcher(model.proposal_matcher.high_threshold)
    return model


class _DeferredMatcher(_utils.Matcher):
    """Does nothing when torchvision's loop calls it for each image, because `compute_loss` matches all images."""

    def __init__(self, iou_threshold: float) -> None:
        super().__init__(iou_threshold, iou_threshold)

    def __call__(self, match_quality_matrix: Tensor) -> None:
        return None


class AcceleratedSSD(SSD):
    """A torchvision SSD after `accelerate`."""

    def compute_loss(
        self,
        targets: list[Target],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor | None],
    ) -> dict[str, Tensor]:
        """Match the anchors with the targets and compute the losses. `matched_idxs` is ignored."""
        device = head_outputs["cls_logits"].device
        counts = [len(target["labels"]) for target in targets]
        gt_offsets = torch.tensor([0, *counts]).cumsum(0).to(device, non_blocking=True)  # [B + 1]
        gt_boxes = torch.cat([target["boxes"] for target in targets]).float()  # [T, 4] xyxy
        gt_labels = torch.cat([target["labels"] for target in targets])  # [T]
        batch_anchors = anchors[0]  # [A, 4] xyxy; the same for all images, because torchvision resizes them to one size
        return multibox_loss(
            head_outputs["cls_logits"],
            head_outputs["bbox_regression"],
            match_anchors(gt_boxes, gt_offsets, batch_anchors, self.proposal_matcher.high_threshold),
            gt_boxes,
            gt_labels,
            gt_offsets,
            batch_anchors,
            weights=self.box_coder.weights,
            neg_pos_ratio=self.neg_to_pos_ratio,
        )._asdict()

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[DetectedObjects]:
        """Return the detected objects of each image, in pixels of the resized image."""
        logits = head_outputs["cls_logits"]
        boxes, scores, labels, counts, _ = postprocess_detections(
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
            for b, count in enumerate(counts.tolist())  # the only wait for the GPU
        ]
