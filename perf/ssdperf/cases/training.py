"""Matching, the MultiBox loss with its gradients, and the two together as SSD's criterion."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import SSDMatcher

from ssdcore import kernels
from ssdperf import eager, inputs
from ssdperf.cases.peers import torchvision_ssd
from ssdperf.differences import NEAR_TIE, same_matches, within
from ssdperf.registry import BATCHES, SSD_QUICK, SSD_STAR, SSD_SWEEP, Workload, case, ssd, star, without
from ssdperf.ssd300 import BOX_WEIGHTS, NUM_CLASSES

IOU_THRESHOLD = 0.5  # an anchor matches an object from here; the default of `match_anchors` and of torchvision's SSD
LOSS_SETTINGS = (3.0, 1.0, 0, "batch")  # neg_pos_ratio, beta, min_negatives, normalizer: the defaults of the op


def match_by_torchvision(images: Sequence[Tensor], anchors: Tensor) -> list[Tensor]:
    """Match each image's boxes as `SSD.forward` does before `compute_loss`, with its default threshold."""
    matcher = SSDMatcher(IOU_THRESHOLD)
    unmatched = torch.full((len(anchors),), -1, device=anchors.device)
    return [matcher(torchvision.ops.box_iou(boxes, anchors)) if len(boxes) else unmatched for boxes in images]


@case(
    "match_anchors",
    shapes=without("C", "head", shapes=star(ssd(dtype="float32"), B=BATCHES, A=(24_564,), G=(1, 100))),
    quick=without("C", "head", shapes=SSD_QUICK),
    sweep={"B": SSD_SWEEP["B"], "A": SSD_SWEEP["A"], "G": (1, 3, 10, 30, 100)},
)
def match_anchors(device: str, dtype: torch.dtype, B: int, A: int, G: int) -> Workload:
    truth, anchors = inputs.truth(B, NUM_CLASSES, G, device), inputs.anchors(A, device)
    images = truth.boxes.split(truth.counts)
    return Workload(
        {
            "ssdcore": lambda: kernels.match_anchors(truth.boxes, truth.offsets, anchors),
            "torchvision": lambda: torch.stack(match_by_torchvision(images, anchors)),
            "eager": lambda: eager.match_anchors(truth.boxes, truth.offsets, anchors, IOU_THRESHOLD),
        },
        reads=(truth.boxes, anchors),
        difference=same_matches,
    )


class _Loss:
    """One problem of the loss: each provider's losses and gradients of the head's outputs."""

    def __init__(self, device: str, dtype: torch.dtype, B: int, A: int, C: int, G: int, head: str) -> None:
        self.truth, self.anchors = inputs.truth(B, C, G, device), inputs.anchors(A, device)
        self.targets = self.truth.targets()
        outputs = inputs.head_outputs(B, A, C, "trained", dtype, device)
        self.logits, self.deltas = ([x.requires_grad_() for x in inputs.as_head(packed, head)] for packed in outputs)
        self.grad_loss = torch.ones((), device=device)

    def match_by_ssdcore(self) -> Tensor:
        return kernels.match_anchors(self.truth.boxes, self.truth.offsets, self.anchors)

    def match_by_eager(self) -> Tensor:
        return eager.match_anchors(self.truth.boxes, self.truth.offsets, self.anchors, IOU_THRESHOLD)

    def ssdcore(self, matched: Tensor) -> list[Tensor]:
        truth = (self.truth.boxes, self.truth.labels, self.truth.offsets, self.anchors)
        losses = kernels.multibox_loss(*map(inputs.as_argument, (self.logits, self.deltas)), matched, *truth)
        return [*losses, *torch.autograd.grad(losses.classification + losses.bbox_regression, self.leaves)]

    def eager(self, matched: Tensor) -> list[Tensor]:
        truth = (matched, self.truth.boxes, self.truth.labels, self.truth.offsets, self.anchors)
        levels = [inputs.as_levels(x) for x in (self.logits, self.deltas)]
        _, beta, *_ = LOSS_SETTINGS
        with torch.no_grad():
            *losses, lse, selected, scale = eager.multibox_loss(*levels, *truth, BOX_WEIGHTS, *LOSS_SETTINGS)
            gradients = eager.multibox_loss_backward(
                self.grad_loss, self.grad_loss, *levels, *truth, lse, selected, scale, BOX_WEIGHTS, beta
            )
        pairs = zip(gradients, self.leaves, strict=True)
        return [*losses, *(x.permute(0, 2, 3, 1).reshape(y.shape) if y.dim() == 4 else x.squeeze(2) for x, y in pairs)]

    def torchvision(self, matched: list[Tensor]) -> list[Tensor]:
        logits, deltas = inputs.repacked(self.logits), inputs.repacked(self.deltas)
        outputs = {"cls_logits": logits.float(), "bbox_regression": deltas.float()}
        losses = torchvision_ssd().compute_loss(self.targets, outputs, [self.anchors] * len(matched), matched)
        classification, bbox_regression = losses["classification"], losses["bbox_regression"]
        gradients = torch.autograd.grad(classification + bbox_regression, self.leaves)
        return [classification, bbox_regression, *gradients]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.logits, *self.deltas]

    def workload(self, providers: Mapping[str, Callable[[], Any]], *also_read: Tensor) -> Workload:
        # The deltas and anchors do not count as read, because only those of the positives are: about one in 300.
        return Workload(providers, reads=(*self.logits, *also_read), difference=within(NEAR_TIE))


@case("multibox_loss", compiles=True, shapes=SSD_STAR, quick=SSD_QUICK, sweep=SSD_SWEEP)
def multibox_loss(device: str, dtype: torch.dtype, B: int, A: int, C: int, G: int, head: str) -> Workload:
    """The loss forward and backward, given the matches."""
    loss = _Loss(device, dtype, B, A, C, G, head)
    matched = loss.match_by_eager()
    images = list(matched)
    return loss.workload(
        {
            "ssdcore": lambda: loss.ssdcore(matched),
            "torchvision": lambda: loss.torchvision(images),
            "eager": lambda: loss.eager(matched),
        },
        matched,
    )


@case(
    "criterion",
    shapes=SSD_STAR,
    quick=SSD_QUICK,
    sweep={**SSD_SWEEP, "G": (1, 3, 10, 30, 100)},
)
def criterion(device: str, dtype: torch.dtype, B: int, A: int, C: int, G: int, head: str) -> Workload:
    """Matching and the loss, forward and backward."""
    loss = _Loss(device, dtype, B, A, C, G, head)
    images = loss.truth.boxes.split(loss.truth.counts)
    return loss.workload(
        {
            "ssdcore": lambda: loss.ssdcore(loss.match_by_ssdcore()),
            "torchvision": lambda: loss.torchvision(match_by_torchvision(images, loss.anchors)),
            "eager": lambda: loss.eager(loss.match_by_eager()),
        }
    )
