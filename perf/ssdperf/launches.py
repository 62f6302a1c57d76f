"""Every kernel launch that the launchers make, recorded on CPU tensors in place of being run.

This is the one file of the benchmark that imports the launchers. It needs no GPU.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from ssdcore.kernels.boxes.triton import (
    launch_box_iou,
    launch_decode_boxes,
    launch_decode_boxes_backward,
    launch_encode_boxes,
)
from ssdcore.kernels.matching.triton import launch_match_anchors
from ssdcore.kernels.multibox.triton import launch_multibox_loss, launch_multibox_loss_backward
from ssdcore.kernels.nms.triton import launch_batched_nms_padded
from ssdcore.kernels.postprocess.triton import launch_postprocess_detections
from ssdperf.ssd300 import BOX_WEIGHTS, IMAGE_SIZE, LEVELS

Launch = tuple[JITFunction, dict[str, Any]]  # kernel; arguments and options by name
Levels = Sequence[tuple[int, int]]  # cells, and anchors per cell, of each level
SSD300 = [(level.num_cells, level.anchors_per_cell) for level in LEVELS]


class Calls(NamedTuple):
    """A name for the report, a function that calls the launchers, and the dtype that it calls them with."""

    name: str
    make: Callable[[torch.dtype], None]
    dtype: torch.dtype


def production(dtype: torch.dtype) -> None:
    """Call every launcher at the shapes of SSD300: with COCO's classes in maps of both layouts, with VOC's packed."""
    sizes = {"batch": 2, "topk": 400, "max_detections": 200, "min_negatives": 0}
    # torchvision's 91 classes of COCO need no call, because 81 and 91 classes are both six tiles of 16: one kernel.
    launch_all(dtype, num_classes=81, layouts=("rows", "planes"), levels=SSD300, **sizes)
    launch_all(dtype, num_classes=21, layouts=("packed",), levels=SSD300, **sizes)


def many_classes(dtype: torch.dtype) -> None:
    """Call every launcher with the 601 classes of OpenImages."""
    sizes = {"batch": 2, "topk": 400, "max_detections": 200, "min_negatives": 0}
    launch_all(dtype, num_classes=601, layouts=("planes",), levels=SSD300, **sizes)


def smallest(dtype: torch.dtype) -> None:
    """Call every launcher with sizes of 1: Triton makes such arguments constants and compiles other kernels."""
    sizes = {"batch": 1, "topk": 1, "max_detections": 1, "min_negatives": 1}
    launch_all(dtype, num_classes=2, layouts=("packed",), levels=[(1, 1)], **sizes)
    launch_all(dtype, num_classes=2, layouts=("planes",), levels=[(1, 1), (2, 1), (2, 2)], **sizes)


CALLS = (
    Calls("production", production, torch.float32),
    Calls("production", production, torch.bfloat16),
    Calls("many_classes", many_classes, torch.bfloat16),
    Calls("smallest", smallest, torch.float32),
)


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Collect the kernel launches of the block instead of making them."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(self: JITFunction, *, grid: Any, warmup: bool, **values: Any) -> None:
        launches.append((self, values))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def head_outputs(levels: Levels, layout: str, batch: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    """Return [B, P, a, width] for each level of P cells with a anchors each. Packed, all levels are one."""
    if layout == "packed":
        levels = [(sum(cells * per_cell for cells, per_cell in levels), 1)]
    if layout == "planes":
        return [torch.zeros(batch, a, width, cells, dtype=dtype).permute(0, 3, 1, 2) for cells, a in levels]
    return [torch.zeros(batch, cells, a, width, dtype=dtype) for cells, a in levels]


def launch_all(
    dtype: torch.dtype,
    *,
    batch: int,
    levels: Levels,
    layouts: tuple[str, ...],
    num_classes: int,
    topk: int,
    max_detections: int,
    min_negatives: int,
) -> None:
    """Call every launcher once for each layout, normalizer and choice of classes."""
    num_anchors = sum(cells * per_cell for cells, per_cell in levels)
    boxes = torch.zeros(batch, num_anchors, 4, dtype=dtype)
    anchors = torch.zeros(num_anchors, 4)
    gt_boxes, gt_labels = torch.zeros(batch, 4), torch.ones(batch, dtype=torch.int64)
    gt_offsets = torch.arange(batch + 1, dtype=torch.int32)
    matched = torch.zeros(batch, num_anchors, dtype=torch.int64)
    scalar = torch.zeros(())

    launch_box_iou(boxes[0], boxes[-1])
    launch_encode_boxes(boxes, anchors, BOX_WEIGHTS)
    launch_decode_boxes(boxes, anchors, BOX_WEIGHTS)
    launch_decode_boxes_backward(boxes.float(), boxes, anchors, BOX_WEIGHTS)
    launch_match_anchors(gt_boxes, gt_offsets, anchors, 0.5)
    truth = (matched, gt_boxes, gt_labels, gt_offsets, anchors)
    for layout in layouts:
        outputs = [head_outputs(levels, layout, batch, width, dtype) for width in (num_classes, 4)]
        for normalizer in ("batch", "image"):
            *_, lse, selected, scale = launch_multibox_loss(
                *outputs, *truth, BOX_WEIGHTS, 3.0, 1.0, min_negatives, normalizer
            )
        launch_multibox_loss_backward(scalar, scalar, *outputs, *truth, lse, selected, scale, BOX_WEIGHTS, 1.0)
        launch_postprocess_detections(
            *outputs, anchors, torch.full((batch, 2), IMAGE_SIZE), BOX_WEIGHTS, 0.01, 0.45, topk, max_detections
        )
    for idxs in (None, matched):
        launch_batched_nms_padded(boxes, boxes[..., 0], idxs, 0.45, max_detections, 0.01)
