"""Greedy NMS in PyTorch and NumPy, on any device.

The decisions are made on the host, where each depends on the one before. Up to 320 boxes, NMS runs in NumPy, because
PyTorch's per-call overhead would dominate.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ssdcore.kernels.boxes.eager import pairwise_iou
from ssdcore.kernels.rules import round_down, sort_key, widen

FEW_BOXES = 320  # boxes settled in one step, although half of their comparisons are redundant
BLOCK_BOXES = 256  # boxes of a larger group that are settled at once
PAIRS_AT_ONCE = 2**18  # compared at once, of several groups: a megabyte per tensor, which the cache holds
GROUPS_AT_ONCE = 1024  # settled at once: at most 64 MB of decisions
MIN_GROUP_SHARE = 8  # groups of one length are settled together if there are more of them than an eighth of the length


def nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    if len(boxes) <= FEW_BOXES and boxes.is_cpu:
        groups = None if idxs is None else idxs.numpy()
        return torch.from_numpy(_nms_of_few(widen(boxes).numpy(), widen(scores).numpy(), groups, iou_threshold))
    order = sort_key(scores).argsort(descending=True, stable=True)
    if idxs is None:
        return order[greedy_keep(widen(boxes[order]), None, iou_threshold)]
    by_class = idxs[order].argsort(stable=True)
    sorted_index = order[by_class]  # by class, then by score
    keep = torch.zeros_like(by_class, dtype=torch.bool)
    keep[by_class] = greedy_keep(widen(boxes[sorted_index]), idxs[sorted_index], iou_threshold)
    return order[keep]


def batched_nms_padded(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    if boxes.shape[1] <= FEW_BOXES and boxes.is_cpu:
        return _padded_nms_of_few(boxes, scores, idxs, iou_threshold, max_output, score_threshold)
    keep = _keep_mask(boxes, scores, idxs, iou_threshold, score_threshold)
    order = sort_key(scores).argsort(dim=1, descending=True, stable=True)  # [B, N]
    keep = keep.gather(1, order)
    slot = torch.where(keep, keep.cumsum(dim=1) - 1, max_output).clamp(max=max_output)
    output = torch.full((len(boxes), max_output + 1), -1, dtype=torch.int64, device=boxes.device)
    output.scatter_(1, slot, order)  # the last column takes what is not returned
    return output[:, :max_output].contiguous(), keep.sum(dim=1).clamp(max=max_output).int()


def _padded_nms_of_few(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor | None,
    iou_threshold: float,
    max_output: int,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """`batched_nms_padded` of at most `FEW_BOXES` boxes per image, on the CPU."""
    boxes, scores = widen(boxes), widen(scores)
    is_candidate = None if score_threshold is None else scores > score_threshold
    output, num_kept = np.full((len(boxes), max_output), -1), np.zeros(len(boxes), dtype=np.int32)
    for image in range(len(boxes)):
        groups, candidates = (None if x is None else x[image].numpy() for x in (idxs, is_candidate))
        kept = _nms_of_few(boxes[image].numpy(), scores[image].numpy(), groups, iou_threshold, candidates)[:max_output]
        output[image, : len(kept)], num_kept[image] = kept, len(kept)
    return torch.from_numpy(output), torch.from_numpy(num_kept)


def _nms_of_few(
    boxes: np.ndarray,
    scores: np.ndarray,
    groups: np.ndarray | None,
    iou_threshold: float,
    is_candidate: np.ndarray | None = None,
) -> np.ndarray:
    """`nms` in NumPy, of at most `FEW_BOXES` boxes; only of the candidates where `is_candidate`, bool [N], is given."""
    if boxes.dtype == np.float32:
        iou_threshold = round_down(iou_threshold)
    # NumPy sorts upwards, equal scores by index and NaN last. Read backwards, that is the order wanted.
    order = len(scores) - 1 - scores[::-1].argsort(kind="stable")[::-1]
    if is_candidate is not None:
        order = order.compress(is_candidate.take(order))
    sorted_groups = None if groups is None else groups.take(order)
    return order.compress(_greedy_keep_in_numpy(boxes.take(order, axis=0), sorted_groups, iou_threshold))


def _keep_mask(
    boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float, score_threshold: float | None
) -> Tensor:
    """Which of `boxes` [B, N, 4] survive NMS within their image and class: bool [B, N]."""
    is_candidate = torch.ones_like(scores, dtype=torch.bool)
    if score_threshold is not None:
        is_candidate = widen(scores) > score_threshold
    image, box = is_candidate.nonzero(as_tuple=True)
    order = sort_key(scores[image, box]).argsort(descending=True, stable=True)
    if idxs is not None:
        order = order[idxs[image, box][order].argsort(stable=True)]
    if len(boxes) > 1:
        order = order[image[order].argsort(stable=True)]
    image, box = image[order], box[order]
    group = image
    if idxs is not None:
        class_id = idxs[image, box]
        begins = (image[1:] != image[:-1]) | (class_id[1:] != class_id[:-1])
        group = F.pad(begins, (1, 0)).cumsum(dim=0)
    keep = torch.zeros_like(is_candidate)
    keep[image, box] = greedy_keep(widen(boxes[image, box]), group, iou_threshold)
    return keep


# --- which of sorted boxes are kept -----------------------------------------------------------------------


def greedy_keep(boxes: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """Which of `boxes` [M, 4], sorted by `groups` [M] and then from best to worst, NMS keeps: bool [M].

    Boxes of different groups do not suppress each other. Without `groups` all boxes are in one group.
    """
    if boxes.dtype == torch.float32:
        iou_threshold = round_down(iou_threshold)
    if len(boxes) <= FEW_BOXES:
        return _greedy_keep_of_few(boxes, groups, iou_threshold)
    if groups is None:
        return _greedy_keep_of_one_group(boxes, iou_threshold)
    groups_by_length: dict[int, list[tuple[int, int]]] = {}  # by the next power of two: first box and size of each
    first = 0
    for size in groups.unique_consecutive(return_counts=True)[1].tolist():
        groups_by_length.setdefault(1 << (size - 1).bit_length(), []).append((first, size))
        first += size
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for length, alike in groups_by_length.items():
        if length <= BLOCK_BOXES and MIN_GROUP_SHARE * len(alike) >= length:
            _settle_groups_alike(boxes, torch.tensor(alike, device=boxes.device), length, iou_threshold, keep)
        else:
            for first, size in alike:
                keep[first : first + size] = _greedy_keep_of_one_group(boxes[first : first + size], iou_threshold)
    return keep


def _settle_groups_alike(boxes: Tensor, groups: Tensor, length: int, iou_threshold: float, keep: Tensor) -> None:
    """Settle groups of at most `length` boxes, `groups` [P, 2] (first box, size), as one problem; writes to `keep`."""
    position = torch.arange(length, device=boxes.device)
    for chunk in groups.split(GROUPS_AT_ONCE):
        exists = position < chunk[:, 1:]  # [P, L]
        index = torch.where(exists, chunk[:, :1] + position, 0)
        parts = boxes[index].split(max(1, PAIRS_AT_ONCE // length**2))
        spares = torch.cat([~(pairwise_iou(part, part) > iou_threshold) for part in parts])  # [P, L, L]
        kept = exists.clone()
        for better in range(length - 1):  # settled already, because all boxes before it are
            worse = slice(better + 1, length)
            kept[:, worse] &= spares[:, better, worse] | ~kept[:, better, None]
        keep[index[exists]] = kept[exists]


def _greedy_keep_of_one_group(boxes: Tensor, iou_threshold: float) -> Tensor:
    """`greedy_keep` of one group: settles its best `BLOCK_BOXES`, drops what they suppress, and so on with the rest."""
    block, rest = boxes[:BLOCK_BOXES], boxes[BLOCK_BOXES:]
    kept = _greedy_keep_of_few(block, None, iou_threshold)
    if len(rest) == 0:
        return kept
    keep = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    keep[:BLOCK_BOXES] = kept
    undecided = torch.arange(BLOCK_BOXES, len(boxes), device=boxes.device)
    while len(rest):
        kept_boxes = block[kept]
        parts = rest.split(PAIRS_AT_ONCE // BLOCK_BOXES)
        spared = torch.cat([~(pairwise_iou(kept_boxes, part) > iou_threshold).any(dim=0) for part in parts])
        undecided = undecided[spared]
        block, rest = boxes[undecided[:BLOCK_BOXES]], boxes[undecided[BLOCK_BOXES:]]
        kept = _greedy_keep_of_few(block, None, iou_threshold)
        keep[undecided[:BLOCK_BOXES]] = kept
        undecided = undecided[BLOCK_BOXES:]
    return keep


def _greedy_keep_of_few(boxes: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """`greedy_keep` of at most `FEW_BOXES` boxes, on the host."""
    kept = _greedy_keep_in_numpy(boxes.cpu().numpy(), None if groups is None else groups.cpu().numpy(), iou_threshold)
    return torch.from_numpy(kept).to(boxes.device)


@np.errstate(all="ignore")  # boxes with NaN, infinity or huge sides are legal
def _greedy_keep_in_numpy(boxes: np.ndarray, groups: np.ndarray | None, iou_threshold: float) -> np.ndarray:
    """`greedy_keep` in NumPy. The arithmetic is that of `pairwise_iou`, and so are the decisions."""
    corners = np.ascontiguousarray(boxes.T)
    a, b = corners[:, :, None], corners[:, None, :]
    sides = np.minimum(a[2:], b[2:])  # [2, M, M]
    sides -= np.maximum(a[:2], b[:2])
    intersection = sides[0] * sides[1]
    area = np.multiply(*(corners[2:] - corners[:2]))
    union = area[:, None] + area
    union -= intersection
    intersection /= union
    suppresses = intersection > iou_threshold
    # `pairwise_iou` clamps the sides. To discard the pairs with a side that is not positive is faster.
    suppresses &= sides[0] > 0
    suppresses &= sides[1] > 0
    if groups is not None:
        suppresses &= groups[:, None] == groups
    num_boxes = len(boxes)
    suppresses.ravel()[:: num_boxes + 1] = False  # the diagonal
    # Arrays are slow at one decision after another. Here each row is one Python integer with a byte per box. What a row
    # says of better boxes does no harm: because the relation is symmetric, these have been removed, or this box has.
    row_bytes = suppresses.tobytes()
    removed = 0
    for box in suppresses.any(axis=1).nonzero()[0].tolist():
        if not removed >> (8 * box) & 1:
            removed |= int.from_bytes(row_bytes[box * num_boxes : (box + 1) * num_boxes], "little")
    return np.frombuffer(removed.to_bytes(num_boxes, "little"), dtype=bool) ^ True
