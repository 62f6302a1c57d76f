"""What is measured: one entry a case, its inputs, and the call of every provider that it has.

A provider's result must first match eager's; the one of lower precision or another contract does not belong here.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSD

from ssdcore import kernels
from ssdcore.anchors import SSD300_COCO, make_anchors
from ssdcore.kernels import eager

WEIGHTS = [10.0, 10.0, 5.0, 5.0]
NUM_CLASSES = 81  # COCO's 80 and background
IMAGE = 300  # pixels


@dataclass(frozen=True)
class Case:
    name: str
    shape: str
    dtype: str
    providers: dict[str, Callable[[], Any]]  # "ssdcore", "eager", "torchvision"


@functools.cache
def torchvision_ssd() -> SSD:
    return torchvision.models.detection.ssd300_vgg16(weights=None, weights_backbone=None, num_classes=2)


def random_boxes(*shape: int, device: str, spread: float = 0.3) -> Tensor:
    """[*shape, 4] xyxy in an image, sides up to `spread` of it."""
    corner = torch.rand(*shape, 2, device=device) * IMAGE * (1 - spread)
    return torch.cat((corner, corner + (0.01 + torch.rand(*shape, 2, device=device) * spread) * IMAGE), dim=-1)


def cases(device: str, quick: bool) -> Iterator[Case]:
    """All cases, one after the other, so that only one's inputs are in memory."""
    batch = 2 if quick else (8 if device == "cpu" else 32)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    anchors = make_anchors(SSD300_COCO).to(device)
    for num_boxes in (1000, len(anchors)) if quick or device == "cpu" else (1000, 10_000, 30_000):
        yield _nms(num_boxes, device)
        yield _batched_nms(num_boxes, device)
    yield _box_iou(anchors)
    yield from _codec(batch, anchors)
    yield _match(batch, anchors)
    yield _criterion(batch, anchors, dtype)
    for name, spread in (("trained", 1.0), ("random", 0.05)):
        yield _postprocess(name, spread, batch, anchors, dtype)


def _shape(**sizes: int) -> str:
    return " ".join(f"{name}={size}" for name, size in sizes.items())


def _nms(num_boxes: int, device: str) -> Case:
    boxes, scores = random_boxes(num_boxes, device=device), torch.rand(num_boxes, device=device)
    return Case(
        "nms",
        _shape(N=num_boxes),
        "float32",
        {
            "ssdcore": lambda: kernels.nms(boxes, scores, 0.5),
            "eager": lambda: eager.nms(boxes, scores, None, 0.5),
            "torchvision": lambda: torchvision.ops.nms(boxes, scores, 0.5),
        },
    )


def _batched_nms(num_boxes: int, device: str) -> Case:
    boxes, scores = random_boxes(num_boxes, device=device), torch.rand(num_boxes, device=device)
    idxs = torch.randint(0, 80, (num_boxes,), device=device)
    return Case(
        "batched_nms",
        _shape(N=num_boxes, classes=80),
        "float32",
        {
            "ssdcore": lambda: kernels.batched_nms(boxes, scores, idxs, 0.5),
            "eager": lambda: eager.nms(boxes, scores, idxs, 0.5),
            "torchvision": lambda: torchvision.ops.batched_nms(boxes, scores, idxs, 0.5),
        },
    )


def _box_iou(anchors: Tensor) -> Case:
    boxes = random_boxes(100, device=str(anchors.device))
    return Case(
        "box_iou",
        _shape(N=len(boxes), M=len(anchors)),
        "float32",
        {
            "ssdcore": lambda: kernels.box_iou(boxes, anchors),
            "eager": lambda: eager.box_iou(boxes, anchors),
            "torchvision": lambda: torchvision.ops.box_iou(boxes, anchors),
        },
    )


def _codec(batch: int, anchors: Tensor) -> Iterator[Case]:
    boxes = random_boxes(batch, len(anchors), device=str(anchors.device))
    flat_boxes, flat_anchors = boxes.flatten(0, 1), anchors.repeat(batch, 1)
    deltas = eager.encode_boxes(boxes, anchors, WEIGHTS)
    flat_deltas = deltas.flatten(0, 1)
    coder = BoxCoder(tuple(WEIGHTS))
    yield Case(
        "encode_boxes",
        _shape(B=batch, A=len(anchors)),
        "float32",
        {
            "ssdcore": lambda: kernels.encode_boxes(boxes, anchors),
            "eager": lambda: eager.encode_boxes(boxes, anchors, WEIGHTS),
            "torchvision": lambda: coder.encode_single(flat_boxes, flat_anchors).view_as(boxes),
        },
    )
    yield Case(
        "decode_boxes",
        _shape(B=batch, A=len(anchors)),
        "float32",
        {
            "ssdcore": lambda: kernels.decode_boxes(deltas, anchors),
            "eager": lambda: eager.decode_boxes(deltas, anchors, WEIGHTS),
            "torchvision": lambda: coder.decode_single(flat_deltas, flat_anchors).view_as(deltas),
        },
    )


