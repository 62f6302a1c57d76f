"""Run torchvision's own SSD models on the ops of `ssdcore.kernels`: `accelerate(model)` and `restore(model)`."""

import copy
import math

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

    Only the classes of the model and of its matcher change. So `state_dict` and `load_state_dict` stay the same, and a
    copied, pickled, compiled or distributed model (accelerate it before you wrap it) stays accelerated. A file with the
    whole model needs ssdcore to be loaded, unless the model was restored before. What `torch.jit` or `torch.export`
    makes of the model is torchvision's own code and works without ssdcore.

    Args:
        model: changed in place, not copied. Its settings (`score_thresh`, `nms_thresh`, `topk_candidates`,
            `detections_per_img`, `neg_to_pos_ratio`, the thresholds of its matcher, the weights of its box coder) stay
            in force, and may still be changed afterwards. A matcher that is assigned afterwards brings torchvision's
            loss back.

    Returns:
        The same model. Its detections are float32, whatever the dtype of its weights.

    Raises:
        TypeError: `model` is not a torchvision SSD, or is of a subclass, or its matcher or its box coder is not the one
            that torchvision gave it.
        ValueError: its box coder clamps otherwise than torchvision's.
    """
    if type(model) is AcceleratedSSD:
        return model
    if type(model) is not SSD:
        reason = ", a subclass, which would lose its methods" if isinstance(model, SSD) else ""
        raise TypeError(f"model must be a torchvision SSD, got {type(model).__name__}{reason}")
    for name, part, expected in (
        ("proposal_matcher", model.proposal_matcher, _utils.SSDMatcher),
        ("box_coder", model.box_coder, _utils.BoxCoder),
    ):
        if type(part) is not expected:
            raise TypeError(f"model.{name} must be torchvision's {expected.__name__}, got {type(part).__name__}")
    if not math.isclose(model.box_coder.bbox_xform_clip, math.log(1000 / 16)):
        raise ValueError(
            f"model.box_coder.bbox_xform_clip must be log(1000 / 16), got {model.box_coder.bbox_xform_clip}"
        )
    model.__class__ = AcceleratedSSD
    model.proposal_matcher = _as_class(_DeferredMatcher, model.proposal_matcher)
    return model


def restore(model: SSD) -> SSD:
    """Give a torchvision SSD its own loss and postprocess back: the inverse of `accelerate`.

    Args:
        model: changed in place, not copied. A model that is not accelerated stays as it is.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is not a torchvision SSD.
    """
    if not isinstance(model, SSD):
        raise TypeError(f"model must be a torchvision SSD, got {type(model).__name__}")
    if type(model) is AcceleratedSSD:
        model.__class__ = SSD
        if type(model.proposal_matcher) is _DeferredMatcher:
            model.proposal_matcher = _as_class(_utils.SSDMatcher, model.proposal_matcher)
    return model


def _as_class(new_class: type[_utils.Matcher], matcher: _utils.Matcher) -> _utils.Matcher:
    """A copy, because a shallow copy of the model shares the matcher."""
    matcher = copy.copy(matcher)
    matcher.__class__ = new_class
    return matcher


class _DeferredMatcher(_utils.SSDMatcher):
    """Does nothing when torchvision's loop calls it for each image, because `compute_loss` matches all images."""

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
        matcher = self.proposal_matcher
        if type(matcher) is not _DeferredMatcher:
            return super().compute_loss(targets, head_outputs, anchors, matched_idxs)
        device = head_outputs["cls_logits"].device
        counts = [target["labels"].shape[0] for target in targets]
        gt_offsets = torch.tensor([0, *counts]).cumsum(0).to(device, non_blocking=True)  # [B + 1]
        gt_boxes = torch.cat([target["boxes"] for target in targets])  # [T, 4] xyxy
        gt_labels = torch.cat([target["labels"] for target in targets])  # [T]
        batch_anchors = anchors[0]  # [A, 4] xyxy; the same for all images, because torchvision resizes them to one size
        # torchvision's matcher drops matches below either threshold.
        iou_threshold = max(matcher.high_threshold, matcher.low_threshold)
        losses = multibox_loss(
            head_outputs["cls_logits"],
            head_outputs["bbox_regression"],
            match_anchors(gt_boxes, gt_offsets, batch_anchors, iou_threshold),
            gt_boxes,
            gt_labels,
            gt_offsets,
            batch_anchors,
            weights=self.box_coder.weights,
            neg_pos_ratio=self.neg_to_pos_ratio,
        )
        return {"bbox_regression": losses.bbox_regression, "classification": losses.classification}

    def postprocess_detections(
        self, head_outputs: dict[str, Tensor], image_anchors: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> list[DetectedObjects]:
        """Return the detected objects of each image, in pixels of the resized image."""
        if torch.jit.is_tracing():
            return super().postprocess_detections(head_outputs, image_anchors, image_shapes)
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

    def __prepare_scriptable__(self) -> SSD:
        """Return what `torch.jit.script` compiles in place of this model."""
        return restore(copy.copy(self))
