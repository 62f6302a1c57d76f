"""Assignment of ground truths to anchors in plain PyTorch, on any device."""

from itertools import pairwise

import torch
from torch import Tensor

from ssdcore.kernels.boxes.eager import pairwise_iou
from ssdcore.kernels.rules import computed_dtype

TRUTHS_AT_ONCE = 32  # with 8732 anchors a tensor of their pairs is a megabyte, which the cache holds


def match_anchors(gt_boxes: Tensor, gt_offsets: Tensor, anchors: Tensor, iou_threshold: float) -> Tensor:
    first_row = int(gt_offsets[0])  # rows before it belong to no image
    dtype = torch.promote_types(computed_dtype(gt_boxes), computed_dtype(anchors))
    gt_boxes, anchors = gt_boxes[first_row:].to(dtype), anchors.to(dtype)
    device, num_anchors = anchors.device, len(anchors)
    offsets = [row - first_row for row in gt_offsets.tolist()]
    num_images, num_truths = len(offsets) - 1, offsets[-1]
    best_iou = torch.zeros(num_images, num_anchors, dtype=anchors.dtype, device=device)
    matched = torch.full(best_iou.shape, -1, dtype=torch.int64, device=device)
    if matched.numel() == 0 or num_truths == 0:
        return matched
    best_anchor = torch.zeros(num_truths, dtype=torch.int64, device=device)  # [T]
    best_overlap = anchors.new_zeros(num_truths)  # [T]
    for start in range(0, num_truths, TRUTHS_AT_ONCE):
        step = slice(start, min(start + TRUTHS_AT_ONCE, num_truths))  # of the truths, of whichever images
        iou = pairwise_iou(gt_boxes[step], anchors).nan_to_num_(0.0)  # a NaN overlaps nothing
        best_overlap[step], best_anchor[step] = iou.max(dim=1)  # the first of equal maxima
        for image, (first, end) in enumerate(pairwise(offsets)):
            iou_of_image = iou[max(first - start, 0) : max(end - start, 0)]
            if len(iou_of_image) and first >= start:  # the image's first truths: there is nothing to compare with
                torch.max(iou_of_image, dim=0, out=(best_iou[image], matched[image]))
            elif len(iou_of_image):
                step_iou, row = iou_of_image.max(dim=0)
                better = step_iou > best_iou[image]
                best_iou[image] = torch.where(better, step_iou, best_iou[image])
                matched[image] = torch.where(better, row + (start - first), matched[image])
    # `best_iou > 0`, because a threshold may round to 0, which every pair would reach.
    matched = torch.where((best_iou > 0) & (best_iou >= iou_threshold), matched, -1)
    image_of_truth = torch.arange(num_images, device=device).repeat_interleave(gt_offsets.diff())  # [T]
    gt_index = torch.arange(num_truths, device=device) - (gt_offsets - first_row)[image_of_truth]  # [T]
    claims = best_overlap > 0
    claimed = (image_of_truth * num_anchors + best_anchor)[claims]
    # Of several claims on one anchor, the last one stands.
    matched.view(-1).scatter_reduce_(0, claimed, gt_index[claims], "amax", include_self=False)
    return matched