def _truth(batch: int, device: str) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Ground truths as on COCO: seven an image in the mean, none on some."""
    counts = [0, 3, 7, 11, 14] * batch
    counts = counts[:batch]
    offsets = torch.tensor([0, *counts], device=device).cumsum(0)
    labels = torch.randint(1, NUM_CLASSES, (sum(counts),), device=device)
    return counts, random_boxes(sum(counts), device=device), labels, offsets


def _torchvision_match(boxes: list[Tensor], anchors: Tensor) -> list[Tensor]:
    matcher = SSDMatcher(0.5)
    none = torch.full((len(anchors),), -1, device=anchors.device)
    return [matcher(torchvision.ops.box_iou(own, anchors)) if len(own) else none for own in boxes]


def _match(batch: int, anchors: Tensor) -> Case:
    counts, gt_boxes, _, gt_offsets = _truth(batch, str(anchors.device))
    images = list(gt_boxes.split(counts))
    return Case(
        "match_anchors",
        _shape(B=batch, A=len(anchors), T=len(gt_boxes)),
        "float32",
        {
            "ssdcore": lambda: kernels.match_anchors(gt_boxes, gt_offsets, anchors),
            "eager": lambda: eager.match_anchors(gt_boxes, gt_offsets, anchors, 0.5),
            "torchvision": lambda: torch.stack(_torchvision_match(images, anchors)),
        },
    )


def _criterion(batch: int, anchors: Tensor, dtype: torch.dtype) -> Case:
    """Match, loss, and the gradients of the head's outputs."""
    device = str(anchors.device)
    counts, gt_boxes, gt_labels, gt_offsets = _truth(batch, device)
    targets = [
        {"boxes": boxes, "labels": labels}
        for boxes, labels in zip(gt_boxes.split(counts), gt_labels.split(counts), strict=True)
    ]
    images = [target["boxes"] for target in targets]
    logits = torch.randn(batch, len(anchors), NUM_CLASSES, device=device, dtype=dtype).requires_grad_()
    deltas = torch.randn(batch, len(anchors), 4, device=device, dtype=dtype).requires_grad_()

    def gradients(losses: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*losses, *torch.autograd.grad(losses[0] + losses[1], (logits, deltas))]

    def ssdcore() -> list[Tensor]:
        matched = kernels.match_anchors(gt_boxes, gt_offsets, anchors)
        return gradients(kernels.multibox_loss(logits, deltas, matched, gt_boxes, gt_labels, gt_offsets, anchors))

    def eagerly() -> list[Tensor]:
        matched = eager.match_anchors(gt_boxes, gt_offsets, anchors, 0.5)
        truth = (matched, gt_boxes, gt_labels, gt_offsets, anchors)
        with torch.no_grad():
            *losses, lse, selected, scale = eager.multibox_loss(logits, deltas, *truth, WEIGHTS, 3.0, 1.0, 0, "batch")
            one = torch.ones((), device=device)
            grads = eager.multibox_loss_backward(one, one, logits, deltas, *truth, lse, selected, scale, WEIGHTS, 1.0)
        return [*losses, *grads]

    def by_torchvision() -> list[Tensor]:
        outputs = {"cls_logits": logits.float(), "bbox_regression": deltas.float()}
        matched = _torchvision_match(images, anchors)
        losses = torchvision_ssd().compute_loss(targets, outputs, [anchors] * batch, matched)
        return gradients((losses["classification"], losses["bbox_regression"]))

    return Case(
        "criterion (forward + backward)",
        _shape(B=batch, A=len(anchors), C=NUM_CLASSES, T=len(gt_boxes)),
        str(dtype).removeprefix("torch."),
        {"ssdcore": ssdcore, "eager": eagerly, "torchvision": by_torchvision},
    )


def _postprocess(name: str, spread: float, batch: int, anchors: Tensor, dtype: torch.dtype) -> Case:
    """As after training (few classes of few anchors pass), and at random initialisation (everything does)."""
    device = str(anchors.device)
    logits = torch.randn(batch, len(anchors), NUM_CLASSES, device=device) * spread
    if name == "trained":
        logits[..., 0] += 8  # background nearly everywhere: some 50 anchors of each class pass
        logits[:, :: len(anchors) // 50, 1:] += 6
    deltas = torch.randn(batch, len(anchors), 4, device=device).to(dtype)
    logits = logits.to(dtype)
    image_sizes = torch.full((batch, 2), IMAGE, device=device)
    settings = (WEIGHTS, 0.01, 0.45, 400, 200)

    def by_torchvision() -> list[Tensor]:
        outputs = {"cls_logits": logits.float(), "bbox_regression": deltas.float()}
        shapes = [(IMAGE, IMAGE)] * batch
        found = torchvision_ssd().postprocess_detections(outputs, [anchors] * batch, shapes)
        # As ours, padded, so that the two can be compared: a copy of 200 rows.
        return [torch.stack([torch.nn.functional.pad(d["scores"], (0, 200 - len(d["scores"]))) for d in found])]

    return Case(
        f"postprocess ({name})",
        _shape(B=batch, A=len(anchors), C=NUM_CLASSES),
        str(dtype).removeprefix("torch."),
        {
            "ssdcore": lambda: [kernels.postprocess_detections(logits, deltas, anchors, image_sizes).scores],
            "eager": lambda: [eager.postprocess_detections(logits, deltas, anchors, image_sizes, *settings)[1]],
            "torchvision": by_torchvision,
        },
    )
