"""Assignment of ground truths to anchors in NumPy, of tensors on any device.

NumPy runs in the calling thread, and its arrays stay in the cache. PyTorch would divide each operation among threads.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ssdcore.kernels.rules import computed_dtype

TRUTHS_AT_ONCE = 8  # with 8732 anchors an array of their pairs is 280 KB


@np.errstate(all="ignore")  # boxes with NaN, infinite or huge sides are legal
def match_anchors(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    dtype = torch.promote_types(computed_dtype(gt_boxes), computed_dtype(anchors))
    truths, boxes = (np.ascontiguousarray(x.to("cpu", dtype).numpy().T) for x in (gt_boxes, anchors))  # [4, T], [4, A]
    offsets = gt_offsets.tolist()
    matched = np.full((len(offsets) - 1, len(anchors)), -1, dtype=np.int64)
    if matched.size:
        for image, (first, end) in enumerate(pairwise(offsets)):
            _match_image(truths[:, first:end], boxes, boxes.dtype.type(iou_threshold), matched[image])
    return torch.from_numpy(matched).to(anchors.device)


def _match_image(truths: np.ndarray, anchors: np.ndarray, iou_threshold: float, matched: np.ndarray) -> None:
    """Match the ground truths [4, G] of one image; writes to `matched` [A], which holds -1."""
    best_iou = np.zeros(len(matched), dtype=anchors.dtype)
    claims = []
    for start in range(0, truths.shape[1], TRUTHS_AT_ONCE):
        iou = _iou_or_zero(truths[:, start : start + TRUTHS_AT_ONCE], anchors)  # [g, A]
        best_of_step = iou.max(axis=0)
        # Greater than the best before, so that the first of equal ones stays, and greater than 0, because a threshold
        # may round to 0, which every pair would reach.
        better = ((best_of_step > best_iou) & (best_of_step >= iou_threshold)).nonzero()[0]
        matched[better] = start + iou[:, better].argmax(axis=0)  # the first of equal maxima
        np.maximum(best_iou, best_of_step, out=best_iou)
        best_anchor = iou.argmax(axis=1)
        claims += [(anchor if iou[row, anchor] > 0 else None) for row, anchor in enumerate(best_anchor.tolist())]
    for gt_index, anchor in enumerate(claims):  # in order: of several claims on one anchor, the last one stands
        if anchor is not None:
            matched[anchor] = gt_index


def _iou_or_zero(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """IoU [g, A] of every pair of boxes [4, g] and [4, A], by the arithmetic of `pairwise_iou`; 0 where it is NaN."""
    a, b = boxes[:, :, None], others[:, None, :]
    intersection = np.minimum(a[2], b[2])
    intersection -= np.maximum(a[0], b[0])
    np.maximum(intersection, 0, out=intersection)
    height = np.minimum(a[3], b[3])
    height -= np.maximum(a[1], b[1])
    intersection *= np.maximum(height, 0, out=height)
    areas = [np.multiply(*(x[2:] - x[:2])) for x in (a, b)]
    union = np.add(areas[0], areas[1], out=height)
    union -= intersection
    intersection /= union
    return np.fmax(intersection, 0, out=intersection)
