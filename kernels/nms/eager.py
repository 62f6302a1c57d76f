"""Greedy NMS in NumPy, of tensors on any device: each decision depends on those before it, so the host makes them.

Up to a thousand boxes of one class take torchvision's compiled kernel less time than NumPy needs for its calls. So that
kernel decides where the process has loaded torchvision. It gives the same result.
"""

import platform
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssdcore.kernels.nms.overlaps import overlapped, overlapping_pairs
from ssdcore.kernels.rules import round_down, sort_key, widen
from ssdcore.kernels.sorting import descending_keys, numbered, rank_in_group, stable_order

FIRST_BLOCK = 128  # boxes of each group that are settled first: compared directly, 16,384 pairs
BLOCK_GROWTH = 8  # times as many boxes in the next block, if the last block kept many of its boxes
TORCHVISION_BOXES = 1024  # the most boxes that torchvision's kernel settles: its time grows with the square
MANY_KEPT = 0.4  # share of a block's boxes; a chain, in which each box suppresses only the next one, keeps half


def nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    settle = _torchvision_nms() if idxs is None and boxes.is_cpu and len(boxes) <= TORCHVISION_BOXES else None
    if settle is not None:
        return settle(widen(boxes), sort_key(scores), iou_threshold)
    corners, order = _to_numpy(widen(boxes)), stable_order(descending_keys(_to_numpy(widen(scores))))
    if idxs is None:
        kept = greedy_keep(corners.take(order, axis=0), np.zeros(len(order), dtype=np.int64), iou_threshold)
    else:
        classes = _to_numpy(idxs).take(order)
        by_class = stable_order(classes)
        kept = np.empty(len(order), dtype=bool)
        sorted_boxes = corners.take(order.take(by_class), axis=0)
        kept[by_class] = greedy_keep(sorted_boxes, numbered(classes.take(by_class)), iou_threshold)
    return torch.from_numpy(order.compress(kept)).to(boxes.device)


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    batch, num_boxes = scores.shape
    flat_scores = _to_numpy(widen(scores)).reshape(-1)
    order = stable_order(descending_keys(flat_scores))
    if score_threshold is not None:
        order = order.compress(flat_scores.take(order) > score_threshold)
    # By image, then by class, and best first within each.
    order = order.take(stable_order(order // max(1, num_boxes)))  # by image, best first
    image = order // max(1, num_boxes)
    by_class = np.arange(len(order))
    group = image
    if idxs is not None:
        classes = _to_numpy(idxs).reshape(-1).take(order)
        by_class = stable_order(classes)
        by_class = by_class.take(stable_order(image.take(by_class)))
        group = numbered(image.take(by_class), classes.take(by_class))
    sorted_boxes = _to_numpy(widen(boxes)).reshape(-1, 4).take(order.take(by_class), axis=0)
    kept = np.empty(len(order), dtype=bool)
    kept[by_class] = greedy_keep(sorted_boxes, group, iou_threshold)

    order, image = order.compress(kept), image.compress(kept)
    num_kept = np.bincount(image, minlength=batch)
    slot = np.arange(len(order)) - (num_kept.cumsum() - num_kept).take(image)
    returned = slot < max_output
    output = np.full((batch, max_output), -1, dtype=np.int64)
    output[image[returned], slot[returned]] = order[returned] - image[returned] * num_boxes
    num_kept = num_kept.clip(max=max_output).astype(np.int32)
    return torch.from_numpy(output).to(boxes.device), torch.from_numpy(num_kept).to(boxes.device)


def _torchvision_nms() -> Callable[[Tensor, Tensor, float], Tensor] | None:
    """torchvision's kernel, if this process has loaded it and if it rounds each operation as ours do."""
    # Compilers for other processors than x86-64 may contract a product and a sum to one operation, rounded once.
    if "torchvision" not in sys.modules or platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        overload: Callable[[Tensor, Tensor, float], Tensor] = torch.ops.torchvision.nms.default
    except AttributeError:  # torchvision without its compiled part
        return None
    return overload


def _to_numpy(x: Tensor) -> np.ndarray:
    return x.cpu().numpy()


@np.errstate(all="ignore")  # boxes with NaN, infinite or huge sides are legal
def greedy_keep(boxes: np.ndarray, group: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Which of `boxes` [M, 4], sorted by `group` [M] and then from best to worst, NMS keeps: bool [M].

    Boxes of different groups do not suppress each other. Groups are numbered from 0 on.

    Settles the best boxes of each group, drops what they suppress, and so on with the rest. Blocks grow where few boxes
    are suppressed, because comparing a block with the rest saves little there.
    """
    if boxes.dtype == np.float32:
        iou_threshold = round_down(iou_threshold)
    if len(boxes) <= 2 * FIRST_BLOCK:  # a second step would cost more than it saves
        return _settle(boxes, group, iou_threshold)
    keep = np.zeros(len(boxes), dtype=bool)
    undecided = np.arange(len(boxes))
    block_boxes = FIRST_BLOCK
    while len(undecided):
        groups = group.take(undecided)
        in_block = rank_in_group(groups) < block_boxes
        block = undecided.compress(in_block)
        kept = block.compress(_settle(boxes.take(block, axis=0), groups.compress(in_block), iou_threshold))
        keep[kept] = True
        if len(block) == len(undecided):
            break
        undecided = undecided.compress(~in_block)
        suppressed = overlapped(
            boxes.take(undecided, axis=0),
            group.take(undecided),
            boxes.take(kept, axis=0),
            group.take(kept),
            iou_threshold,
        )
        undecided = undecided.compress(~suppressed)
        if len(kept) > MANY_KEPT * len(block):
            block_boxes *= BLOCK_GROWTH
    return keep


def _settle(boxes: np.ndarray, group: np.ndarray, iou_threshold: float) -> np.ndarray:
    """Which of `boxes` [M, 4], sorted by `group` [M] and then from best to worst, greedy NMS keeps: bool [M]."""
    better, worse = overlapping_pairs(boxes, group, iou_threshold)
    order = stable_order(better)  # a box is decided before what it says of others matters
    suppressed = bytearray(len(boxes))
    for i, j in zip(better.take(order).tolist(), worse.take(order).tolist(), strict=True):
        if not suppressed[i]:
            suppressed[j] = 1
    return np.frombuffer(suppressed, dtype=bool) ^ True
