"""The ops conform to the oracles, and the conformance suite detects broken ops."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torchvision
from conftest import Backend
from hypothesis import Phase, settings
from torch import Tensor

from ssdcore import kernels
from ssdcore.testing import conformance

NAMES = sorted(set(kernels.__all__) - {"Detections", "MultiBoxLosses"})


@pytest.mark.parametrize("name", NAMES)
def test_operator_agrees_with_the_oracle(name: str, backend: Backend) -> None:
    check = getattr(conformance, f"check_{name}")
    check(getattr(kernels, name), device=backend.device, max_examples=backend.max_examples)


def test_torchvisions_nms_and_box_iou_conform() -> None:
    conformance.check_nms(torchvision.ops.nms)
    conformance.check_box_iou(torchvision.ops.box_iou)


@pytest.fixture
def without_shrinking() -> Iterator[None]:
    """Let Hypothesis stop at the first failing problem, because making the problem small takes a minute."""
    profile = settings.get_current_profile_name()
    settings.register_profile("without_shrinking", settings.get_profile(profile), phases=[Phase.generate])
    settings.load_profile("without_shrinking")
    yield
    settings.load_profile(profile)


def _nms_suppressing_at_the_threshold(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return kernels.nms(boxes, scores, iou_threshold - 1e-6)


def _nms_with_ties_in_descending_index_order(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return len(boxes) - 1 - kernels.nms(boxes.flip(0), scores.flip(0), iou_threshold)


def _match_with_first_claim_winning(
    gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float
) -> Tensor:
    matched = kernels.match_anchors(gt_boxes, gt_offsets, anchors, iou_threshold)
    counts = gt_offsets.diff()[:, None]
    flipped = [image_gt_boxes.flip(0) for image_gt_boxes in gt_boxes.split(gt_offsets.diff().tolist())]
    flipped_matched = kernels.match_anchors(torch.cat([gt_boxes[:0], *flipped]), gt_offsets, anchors, iou_threshold)
    return torch.where(matched >= 0, counts - 1 - flipped_matched, matched)


def _loss_with_too_few_negatives(*args: Any, neg_pos_ratio: float, **settings: Any) -> Any:
    return kernels.multibox_loss(*args, neg_pos_ratio=max(0.0, neg_pos_ratio - 0.7), **settings)


def _loss_with_half_the_gradient(*args: Any, **settings: Any) -> Any:
    return [0.5 * (loss + loss.detach()) for loss in kernels.multibox_loss(*args, **settings)]


def _postprocess_without_clipping(*args: Any, image_sizes: Tensor, **settings: Any) -> Any:
    return kernels.postprocess_detections(*args, image_sizes=torch.full_like(image_sizes, 10**6), **settings)


@pytest.mark.parametrize(
    ("check", "broken"),
    [
        (conformance.check_nms, _nms_suppressing_at_the_threshold),
        (conformance.check_nms, _nms_with_ties_in_descending_index_order),
        (conformance.check_batched_nms, lambda boxes, scores, idxs, iou: kernels.nms(boxes, scores, iou)),
        (conformance.check_batched_nms, torchvision.ops.batched_nms),  # wrong for negative coordinates
        (conformance.check_match_anchors, _match_with_first_claim_winning),
        (conformance.check_multibox_loss, _loss_with_too_few_negatives),
        (conformance.check_multibox_loss, _loss_with_half_the_gradient),
        (conformance.check_postprocess_detections, _postprocess_without_clipping),
    ],
)
def test_the_suite_detects_broken_ops(check: Any, broken: Any, without_shrinking: None) -> None:
    with pytest.raises(AssertionError):
        check(broken, max_examples=1000)
